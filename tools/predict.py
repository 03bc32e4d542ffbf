"""What a finetuned checkpoint says of sentences: read as a stream, answered in its order.

Memory does not grow with the number of lines. What is read at a time is what one read finds, so a
file comes by the hundred lines and a typist gets each answer at once.
"""

import contextlib
import csv
import io
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import cli
from tokenizer import Tokenizer, open_tokenizer
from training.dataset import SentenceDataset, encode_examples
from training.labelled import (
    NO_GOLD_LABEL,
    PLACEHOLDER_SIZE,
    SEPARATOR,
    are_placeholders,
    decode,
    parse_line,
)
from training.loop import (
    LlamaEmbeddingClassifier,
    load_classifier,
    log_probs_of,
    macro_f1,
)

READ_SIZE = 2**16
LONGEST_LINE = 2**20
BATCHES_AT_ONCE = 32  # enough to sort by length
CPU = torch.device("cpu")
_IS_LABELLED = re.compile(rf"\s*-?[0-9]{{1,9}}{re.escape(SEPARATOR)}")


class Line(NamedTuple):
    number: int  # in its file, from 1
    sentence: str
    gold: int | None  # None where the file has no labels, NO_GOLD_LABEL where a label is not known


class Prediction(NamedTuple):
    line: Line
    probs: list[float]  # by label

    @property
    def label(self) -> int:
        return max(range(len(self.probs)), key=self.probs.__getitem__)


@dataclass(frozen=True)
class Predictor:
    """A finetuned classifier in eval mode, with all that it needs to read a sentence."""

    model: LlamaEmbeddingClassifier
    tokenizer: Tokenizer
    label_names: list[str]
    max_sentence_len: int | None  # what finetuning cut its sentences at, in tokens
    device: torch.device

    def encode(self, sentences: list[str]) -> tuple[SentenceDataset, int]:
        """The tokens as finetuning saw them, and how many sentences the model's positions cut."""
        examples, n_cut = encode_examples(
            [(sentence, NO_GOLD_LABEL) for sentence in sentences],
            self.tokenizer,
            max_tokens=self.model.llama.config.max_seq_len,
            max_sentence_len=self.max_sentence_len,
        )
        return SentenceDataset(examples, self.tokenizer.pad_id), n_cut

    @torch.inference_mode()
    def probs(self, data: SentenceDataset, batch_size: int) -> torch.Tensor:
        """(N, n_labels) in the order of `data`.

        Batches are of similar lengths where the model masks its padding. With pooling "position" it
        reads it, so there a batch is what stands together in the data, as in the assignment.
        """
        order = list(range(len(data)))
        if self.model.reads_lengths:
            order.sort(key=lambda i: len(data[i].tokens))
        probs = torch.empty(len(data), len(self.label_names))
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = data.collate_fn([data[i] for i in chosen])
            probs[chosen] = log_probs_of(self.model, batch, self.device).float().exp().cpu()
        return probs


def load_predictor(
    checkpoint: str | os.PathLike,
    tokenizer_path: str | os.PathLike | None = None,
    device: torch.device = CPU,
) -> Predictor:
    """Reads what finetuning wrote; `tokenizer_path` is for a tokenizer that was moved.

    Raises ValueError, naming the file, where the tokenizer is gone or is another one.
    """
    model, saved = load_classifier(checkpoint)
    tokenizer = open_tokenizer(checkpoint, saved, tokenizer_path)
    tokenizer.require_vocab_size(model.llama.config.vocab_size)
    names = saved.get("label_names") or [str(label) for label in range(model.num_labels)]
    if len(set(names)) != model.num_labels or len(names) != model.num_labels:
        raise ValueError(
            f"{checkpoint}: has {len(names)} label names, of which {len(set(names))} differ, for "
            f"{model.num_labels} labels"
        )
    max_sentence_len = saved.get("max_sentence_len")
    if not (max_sentence_len is None or (type(max_sentence_len) is int and max_sentence_len > 0)):
        raise ValueError(f"{checkpoint}: max_sentence_len is no positive number of tokens")
    return Predictor(model.to(device), tokenizer, names, max_sentence_len, device)


# ---------------------------------------------------------------- reading


