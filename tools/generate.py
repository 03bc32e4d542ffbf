"""Continue a text with a pretrained Llama.

    python -m tools.generate "Once upon a time" --top_p 0.9 --num_samples 3
    python -m tools.generate "The film was" --temperature 0 --max_new_tokens 20
    python -m tools.generate --pretrained-model-path data/mini/model.pt - < PROMPT.txt

Standard output holds only the texts, separated by lines of hyphens. On a terminal the first text
appears token by token.
"""

import argparse
import os
import sys
from collections.abc import Callable
from functools import partial

import torch

from config import ATTENTION_MODES
from fast.decode import next_tokens
from fast.threads import choose_threads, generation_rows
from llama import Llama, load_pretrained
from tokenizer import Tokenizer, find_tokenizer_model
from tools.sampling import pick_next
from training.options import (
    PREFIX,
    fill_model,
    non_negative_float,
    non_negative_int,
    positive_int,
    seed_int,
    share,
)
from utils import (
    ArgumentParser,
    InputError,
    pick_device,
    printable,
    run_script,
    seed_everything,
)

BATCH_SIZE = 64  # samples that are generated together; it bounds the memory of the KV cache


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
    """Return `num_samples` texts: the prefix and up to `max_new_tokens` tokens.

    With `stop_at_eos` a text ends before its first eos or bos; llama2.c's models separate stories
    by a bos. `on_text` receives the first text piece by piece, the prefix first.
    """
    start = tokenizer.encode(prefix, bos=True, eos=False)
    idx = torch.tensor([start], device=llama.norm.weight.device)  # (1, T)
    pick = partial(pick_next, temperature=temperature, top_k=top_k, top_p=top_p)
    ends = {tokenizer.eos_id, tokenizer.bos_id} if stop_at_eos else set()
    n_shown = 0

    def show(ids: list[int], is_complete: bool = False) -> None:
        """Pass on the new characters. A character may take several tokens, one for each byte; until
        the last of them arrives the decoded text ends in U+FFFD, which waits."""
        nonlocal n_shown
        if on_text is None:
            return
        text = tokenizer.decode(ids)
        text = text if is_complete else text.rstrip("\ufffd")
        if len(text) > n_shown:
            on_text(text[n_shown:])
            n_shown = len(text)

    show(start)
    texts: list[list[int]] = []
    while len(texts) < num_samples:
        n = min(BATCH_SIZE, num_samples - len(texts))
        rows, unfinished = [list(start) for _ in range(n)], set(range(n))
        for tokens in next_tokens(llama, idx, max_new_tokens, pick, n):  # (n, 1)
            for row, token in enumerate(tokens.flatten().tolist()):
                if token in ends:
                    unfinished.discard(row)
                if row in unfinished:
                    rows[row].append(token)
            if not texts:
                show(rows[0])
            if not unfinished:
                break
        texts += rows
    show(texts[0], is_complete=True)
    return [tokenizer.decode(ids) for ids in texts]


def read_prefix(prefix: str) -> str:
    """Return the prefix, or standard input without its last newline if the prefix is "-"."""
    content = os.fsencode(prefix)
    if prefix == "-":
        if sys.stdin is None:
            raise InputError("standard input is closed; type the prefix, or send it by a pipe")
        content = sys.stdin.buffer.read().replace(b"\r\n", b"\n").removesuffix(b"\n")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = content[error.start]
        raise InputError(f"the prefix has byte 0x{byte:02x}, which is not UTF-8") from error


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__, prog="python -m tools.generate")
    add = parser.add_argument
    add("prefix", nargs="?", default=PREFIX, metavar="PREFIX",
        help="text to continue; - reads it from standard input (default: the assignment's "
        "prefix)")  # fmt: skip
    add("--pretrained-model-path", metavar="FILE", help="pretrained checkpoint, .pt or llama2.c's "
        ".bin (default: stories42M.pt, else data/mini/model.pt)")  # fmt: skip
    add("--tokenizer_path", metavar="FILE", help="SentencePiece model (default: the .model file "
        "beside the checkpoint, else tokenizer.model)")  # fmt: skip
    add("--attention", choices=ATTENTION_MODES, default="causal",
        help="tokens that a token reads; full: all, causal: itself and earlier ones, as language "
        "models are trained (default: %(default)s)")  # fmt: skip
    add("--max_new_tokens", type=non_negative_int, default=75, metavar="N",
        help="tokens to generate (default: %(default)s)")  # fmt: skip
    add("--temperature", type=non_negative_float, default=1.0, metavar="T",
        help="number by which the logits are divided; 0 takes the likeliest token (default: "
        "%(default)s)")  # fmt: skip
    add("--top_k", type=positive_int, metavar="K",
        help="sample from the K likeliest tokens (default: all)")  # fmt: skip
    add("--top_p", type=share, metavar="P",
        help="sample from the likeliest tokens whose probabilities sum to at least P (default: "
        "all)")  # fmt: skip
    add("--num_samples", type=positive_int, default=1, metavar="N",
        help="texts to generate (default: %(default)s)")  # fmt: skip
    add("--stop_at_eos", action="store_true",
        help="end a text at its first eos or bos (default: after --max_new_tokens)")  # fmt: skip
    add("--seed", type=seed_int, default=1337, metavar="N",
        help="seed of the random numbers (default: %(default)s)")  # fmt: skip
    add("--quantize", choices=("int8",),
        help="round the weight matrices to int8 (default: float32)")  # fmt: skip
    add("--use_gpu", action="store_true", help="use CUDA, else Apple's MPS (default: the CPU)")
    return parser.parse_args(argv)


def load(args: argparse.Namespace) -> tuple[Llama, Tokenizer]:
    """Load the model onto its device, and its tokenizer; one line on standard error names both."""
    fill_model(args)
    path = args.pretrained_model_path
    device = pick_device(args.use_gpu)
    llama = load_pretrained(path, args.attention, quantize=args.quantize, device=device)
    choose_threads(llama, generation_rows(llama, min(args.num_samples, BATCH_SIZE)))
    tokenizer = Tokenizer(tokenizer_model=args.tokenizer_path or find_tokenizer_model(path))
    tokenizer.require_vocab_size(llama.config.vocab_size)
    weights = f", {args.quantize} weights" if args.quantize else ""
    print(f"{path}: {llama.config.attention} attention{weights}, {device}", file=sys.stderr)
    return llama, tokenizer


def main(argv: list[str] | None = None) -> None:
    args = get_args(argv)
    prefix = read_prefix(args.prefix)
    seed_everything(args.seed)
    llama, tokenizer = load(args)
    n_tokens, window = len(tokenizer.encode(prefix, bos=True, eos=False)), llama.config.max_seq_len
    if n_tokens > window:
        print(
            f"warning: the prefix has {n_tokens} tokens; the model reads the last {window}",
            file=sys.stderr,
        )
    is_terminal = sys.stdout.isatty()

    def show(text: str) -> None:
        print(printable(text, kept="\n\t") if is_terminal else text, end="", flush=True)

    first, *others = continue_text(
        llama,
        tokenizer,
        prefix,
        args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        num_samples=args.num_samples,
        stop_at_eos=args.stop_at_eos,
        on_text=show if is_terminal else None,
    )
    show("\n" if is_terminal else f"{first}\n")
    for text in others:
        show(f"---------------\n{text}\n")


if __name__ == "__main__":
    run_script(main)
