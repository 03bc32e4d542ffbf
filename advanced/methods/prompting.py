"""Zero-shot classification by prompts (`templates.py`), and finetuning through the same prompts.

The score of a label is the log of sum_v p(v | prompt) over its strings v, p by the chain rule over
tokens. It holds the model's liking for some strings whatever the sentence, so a `bias` is added
before scores are normalized: minus the log of a label's mean probability

- "contextual": given "N/A", "" and "[MASK]" for a sentence (Zhao et al. 2021, arXiv 2102.09690:
  W = diag(p_cf)^-1, b = 0; here in log space, and normalized without a second softmax);
- "pmi": given the template without a sentence (Holtzman et al. 2021, arXiv 2104.08315: domain
  conditional PMI, here of the sum over a label's strings);
- "batch": given sentences, their labels unseen (Zhou et al. 2024, arXiv 2309.17249); here the train
  split's, so that no prediction depends on other test sentences. It draws predictions toward
  balanced labels.

Prompt-based finetuning (Gao et al. 2021, LM-BFF, arXiv 2012.15723, eq. 1) trains the Llama on these
same log-probabilities, with no new head; there the label fills a mask anywhere in the text, here it
comes last, where a causal model has read the sentence.
"""

import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from advanced.methods.templates import Template, render
from classifier import LlamaZeroShotClassifier
from llama import Llama
from tokenizer import Tokenizer
from training.dataset import Example, SentenceDataset, encode_examples, make_loader

SCORINGS = ("plain", "contextual", "pmi", "batch")
CONTENT_FREE = ("N/A", "", "[MASK]")


def encode_prompts(
    rows: list[tuple[str, int]],
    tokenizer: Tokenizer,
    template: Template,
    *,
    max_tokens: int,
    max_sentence_len: int | None = None,
) -> tuple[list[Example], int]:
    """`dataset.encode_examples` of the rendered sentences: one too long loses its end, never a word
    of the template. Leave the model room for the labels: max_seq_len - `longest_label`."""
    before = tokenizer.encode(template.before, bos=True, eos=False)
    examples, n_truncated = encode_examples(
        rows,
        tokenizer,
        max_tokens=max_tokens - len(before) + 1,
        max_sentence_len=max_sentence_len,
        suffix=template.after or None,
    )
    examples = [e._replace(tokens=before + e.tokens[1:]) for e in examples]  # one bos is enough
    return examples, n_truncated


class PromptClassifier(LlamaZeroShotClassifier):
    """(B, T), (B,) -> (B, n_labels): log-probabilities of labels that have one or more strings.

    `labels` are those of a `Template`. All strings of one token cost one pass together, each other
    beginning of a string one more. The Llama is trained, or frozen with `trainable=False`; that it
    is causal, and reads each row's last real token, keeps padding and other rows out of the result.
    """

    def __init__(
        self,
        llama: Llama,
        tokenizer: Tokenizer,
        labels: tuple[tuple[str, ...], ...] | list[list[str]],
        trainable: bool = True,
    ):
        if llama.config.attention != "causal":
            raise ValueError(
                f"attention={llama.config.attention!r} cannot prompt: each token would see the "
                "next; choose a causal checkpoint, or --attention causal"
            )
        strings = [string for group in labels for string in group]
        config = SimpleNamespace(num_labels=len(strings), pooling="last")
        super().__init__(config, tokenizer, strings, llama)
        self.num_labels = len(labels)
        self.group_sizes = [len(group) for group in labels]
        self.llama.requires_grad_(trainable)
        self.register_buffer("bias", torch.zeros(len(labels), device=llama.norm.weight.device))

    def scores(self, input_ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """log sum_v p(v | prompt) over each label's strings v, (B, n_labels), without the bias."""
        of_strings = super().forward(input_ids, lengths).split(self.group_sizes, dim=1)
        return torch.stack([group.logsumexp(dim=1) for group in of_strings], dim=1)

    def forward(self, input_ids: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        return F.log_softmax(self.scores(input_ids, lengths) + self.bias, dim=-1)


def longest_label(tokenizer: Tokenizer, template: Template) -> int:
    """Positions that the template's labels need behind a prompt: all tokens but the last."""
    strings = [string for group in template.labels for string in group]
    return max(len(tokenizer.encode(string, bos=False, eos=False)) for string in strings) - 1


@torch.inference_mode()
def label_scores(
    model: PromptClassifier, examples: list[Example], batch_size: int = 32
) -> torch.Tensor:
    """`model.scores` of each example, (N, n_labels), in their order."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].tokens))
    dataset = SentenceDataset([examples[i] for i in order], model.tokenizer.pad_id)
    device = model.bias.device
    scores = torch.cat(
        [
            model.scores(batch["token_ids"].to(device), batch["lengths"].to(device))
            for batch in make_loader(dataset, batch_size)
        ]
    )
    return torch.empty_like(scores).index_copy_(0, torch.tensor(order, device=device), scores)


def calibrate(
    model: PromptClassifier, scoring: str, template: Template, scores: torch.Tensor | None = None
) -> None:
    """Sets the model's bias by one of SCORINGS: minus the log of each label's mean probability.

    "batch" takes the mean over `scores` (N, n_labels), those of sentences whose labels it does not
    see; the others make inputs of their own. Put the model in eval mode first.
    """
    if scoring not in SCORINGS:
        raise ValueError(f"scoring={scoring!r} is not one of {SCORINGS}")
    if scoring == "plain":
        model.bias.zero_()
        return
    if scoring != "batch":
        inputs = CONTENT_FREE if scoring == "contextual" else ("",)
        texts = [render(template, text) for text in inputs]
        encode = model.tokenizer.encode
        examples = [Example(text, 0, encode(text, bos=True, eos=False)) for text in texts]
        scores = label_scores(model, examples)
    elif scores is None:
        raise ValueError("scoring='batch' needs the scores of sentences")
    log_means = F.log_softmax(scores, dim=-1).logsumexp(dim=0) - math.log(len(scores))
    model.bias.copy_(-log_means)