@contextlib.contextmanager
def open_lines(
    sentences: list[str], path: str | None, n_labels: int, batch_size: int | None
) -> Iterator[Iterable[list[Line]]]:
    """Blocks of the lines that are to be answered: the sentences, or those of a file, or of
    standard input where neither is given, or the file is "-".

    With `batch_size` in whole batches, as `in_whole_batches` says, but those of a typist.
    """
    with contextlib.ExitStack() as stack:
        if sentences:
            argv = b"\n".join(b" ".join(os.fsencode(s).splitlines()) for s in sentences)
            blocks = read_blocks(io.BytesIO(argv), "sentence", n_labels)
        elif path in (None, "-"):
            file = cli.standard_input()
            if is_typed(sentences, path):
                print("one sentence a line; Ctrl-D ends", file=sys.stderr)
                batch_size = None
            blocks = read_blocks(file, "standard input", n_labels, _has_placeholders(file))
        else:
            file = stack.enter_context(open(path, "rb"))
            blocks = read_blocks(file, path, n_labels, _has_placeholders(file))
        yield blocks if batch_size is None else in_whole_batches(blocks, batch_size)


def _has_placeholders(file: BinaryIO) -> bool:
    """Whether its labels are known to be none. A pipe cannot be looked at twice: it is believed."""
    if not file.seekable():
        return False
    start = file.tell()
    content = file.read(PLACEHOLDER_SIZE + 1)
    file.seek(start)
    return are_placeholders(content)


def is_typed(sentences: list[str], path: str | None) -> bool:
    """Whether lines come from a keyboard."""
    return not sentences and path in (None, "-") and sys.stdin is not None and sys.stdin.isatty()


def read_blocks(
    file: BinaryIO, name: str, n_labels: int, has_placeholders: bool = False
) -> Iterator[list[Line]]:
    """The lines but blank ones, as many at a time as one read finds.

    A file is labelled if its first line reads `label ||| sentence`; then all its lines must, and
    else none may. Labels that are placeholders, as those of the published cfimdb-test.txt, are not
    known. Raises ValueError naming file, line and value.
    """
    is_labelled = None
    for numbered in _numbered_lines(file, name):
        block = []
        for number, text in numbered:
            if not text.strip():
                continue
            has_label = _IS_LABELLED.match(f"{text} ") is not None  # see `parse_line` for the space
            if is_labelled is None:
                is_labelled = has_label
            place = f"{name}:{number}"
            if has_label and not is_labelled:
                raise ValueError(
                    f"{place}: reads 'label{SEPARATOR}sentence' and the first line does not; label "
                    "every line or none"
                )
            sentence, gold = text.strip(), None
            if is_labelled:
                by = "the checkpoint"
                sentence, gold = parse_line(text, place, n_labels, unlabelled=True, by=by)
                gold = NO_GOLD_LABEL if has_placeholders else gold
            block.append(Line(number, sentence, gold))
        if block:
            yield block


def _numbered_lines(file: BinaryIO, name: str) -> Iterator[Iterator[tuple[int, str]]]:
    first, rest = 1, b""
    while block := file.read1(READ_SIZE):
        whole, newline, rest = (rest + block).rpartition(b"\n")
        if newline:
            *lines, _ = decode(whole + newline, name, first).split("\n")
            yield enumerate(lines, first)
            first += len(lines)
        if len(rest) > LONGEST_LINE:
            raise ValueError(
                f"{name}:{first}: is longer than {LONGEST_LINE:,} bytes; write one sentence a line"
            )
    if rest:
        yield enumerate(decode(rest, name, first).split("\n"), first)


def in_whole_batches(blocks: Iterable[list[Line]], batch_size: int) -> Iterator[list[Line]]:
    """The same lines in blocks of a multiple of `batch_size`, but for the last one.

    Then where a batch begins does not depend on what a read happened to find.
    """
    rest: list[Line] = []
    for block in blocks:
        rest = [*rest, *block]
        n_whole = len(rest) // batch_size * batch_size
        if n_whole:
            yield rest[:n_whole]
            rest = rest[n_whole:]
    if rest:
        yield rest


def in_pieces(blocks: Iterable[list[Line]], n: int) -> Iterator[list[Line]]:
    """The same lines in blocks of at most n, so that none has to wait long for its answer."""
    for block in blocks:
        for start in range(0, len(block), n):
            yield block[start : start + n]


# ---------------------------------------------------------------- answering


@dataclass
class Tally:
    """What is counted of a stream."""

    confusion: np.ndarray  # row: gold, column: predicted
    n_lines: int = 0
    n_cut: int = 0


def answered(
    predictor: Predictor, blocks: Iterable[list[Line]], batch_size: int, tally: Tally
) -> Iterator[list[Prediction]]:
    """The blocks with their answers, counted, in pieces of several batches."""
    for block in in_pieces(blocks, BATCHES_AT_ONCE * batch_size):
        data, n_cut = predictor.encode([line.sentence for line in block])
        probs = predictor.probs(data, batch_size).tolist()
        answers = [Prediction(line, p) for line, p in zip(block, probs, strict=True)]
        for answer in answers:
            if answer.line.gold not in (None, NO_GOLD_LABEL):
                tally.confusion[answer.line.gold, answer.label] += 1
        tally.n_lines += len(block)
        tally.n_cut += n_cut
        yield answers


