"""What several processes compute: torchrun starts this file, and a test calls `main` alone."""

import itertools
import sys
from pathlib import Path
from unittest import mock

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (2, 1)]

from helpers import CPU, classifier, random_data, train, weights_of  # noqa: E402
from training import distributed, state  # noqa: E402
from training.dataset import Example, SentenceDataset  # noqa: E402
from training.evaluation import evaluate  # noqa: E402
from training.loop import Recipe  # noqa: E402
from training.state import StateFile  # noqa: E402
from utils import InputError  # noqa: E402

CASES = [
    # attention, pooling, batch size (of 10 sentences), r_drop, max_grad_norm, output is tied
    ("full", "position", 4, 0.0, None, True),
    ("causal", "last", 4, 0.0, 0.5, True),
    ("full", "mean", 10, 0.7, None, False),
    ("causal", "mean", 1, 0.0, None, True),  # less than the ranks
]
SETTINGS = {"lr": 1e-3}


def train_case(
    attention, pooling, batch_size, r_drop, max_grad_norm, is_tied=True, **options
) -> dict:
    """Train in float64; return the weights and what is reported and predicted."""
    model = classifier(pooling, n_labels=3, attention=attention).double()
    n_passes = itertools.count()
    if not is_tied:
        model.llama.output.weight = torch.nn.Parameter(model.llama.output.weight.detach().clone())
    if r_drop:
        model.classifier_head.register_forward_hook(  # so that its two passes differ
            lambda head, _, output: output * 1.5 ** (head.training and next(n_passes) % 2)
        )
    recipe = Recipe(r_drop=r_drop, max_grad_norm=max_grad_norm)
    data = random_data(10, n_labels=3)
    history = train(model, data, batch_size=batch_size, recipe=recipe, **options)
    result = evaluate(model, data, batch_size, CPU)
    return {
        "weights": weights_of(model),
        "losses": [report.train_loss for report in history],
        "accuracies": [[r.train_accuracy, r.dev_accuracy] for r in history],
        "predictions": result.predictions,
        "confidences": result.confidences,
    }


def dropout_masks() -> list[float]:
    """Return a number for the first dropout mask of each of two epochs."""
    model, masks = classifier(n_labels=3), []
    model.llama.dropout.p = 0.5
    model.llama.dropout.register_forward_hook(
        lambda drop, _, output: (
            masks.append(float((output != 0).nonzero().square().sum())) if drop.training else None
        )
    )
    rows = [Example("a sentence", label, [5, 6, 7, 8]) for label in range(3)]  # one for each rank
    train(model, SentenceDataset(rows, pad_id=3), batch_size=3, lr=1e-30)
    return masks


@mock.patch.object(state, "source_digest", lambda: "whatever is edited meanwhile")
def main(out: str) -> None:
    """Rank 0 writes the results to `out`, and the state behind one epoch to `out`.state.pt."""
    with distributed.process_group(use_gpu=False):
        results = [train_case(*case) for case in CASES]
        train_case(*CASES[0], epochs=1, state_file=StateFile(f"{out}.state.pt", SETTINGS))
        messages = []
        for seed in (3, distributed.rank()):  # StateFile compares the settings of all ranks
            try:
                StateFile(f"{out}.absent.pt", {"seed": seed})
            except InputError as error:
                messages.append(str(error))
        masks = torch.zeros(distributed.world_size(), 2, dtype=torch.float64)
        masks[distributed.rank()] = torch.tensor(dropout_masks())
        masks = distributed.all_sum(masks).flatten().tolist()
        assert sum(distributed.all_sum(torch.ones(2)).tolist()) == 2 * distributed.world_size()
        if distributed.is_main():
            torch.save({"results": results, "messages": messages, "masks": masks}, out)
    # A thread of gloo that lives on can abort at the exit of Python.
    names = [file.read_text(encoding="utf-8") for file in Path("/proc/self/task").glob("*/comm")]
    assert not any("gloo" in name for name in names)


if __name__ == "__main__":
    main(sys.argv[1])
