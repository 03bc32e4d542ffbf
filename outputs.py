"""What the output files of a submission hold: every line of their split, in its order, labelled."""

from collections.abc import Iterator, Mapping
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

from training.labelled import decode, parse_label_names, parse_line, read_sentences

DATA = Path(__file__).resolve().parent / "data"  # where a zip brings no splits with it

OUTPUTS = tuple(
    f"{data}-{split}-{option}-output.txt"
    for data in ("sst", "cfimdb")
    for split in ("dev", "test")
    for option in ("prompting", "finetuning")
)
PAIRS = tuple(
    (f"{data}-dev-advanced-output.txt", f"{data}-test-advanced-output.txt")
    for data in ("sst", "cfimdb")
)
GENERATED = ("generated-sentence-temp-0.txt", "generated-sentence-temp-1.txt")
SPLITS = tuple(
    f"data/{data}-{split}.txt" for data in ("sst", "cfimdb") for split in ("dev", "test")
)
MAPPINGS = ("data/sst-label-mapping.json", "data/cfimdb-label-mapping.json")
TEXTS = frozenset({*OUTPUTS, *PAIRS[0], *PAIRS[1], *GENERATED, *MAPPINGS})

# Bounds on what is read: the largest split has 465,946 bytes, the longest 2,210 lines.
MAX_TEXT = 2**20
MAX_LINES = 10_000

_OPTIONS = {"prompting": "prompt", "finetuning": "finetune"}


class References(NamedTuple):
    """The truth that outputs are compared with, as far as it is there."""

    sentences: dict[str, list[str]]  # by a name of SPLITS
    n_labels: dict[str, int]  # by a name of MAPPINGS
    problems: list[str]  # what is wrong with the truth

    def note(self) -> str | None:
        """What cannot be checked, in one line."""
        broken = {problem.partition(":")[0] for problem in self.problems}
        absent = [name for name in SPLITS if name not in self.sentences and name not in broken]
        parts = [f"sentences, for want of {', '.join(absent)}"] if absent else []
        absent = [name for name in MAPPINGS if name not in self.n_labels and name not in broken]
        parts += [f"the largest label, for want of {', '.join(absent)}"] if absent else []
        return f"note: not checked: {'; '.join(parts)}" if parts else None


def find_references(contents: Mapping[str, bytes], splits: Mapping[str, Path]) -> References:
    """Splits from the files `splits`, mappings from `contents`; what is in neither, from DATA."""
    found = References({}, {}, [])
    for name in (*SPLITS, *MAPPINGS):
        path = splits.get(name, DATA / Path(name).name)
        try:
            if name in contents:
                found.n_labels[name] = len(parse_label_names(contents[name], name))
            elif path.is_file():
                if path.stat().st_size > MAX_TEXT:
                    raise ValueError(f"{path}: larger than {MAX_TEXT:,} bytes; download it again")
                if name in MAPPINGS:
                    found.n_labels[name] = len(parse_label_names(path.read_bytes(), name))
                else:
                    rows = read_sentences(path, unlabelled=True)
                    found.sentences[name] = [sentence for sentence, _ in rows]
        except ValueError as error:
            found.problems.append(str(error).replace(str(path), name))
    return found


def is_blank(content: bytes) -> bool:
    """Whether a reader would call it empty: white space alone, or not even that."""
    return not content.decode("utf-8", "replace").removeprefix("\ufeff").strip()


def output_problems(contents: Mapping[str, bytes], references: References) -> Iterator[str]:
    """One violation at most of each output file in `contents`, whose blank files are passed over
    here; those are empty, which is for the caller to say."""
    yield from references.problems
    for name in sorted(TEXTS & contents.keys() - set(MAPPINGS)):
        if is_blank(contents[name]):
            continue
        try:
            if name in GENERATED:
                decode(contents[name], name)
            else:
                _require_predictions(name, contents[name], references)
        except ValueError as error:
            yield str(error)


def _require_predictions(name: str, content: bytes, references: References) -> None:
    data, split, option, _ = name.split("-")
    own, mapping = f"data/{data}-{split}.txt", f"data/{data}-label-mapping.json"
    remedy = f"write it again: {_command(data, option)}"
    try:
        rows = _parse(name, content)
    except ValueError as error:
        raise ValueError(f"{error}; {remedy}") from error
    _require_sentences(name, own, [sentence for sentence, _ in rows], references.sentences, remedy)
    n_labels = references.n_labels.get(mapping)
    for number, (_, label) in enumerate(rows, start=1):
        if label < 0 or (n_labels is not None and label >= n_labels):
            known = "0, 1, 2, ..." if n_labels is None else f"0 to {n_labels - 1} by {mapping}"
            raise ValueError(
                f"{name}:{number}: label {label} does not exist; labels are {known}; {remedy}"
            )


def _command(data: str, option: str) -> str:
    """What writes the outputs of both splits."""
    files = [f"--{split} data/{data}-{split}.txt" for split in ("train", "dev", "test")]
    files.append(f"--label-names data/{data}-label-mapping.json")
    files += [f"--{split}_out {data}-{split}-{option}-output.txt" for split in ("dev", "test")]
    script = "python -m advanced.run"
    if option in _OPTIONS:
        script = f"run_llama.py --option {_OPTIONS[option]}"
    return " ".join([script, *files])


def _parse(name: str, content: bytes) -> list[tuple[str, int]]:
    lines = decode(content, name).removesuffix("\n").split("\n")
    if len(lines) > MAX_LINES:
        raise ValueError(
            f"{name}: {len(lines):,} lines, where no split has more than {MAX_LINES:,}"
        )
    places = (f"{name}:{number}" for number in range(1, len(lines) + 1))
    return [
        parse_line(line, place, n_labels=None, unlabelled=True)  # -1 has a message of its own
        for line, place in zip(lines, places, strict=True)
    ]


def _require_sentences(
    name: str, own: str, sentences: list[str], splits: Mapping[str, list[str]], remedy: str
) -> None:
    holds = [split for split, expected in splits.items() if sentences == expected]
    if own in holds or (own not in splits and not holds):
        return
    if holds:
        raise ValueError(f"{name}: holds the sentences of {holds[0]}, not of {own}; {remedy}")
    expected = splits[own]
    shorter = min(len(sentences), len(expected))
    at = next((i for i in range(shorter) if sentences[i] != expected[i]), shorter)
    if at < shorter:
        ours, theirs = sentences[at], expected[at]
        pairs = zip(ours, theirs, strict=False)
        common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        start = max(0, common - 15)
        what = f"{_short(ours, start)} stands where {own} has {_short(theirs, start)}"
    elif len(expected) > at:
        what = f"the file ends where {own} has {_short(expected[at])}"
    else:
        what = f"{_short(sentences[at])} stands where {own} has ended"
    lines = f"{len(sentences):,} lines, {own} has {len(expected):,}"
    raise ValueError(f"{name}:{at + 1}: {what} ({lines}); {remedy}")


def _short(text: str, start: int = 0) -> str:
    """The text from `start` on, quoted and short, with dots where something is left out."""
    end = "..." if len(text) > start + 40 else ""
    return repr(("..." if start else "") + text[start : start + 40] + end)
