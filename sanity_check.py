"""Does our Llama compute what the assignment's reference computed on stories42M.pt?

The reference file holds logits (2, 1, V) and hidden states (2, 8, dim) of the unmasked model.
Exit codes: 0 they agree, 1 they do not (and what that looks like), 2 a file is missing.
"""

import re
from pathlib import Path

import torch

import cli
from checkpoint import load_torch_file
from llama import Llama, load_pretrained

TOKEN_IDS = [
    [101, 7592, 2088, 102, 0, 0, 0, 0],
    [101, 7592, 15756, 2897, 2005, 17953, 2361, 102],
]
# Of the largest value: float32 rounding through the layers makes 1e-6 to 3e-6, on any build of
# PyTorch; the smallest mistake tried, RMSNorm's eps off by a factor of ten, 3e-5 and more.
TOLERANCE = 2e-5
QUANTITIES = ("logits", "hidden_states")

Outputs = dict[str, torch.Tensor]


def compute(model: Llama) -> Outputs:
    with torch.inference_mode():
        logits, hidden_states = model(torch.tensor(TOKEN_IDS))
    return {"logits": logits, "hidden_states": hidden_states}


def relative_difference(ours: Outputs, reference: Outputs, name: str) -> float:
    """Largest difference over the largest reference value; NaN counts as infinitely far."""
    difference = (ours[name] - reference[name]).abs().max() / reference[name].abs().max()
    return difference.nan_to_num(nan=torch.inf).item()


def agrees(ours: Outputs, reference: Outputs) -> bool:
    return all(relative_difference(ours, reference, name) <= TOLERANCE for name in QUANTITIES)


def diagnose(checkpoint: str, ours: Outputs, reference: Outputs) -> str:
    """What the failure looks like, each guess tried on the implementation at hand."""
    torch.manual_seed(torch.initial_seed() + 1)
    model = load_pretrained(checkpoint, attention="full")
    if not agrees(compute(model), ours):
        return (
            "random weights: loading the checkpoint twice gives two models, so part of it is lost"
        )

    # Both rows begin with the same two tokens. Without a mask the rest of the row tells them apart.
    first, second = (ours["hidden_states"][row, :2] for row in (0, 1))
    if torch.allclose(first, second, atol=1e-4 * first.abs().max().item()):
        return "a causal mask: equal beginnings have equal states, but the reference has no mask"

    pair_halves(model)
    if agrees(compute(model), reference):
        return "wrong RoPE pairing: (x_i, x_i+D/2) is rotated, it must be (x_2i, x_2i+1)"
    return "none of the usual mistakes; check RMSNorm's eps, the two residuals and the 1/sqrt(D)"


def pair_halves(model: Llama) -> None:
    """Reorders query and key rows so that a RoPE which pairs the halves of a head comes out right.

    Dot products do not change when queries and keys are reordered alike.
    """
    head_dim = model.config.head_dim
    for name, weight in model.named_parameters():
        if re.search(r"compute_(query|key)\.weight", name):
            pairs = weight.data.view(-1, head_dim // 2, 2, weight.shape[1])
            weight.data = pairs.transpose(1, 2).reshape(weight.shape)


def check(checkpoint: str, reference_path: str) -> bool:
    """Compares and prints; True if both quantities agree."""
    reference = load_torch_file(reference_path)
    ours = compute(load_pretrained(checkpoint, attention="full"))
    for name in QUANTITIES:
        if name not in reference or reference[name].shape != ours[name].shape:
            found = tuple(reference[name].shape) if name in reference else "nothing"
            raise ValueError(
                f"{reference_path}: holds {found} as {name}, {checkpoint} gives "
                f"{tuple(ours[name].shape)}; the two files do not belong together"
            )
        absolute = (ours[name] - reference[name]).abs().max().item()
        relative = relative_difference(ours, reference, name)
        print(
            f"{name:13s} largest difference {absolute:.2e}, {relative:.2e} of the largest value "
            f"(tolerance {TOLERANCE:.0e})"
        )
    print("tolerance: rounding makes 1e-06 to 3e-06 of the largest value, a small mistake 3e-05")
    if agrees(ours, reference):
        print("Your Llama implementation is correct!")
        return True
    print(
        f"Your Llama implementation differs. It looks like {diagnose(checkpoint, ours, reference)}."
    )
    return False


def main(argv: list[str] | None = None) -> int:
    parser = cli.ArgumentParser(description="Compares the model with the assignment's reference.")
    parser.add_argument("--checkpoint", default="stories42M.pt")
    parser.add_argument("--reference", default="sanity_check.data")
    args = parser.parse_args(argv)
    missing = [path for path in (args.checkpoint, args.reference) if not Path(path).is_file()]
    if missing:
        raise ValueError(f"missing {' and '.join(missing)}; `bash setup.sh` downloads both")
    return 0 if check(args.checkpoint, args.reference) else 1


if __name__ == "__main__":
    cli.run(main)
