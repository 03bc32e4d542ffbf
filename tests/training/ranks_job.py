"""What several processes compute: torchrun starts this file, and a test calls `main` alone."""

import itertools
import sys
from pathlib import Path
from unittest import mock

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (2, 1)]

from helpers import CPU, classifier, random_data, train, weights_of  # noqa: E402
from training import distributed, state  # noqa: E402
from training.evaluation import evaluate  # noqa: E402
from training.loop import Recipe  # noqa: E402
from training.state import StateFile  # noqa: E402
from utils import InputError  # noqa: E402

CASES = [
    # attention, pooling, batch size (of 10 sentences), r_drop, max_grad_norm
    ("full", "position", 4, 0.0, None),
    ("causal", "last", 4, 0.0, 0.5),
    ("full", "mean", 10, 0.7, None),
    ("causal", "mean", 1, 0.0, None),  # less than the ranks
]
SETTINGS = {"lr": 1e-3}


def train_case(attention, pooling, batch_size, r_drop, max_grad_norm, **options) -> dict:
    """Train in float64; return the weights and what is reported and predicted."""
    model, n_passes = (
        classifier(pooling, n_labels=3, attention=attention).double(),
        itertools.count(),
    )
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


@mock.patch.object(state, "source_digest", lambda: "whatever is edited meanwhile")
def main(out: str) -> None:
    """Rank 0 writes the results to `out`, and the state behind one epoch to `out`.state.pt."""
    with distributed.joined(use_gpu=False):
        results = [train_case(*case) for case in CASES]
        train_case(*CASES[0], epochs=1, state_file=StateFile(f"{out}.state.pt", SETTINGS))
        messages = []
        for settings in ({"seed": 3}, {"seed": distributed.rank()}):
            try:
                distributed.require_same(settings)
            except InputError as error:
                messages.append(str(error))
        assert sum(distributed.all_sum(torch.ones(2)).tolist()) == 2 * distributed.world_size()
        if distributed.is_main():
            torch.save({"results": results, "messages": messages}, out)


if __name__ == "__main__":
    main(sys.argv[1])