def print_predictions(
    predictor: Predictor,
    blocks: Iterable[list[Line]],
    batch_size: int,
    kind: str,
    shows_bar: bool = True,
) -> None:
    """A line for each on standard output, written when its block is answered; what it comes to on
    standard error, so that `> FILE` and `|` get the predictions alone. ValueError where there is no
    sentence."""
    names = predictor.label_names
    if kind != "text" and hasattr(sys.stdout, "reconfigure"):  # for programs, whatever the locale
        sys.stdout.reconfigure(encoding="utf-8", errors="strict", newline="\n")
    tally = Tally(np.zeros((len(names), len(names)), dtype=int))
    header, as_text = formatter(kind, names)
    started = time.monotonic()
    with tqdm(unit=" sentences", disable=None if shows_bar else True, leave=False) as bar:
        for block in answered(predictor, blocks, batch_size, tally):
            with tqdm.external_write_mode(sys.stdout):
                sys.stdout.write(header + as_text(block))
                sys.stdout.flush()
            header = ""
            bar.update(len(block))
    if not tally.n_lines:
        raise ValueError("there is no sentence to predict; write one a line")
    for line in summary(tally, names, time.monotonic() - started):
        print(line, file=sys.stderr)


# ---------------------------------------------------------------- writing


def formatter(kind: str, names: list[str]) -> tuple[str, Callable[[list[Prediction]], str]]:
    """What stands before the first block, and what turns blocks into text."""
    if kind == "jsonl":
        return "", lambda block: "".join(f"{_json(p, names)}\n" for p in block)
    if kind == "csv":
        columns = ["line", "label", "probability", *(f"p({n})" for n in names), "gold", "sentence"]
        return _csv([columns]), lambda block: _csv(_cells(p, names) for p in block)
    shown = [cli.on_one_line(name) for name in names]
    return "", lambda block: "".join(f"{_text(p, shown)}\n" for p in block)


def _gold(prediction: Prediction, names: list[str]) -> str | None:
    gold = prediction.line.gold
    return None if gold in (None, NO_GOLD_LABEL) else names[gold]


def _text(prediction: Prediction, names: list[str]) -> str:
    predicted, gold = names[prediction.label], _gold(prediction, names)
    wrong = f" (gold: {gold})" if gold not in (None, predicted) else ""
    of_all = ", ".join(f"{n} {p:.3f}" for n, p in zip(names, prediction.probs, strict=True))
    sentence = cli.printable(prediction.line.sentence)
    return f"{predicted} {max(prediction.probs):.3f}{wrong} | {of_all} | {sentence}"


def _json(prediction: Prediction, names: list[str]) -> str:
    row = {
        "line": prediction.line.number,
        "label": names[prediction.label],
        "probability": round(max(prediction.probs), 6),
        "probabilities": {n: round(p, 6) for n, p in zip(names, prediction.probs, strict=True)},
    }
    if prediction.line.gold is not None:
        row["gold"] = _gold(prediction, names)
    return json.dumps({**row, "sentence": prediction.line.sentence}, ensure_ascii=False)


def _cells(prediction: Prediction, names: list[str]) -> list[str | int | float | None]:
    probs = [round(p, 6) for p in prediction.probs]
    predicted = [prediction.line.number, names[prediction.label], max(probs), *probs]
    return [*predicted, _gold(prediction, names), prediction.line.sentence]


def _csv(rows: Iterable[list[str | int | float | None]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def summary(tally: Tally, names: list[str], seconds: float) -> Iterator[str]:
    """Throughput; accuracy, macro F1 and confusion matrix of the lines with a gold label."""
    yield f"{tally.n_lines:,} sentences, {tally.n_lines / max(seconds, 1e-3):.1f} a second"
    if tally.n_cut:
        yield f"warning: {tally.n_cut:,} do not fit the model's positions and lost their end"
    confusion, n_gold = tally.confusion, int(tally.confusion.sum())
    if not n_gold:
        return
    accuracy = np.trace(confusion) / n_gold
    yield f"acc :: {accuracy:.3f} of {n_gold:,}, macro f1 :: {macro_f1(confusion):.3f}"
    names = [cli.on_one_line(name) for name in names]
    table = [["gold \\ predicted", *names]]
    table += [[name, *row] for name, row in zip(names, confusion.tolist(), strict=True)]
    widths = [max(len(str(cell)) for cell in column) for column in zip(*table, strict=True)]
    for first, *cells in table:
        padded = [f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True)]
        yield "  ".join([f"{first:<{widths[0]}}", *padded])
