"""Training a part of the weights that are there, and none that are not.

"norms": the gains of the RMSNorms and the head. It is the counterpart of BitFit (Ben Zaken et al.
2022, arXiv 2106.10199), which trains the biases of BERT and the head; a Llama has no biases, and
its gains are its only vectors. In dim * (2 n_layers + 1) numbers it scales features and moves
none.

"head": what lies outside the Llama alone, over frozen states (linear probing). It is what
`option="pretrain"` makes of a fresh classifier.

LoRA and bottleneck adapters train weights of their own instead; He et al. 2022, arXiv 2110.04366,
put those two into one framework.
"""

from torch import nn

from llama import RMSNorm

PARTS = ("norms", "head")


def train_only(model: nn.Module, which: str) -> None:
    """Makes one of `PARTS` trainable and freezes the rest, whatever was trainable before.

    All that lies outside `model.llama`, a pooling's own weights too, counts as the head. ValueError
    for another word.
    """
    if which not in PARTS:
        raise ValueError(f"which={which!r} to train: choose one of {', '.join(PARTS)}")
    model.requires_grad_(True)
    model.llama.requires_grad_(False)
    if which == "norms":
        for module in model.llama.modules():
            if isinstance(module, RMSNorm):
                module.requires_grad_(True)


def count_trainable(model: nn.Module) -> tuple[int, int]:
    """(Numbers that are trained, all numbers) of the parameters; a tied weight counts once."""
    parameters = list(model.parameters())
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    return trained, sum(parameter.numel() for parameter in parameters)
