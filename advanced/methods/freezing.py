"""Train a part of the existing weights.

"norms": the gains of the RMSNorms, and the head. This is the counterpart of BitFit (Ben Zaken et
al. 2022, arXiv 2106.10199), which trains BERT's biases and the head; a Llama has no biases. The
dim * (2 n_layers + 1) gains scale features.

"head": everything outside the Llama, on frozen states (linear probing).

LoRA and bottleneck adapters train new weights instead. He et al. 2022 (arXiv 2110.04366) put those
two into one framework.
"""

from torch import nn

from llama import RMSNorm

PARTS = ("norms", "head")


def train_only(model: nn.Module, part: str) -> None:
    """Make one of `PARTS` trainable and freeze the rest.

    Everything outside `model.llama`, such as a pooling's own weights, belongs to the head.
    """
    model.requires_grad_(True)
    model.llama.requires_grad_(False)
    for module in model.llama.modules():
        if part == "norms" and isinstance(module, RMSNorm):
            module.requires_grad_(True)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return (number of trainable parameters, number of all); a tied weight counts once."""
    parameters = list(model.parameters())
    n_trainable = sum(p.numel() for p in parameters if p.requires_grad)
    return n_trainable, sum(p.numel() for p in parameters)
