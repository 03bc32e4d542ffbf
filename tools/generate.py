"""A prefix continued: one text or several, as they are made."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from llama import Llama
from tokenizer import Tokenizer
from tools.sampling import pick_next

AT_ONCE = 64  # samples of a pass, so that their caches do not outgrow the memory


def continue_text(
    llama: Llama,
    tokenizer: Tokenizer,
    prefix: str,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    num_samples: int = 1,
    stop_at_eos: bool = False,
    on_text: Callable[[str], None] | None = None,
) -> list[str]:
    """`num_samples` texts, each the prefix and up to `max_new_tokens` tokens more.

    With `stop_at_eos` a text ends before its first eos, or bos: llama2.c's models were trained on
    stories with a bos between them, so that is how they end one. `on_text` gets the first text in
    pieces, the prefix first.
    """
    start = tokenizer.encode(prefix, bos=True, eos=False)
    idx = torch.tensor([start], device=llama.norm.weight.device)  # (1, T)
    pick = partial(pick_next, temperature=temperature, top_k=top_k, top_p=top_p)
    ends = {tokenizer.eos_id, tokenizer.bos_id} if stop_at_eos else set()
    stream = _Stream(tokenizer, on_text)
    stream.show(start)
    texts: list[list[int]] = []
    while len(texts) < num_samples:
        n = min(AT_ONCE, num_samples - len(texts))
        tokens = llama.next_tokens(idx, max_new_tokens, pick, n)
        texts += _collected(start, tokens, n, ends, stream if not texts else None)
    stream.show(texts[0], is_whole=True)
    return [tokenizer.decode(ids) for ids in texts]


def _collected(
    start: list[int],
    steps: Iterator[torch.Tensor],
    n: int,
    ends: set[int],
    stream: "_Stream | None",
) -> list[list[int]]:
    """n lists of tokens from `start` on, each to its end, if it comes to one."""
    texts, ended = [list(start) for _ in range(n)], [False] * n
    for tokens in steps:
        for row, token in enumerate(tokens.flatten().tolist()):
            ended[row] = ended[row] or token in ends
            if not ended[row]:
                texts[row].append(token)
        if stream is not None:
            stream.show(texts[0])
        if all(ended):
            break
    return texts


class _Stream:
    """Hands on what a growing list of tokens adds to a text.

    A letter may be spelled by several tokens, one a byte: until the last of them is there the text
    ends in U+FFFD, which is held back.
    """

    def __init__(self, tokenizer: Tokenizer, on_text: Callable[[str], None] | None):
        self.tokenizer = tokenizer
        self.on_text = on_text
        self.shown = 0

    def show(self, ids: list[int], is_whole: bool = False) -> None:
        if self.on_text is None:
            return
        text = self.tokenizer.decode(ids)
        fit = text if is_whole else text.rstrip("\ufffd")
        if len(fit) > self.shown:
            self.on_text(fit[self.shown :])
            self.shown = len(fit)
