"""Compare our Llama with reference outputs, on stories42M.pt and on the bundled model.

    python sanity_check.py
    python sanity_check.py --checkpoint CHECKPOINT.pt
    python sanity_check.py --checkpoint data/mini/model.pt --reference data/mini/sanity_check.data

The assignment's reference file holds logits (2, 1, V) and hidden states (2, 8, dim) of its model
without a mask. The bundled model's reference was computed in float64 NumPy, for both attention
modes. Exit codes: 0 all agree, 1 some do not (with a diagnosis), 2 a file is missing.
"""

import sys
from pathlib import Path

import torch

from config import ATTENTION_MODES
from formats.torch_file import load_torch_file
from llama import Llama, load_pretrained
from utils import ArgumentParser, InputError, brief, run_script

TOKEN_IDS = [
    [101, 7592, 2088, 102, 0, 0, 0, 0],
    [101, 7592, 15756, 2897, 2005, 17953, 2361, 102],
]
# Relative to the largest value. Against float64, float32 rounding gives 1e-6 to 3e-6 on random
# models of stories42M's shape and on stories260K; RMSNorm's eps off by a factor of ten, the
# smallest mistake tried, makes 3e-5 and more.
TOLERANCE = 2e-5
PUBLISHED = ("stories42M.pt", "sanity_check.data")
MINI = ("data/mini/model.pt", "data/mini/sanity_check.data")
QUANTITIES = ("logits", "hidden_states")

Outputs = dict[str, torch.Tensor]


def read_reference(path: str) -> tuple[torch.Tensor, dict[str, Outputs]]:
    """Return (token ids (B, T), outputs by attention mode) of a reference file.

    The assignment's file holds one mode's outputs; the bundled one holds token ids and both modes.
    """
    content = load_torch_file(path)
    token_ids = torch.tensor(TOKEN_IDS)
    by_mode = {"full": content}
    if "token_ids" in content:
        token_ids = content.pop("token_ids")
        by_mode = content
    are_ids = isinstance(token_ids, torch.Tensor) and token_ids.dtype == torch.int64
    if not are_ids or token_ids.ndim != 2 or not token_ids.numel() or token_ids.min() < 0:
        raise InputError(f"{path}: token_ids are not (B, T) integers of at least 0")
    if not by_mode:
        raise InputError(f"{path}: holds token_ids and no outputs of any attention mode")
    for mode, outputs in by_mode.items():
        if mode not in ATTENTION_MODES or not isinstance(outputs, dict):
            raise InputError(f"{path}: {brief(mode)} is not an attention mode with its outputs")
    return token_ids, by_mode


def compute(model: Llama, token_ids: torch.Tensor) -> Outputs:
    with torch.inference_mode():
        logits, hidden_states = model(token_ids)
    return {"logits": logits, "hidden_states": hidden_states}


