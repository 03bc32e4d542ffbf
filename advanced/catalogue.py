"""The methods by name, what each does in a sentence, and which of them combine."""

from collections.abc import Sequence

METHODS = {
    "plain": "finetune all weights under a new head, as `run_llama.py --option finetune` does",
    "zero_shot": "no training: template and calibration are chosen on the train split",
    "pretrain": "first go on with next-token training on the train split's own sentences",
    "prompt": "finetune the language model to say the label's word behind a template",
    "attention_pool": "the head reads a learned weighting of the states",
    "last_mean": "the head reads the last state beside the mean of all",
    "layer_mix": "the head reads a learned mixture of all layers",
    "lora": "train low-rank updates of the matrices, merged in the end, and the head",
    "adapter": "train small networks behind attention and feed-forward, norms and the head",
    "norms": "train the gains of the norms and the head (BitFit, for a model without biases)",
    "head": "train the head alone",
    "mixout": "in training, numbers of the matrices go back to the pretrained ones at random",
    "l2sp": "a quadratic penalty on the distance from the pretrained weights",
    "smart": "a penalty on what small changes of the embeddings, and of a step, do to the output",
    "last_epochs": "the mean of the weights of the last epochs instead of the best epoch's",
    "wise_ft": "pretrained and finetuned weights interpolated, the share chosen on dev",
    "soup": "the mean of the weights of those seeds that together raise dev accuracy, or of all",
}
READERS = ("prompt", "attention_pool", "last_mean", "layer_mix")
PARTIAL = ("lora", "adapter", "norms", "head")

CLASHES = (  # a method, those that it does not combine with, and why
    ("mixout", PARTIAL, "{rival} leaves the matrices, which it mixes, as they were pretrained"),
    ("l2sp", ("lora", "head"), "{rival} trains none of the pretrained weights, which it holds"),
    ("wise_ft", ("head",), "{rival} trains none of the weights, which it interpolates"),
    ("prompt", ("head",), "a prompt has no head to train"),
    (
        "prompt",
        ("smart",),
        "a label of several tokens takes passes of several lengths, and smart perturbs one",
    ),
    ("adapter", ("wise_ft",), "adapters have no pretrained counterpart"),
)


def compose(names: Sequence[str]) -> tuple[str, ...]:
    """The methods in their order of action; ValueError says in a line why they do not combine."""
    chosen = tuple(name for name in METHODS if name in names)
    if len(chosen) < len(names):
        raise ValueError(f"--method {' --method '.join(names)}: names one twice")
    if "plain" in chosen and len(chosen) > 1:
        raise ValueError("plain is finetuning without a method; leave it out beside others")
    if "zero_shot" in chosen and set(chosen) - {"zero_shot", "pretrain"}:
        raise ValueError("zero_shot trains no classifier, so it goes with pretrain alone")
    for group, what in ((READERS, "is what reads the states"), (PARTIAL, "says what is trained")):
        rivals = [name for name in chosen if name in group]
        if len(rivals) > 1:
            raise ValueError(f"{' and '.join(rivals)} do not combine: each {what}")
    for name, rivals, why in CLASHES:
        for rival in rivals:
            if {name, rival} <= set(chosen):
                raise ValueError(f"{name} and {rival} do not combine: {why.format(rival=rival)}")
    return chosen
