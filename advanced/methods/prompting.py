"""Zero-shot classification by prompts (`templates.py`), and finetuning through the same prompts.

The score of a label is log sum_v p(v | prompt) over its strings v, with p by the chain rule over
tokens. A model prefers some strings whatever the sentence, so a `bias` is added before scores are
normalized: minus the log of a label's mean probability

- "contextual": given "N/A", "" and "[MASK]" as the sentence (Zhao et al. 2021, arXiv 2102.09690:
  W = diag(p_cf)^-1, b = 0; here in log space, without their second softmax);
- "pmi": given the template without a sentence (Holtzman et al. 2021, arXiv 2104.08315: domain
  conditional PMI, here of the sum over a label's strings);
- "batch": given sentences without their labels (Zhou et al. 2024, arXiv 2309.17249), here those of
  the train split, so that a prediction does not depend on other test sentences. It moves
  predictions toward balanced labels.

Prompt-based finetuning (Gao et al. 2021, LM-BFF, arXiv 2012.15723, eq. 1) trains the Llama on the
same log-probabilities, without a new head. In the paper the label fills a mask anywhere in the
text; here it comes last, where a causal model has read the sentence.
"""

from types import SimpleNamespace

import torch
import torch.nn.functional as F

from classifier import LlamaZeroShotClassifier
from llama import Llama
from tokenizer import Tokenizer
from training.dataset import Example, SentenceDataset, encode_examples
from training.evaluation import predict_probs
from training.templates import Template, render
from utils import InputError

SCORINGS = ("plain", "contextual", "pmi", "batch")
CONTENT_FREE = {"contextual": ("N/A", "", "[MASK]"), "pmi": ("",)}


def encode_prompts(
    rows: list[tuple[str, int]],
    tokenizer: Tokenizer,
    template: Template,
    *,
    max_tokens: int,
    max_sentence_len: int | None = None,
) -> tuple[list[Example], int]:
    """Return (examples of the rendered sentences, the number of truncated ones).

    A sentence that is too long loses its end; the template stays whole. `max_tokens` should be
    max_seq_len - `classifier.label_room`, to leave room for the label.
    """
    before = tokenizer.encode(template.before, bos=True, eos=False)
    examples, n_truncated = encode_examples(
        rows,
        tokenizer,
        max_tokens=max_tokens - len(before) + 1,
        max_sentence_len=max_sentence_len,
        suffix=template.after or None,
    )
    examples = [e._replace(tokens=before + e.tokens[1:]) for e in examples]  # without a second bos
    return examples, n_truncated


class PromptClassifier(LlamaZeroShotClassifier):
    """(B, T), (B,) -> (B, n_labels): log-probabilities of labels with one or more strings.

    `labels` are those of a `Template`. All strings of one token share one pass; every other
    beginning of a string costs another. The Llama must be causal.
    """

    def __init__(
        self,
        llama: Llama,
        tokenizer: Tokenizer,
        labels: tuple[tuple[str, ...], ...],
        trainable: bool = True,
    ):
        if llama.config.attention != "causal":
            raise InputError(
                f"attention={llama.config.attention!r} cannot prompt, because each token would see "
                "the next; choose --attention causal"
            )
        strings = [string for group in labels for string in group]
        config = SimpleNamespace(num_labels=len(strings), pooling="last")
        super().__init__(config, tokenizer, strings, llama)
        self.tokenizer = tokenizer
        self.num_labels = len(labels)
        self.group_sizes = [len(group) for group in labels]
        self.llama.requires_grad_(trainable)
        self.register_buffer("bias", torch.zeros(len(labels), device=llama.norm.weight.device))

    def scores(self, input_ids: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """Return log sum_v p(v | prompt) over each label's strings v, (B, n_labels)."""
        of_strings = super().forward(input_ids, lengths).split(self.group_sizes, dim=1)
        return torch.stack([group.logsumexp(dim=1) for group in of_strings], dim=1)

    def forward(self, input_ids: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        return F.log_softmax(self.scores(input_ids, lengths) + self.bias, dim=-1)


def unbiased_probs(
    model: PromptClassifier, examples: list[Example], batch_size: int, bf16: bool = False
) -> torch.Tensor:
    """Set the bias to zero and return the label probabilities (N, n_labels), on the CPU."""
    model.bias.zero_()
    data = SentenceDataset(examples, model.tokenizer.pad_id)
    return predict_probs(model, data, batch_size, model.bias.device, bf16)


def calibrate(
    model: PromptClassifier,
    scoring: str,
    template: Template,
    probs: torch.Tensor,
    bf16: bool = False,
) -> None:
    """Set the model's bias by one of SCORINGS: minus the log of each label's mean probability.

    `probs` (N, n_labels) are the unbiased probabilities of the sentences that "batch" reads.
    """
    if scoring in CONTENT_FREE:
        texts = [render(template, text) for text in CONTENT_FREE[scoring]]
        encode = model.tokenizer.encode
        examples = [Example(text, 0, encode(text, bos=True, eos=False)) for text in texts]
        probs = unbiased_probs(model, examples, len(examples), bf16)
    if scoring == "plain":
        model.bias.zero_()
    else:
        model.bias.copy_(-probs.mean(dim=0).clamp_min(torch.finfo(probs.dtype).tiny).log())