def relative_difference(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the largest difference over the largest reference value; NaN counts as infinite."""
    difference = (ours - reference).abs().max() / reference.abs().max()
    return difference.nan_to_num(nan=torch.inf).item()


def agrees(ours: Outputs, reference: Outputs) -> bool:
    return all(relative_difference(ours[key], reference[key]) <= TOLERANCE for key in QUANTITIES)


def diagnose(
    checkpoint: str, mode: str, token_ids: torch.Tensor, ours: Outputs, reference: Outputs
) -> str:
    """Return what the failure looks like; each guess is tried on this implementation."""
    torch.manual_seed(torch.initial_seed() + 1)
    model = load_pretrained(checkpoint, attention=mode)
    if not agrees(compute(model, token_ids), ours):
        return (
            "random weights: loading the checkpoint twice gives two models, so part of it is lost"
        )

    changed = token_ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % model.config.vocab_size
    first = ours["hidden_states"][:, 0]
    alike = torch.allclose(
        compute(model, changed)["hidden_states"][:, 0], first, atol=1e-4 * first.abs().max().item()
    )
    if mode == "full" and alike:
        return "a causal mask: the last token does not change the first state, in full mode it must"
    if mode == "causal" and not alike:
        return "no causal mask: the last token changes the first state, which must not see it"

    pair_halves(model)
    if agrees(compute(model, token_ids), reference):
        return "wrong RoPE pairing: (x_i, x_i+D/2) is rotated, it must be (x_2i, x_2i+1)"
    return "none of the usual mistakes; check RMSNorm's eps, the two residuals and the 1/sqrt(D)"


def pair_halves(model: Llama) -> None:
    """Reorder query and key rows so that a RoPE which pairs the halves of a head is correct.

    Dot products stay the same when queries and keys are reordered alike.
    """
    head_dim = model.config.head_dim
    for name, weight in model.named_parameters():
        if name.endswith(("compute_query.weight", "compute_key.weight")):
            pairs = weight.data.view(-1, head_dim // 2, 2, weight.shape[1])
            weight.data = pairs.transpose(1, 2).reshape(weight.shape)


def check(checkpoint: str, reference_path: str) -> bool:
    """Compare and print; return True if every quantity agrees in every mode of the reference."""
    token_ids, references = read_reference(reference_path)
    verdicts = [
        _check_mode(checkpoint, mode, token_ids, reference, reference_path)
        for mode, reference in references.items()
    ]
    return all(verdicts)


def _check_mode(
    checkpoint: str, mode: str, token_ids: torch.Tensor, reference: Outputs, reference_path: str
) -> bool:
    model = load_pretrained(checkpoint, attention=mode)
    if token_ids.max() >= model.config.vocab_size:
        raise InputError(
            f"{reference_path}: has token {token_ids.max()}, {checkpoint} only "
            f"{model.config.vocab_size} tokens; the two files do not belong together"
        )
    ours = compute(model, token_ids)
    print(f"{checkpoint}, attention: {mode}")
    differences = []
    for name in QUANTITIES:
        theirs = reference.get(name)
        is_tensor = isinstance(theirs, torch.Tensor)
        if not is_tensor or theirs.shape != ours[name].shape:
            found = tuple(theirs.shape) if is_tensor else "nothing"
            raise InputError(
                f"{reference_path}: holds {found} as {name}, {checkpoint} gives "
                f"{tuple(ours[name].shape)}; the two files do not belong together"
            )
        absolute = (ours[name] - theirs).abs().max().item()
        relative = relative_difference(ours[name], theirs)
        differences.append(relative)
        print(
            f"{name:13s} largest difference {absolute:.2e}, {relative:.2e} of the largest value "
            f"(tolerance {TOLERANCE:.0e})"
        )
    if max(differences) <= TOLERANCE:
        return True
    guess = diagnose(checkpoint, mode, token_ids, ours, reference)
    print(f"Your Llama implementation differs. It looks like {guess}.")
    return False


def main(argv: list[str] | None = None) -> int:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--checkpoint", metavar="FILE", help="checkpoint to check (default: "
                        f"{PUBLISHED[0]} if present, and {MINI[0]})")  # fmt: skip
    parser.add_argument("--reference", metavar="FILE", help="reference outputs of --checkpoint "
                        f"(default: {PUBLISHED[1]})")  # fmt: skip
    args = parser.parse_args(argv)
    published, mini = _at_root(PUBLISHED), _at_root(MINI)
    if args.checkpoint or args.reference:
        pairs = [(args.checkpoint or published[0], args.reference or published[1])]
    elif Path(published[0]).is_file():
        # A submission's zip has no data/mini/: there the published pair is all there is to check.
        pairs = [published, mini] if Path(mini[0]).parent.is_dir() else [published]
    else:
        pairs = [mini]
        print(
            f"sanity_check.py: {PUBLISHED[0]} not found, checking only the bundled {MINI[0]}; "
            f"`bash setup.sh` downloads {PUBLISHED[0]}",
            file=sys.stderr,
        )
    missing = [path for pair in pairs for path in pair if not Path(path).is_file()]
    if missing:
        raise InputError(
            f"missing {' and '.join(missing)}; `bash setup.sh` downloads the assignment's files, "
            "data/mini/ comes with this project"
        )
    verdicts = [check(*pair) for pair in pairs]
    if not all(verdicts):
        return 1
    print("tolerance: rounding gives 1e-06 to 3e-06 of the largest value, a small mistake 3e-05")
    print("Your Llama implementation is correct!")
    return 0


def _at_root(pair: tuple[str, str]) -> tuple[str, str]:
    """Return the files in the current folder, or in the project's if the first is not there."""
    root = Path(__file__).resolve().parent
    is_here = Path(pair[0]).is_file() or Path.cwd() == root
    return pair if is_here else tuple(str(root / path) for path in pair)


if __name__ == "__main__":
    run_script(main)
