"""How an explanation looks: colored words on a terminal, a table elsewhere, a page.

Blue is toward the label and orange against it, a pair that people with any color vision tell apart.
A color is as deep as the value's share of the largest in its sentence, which stands beside the
method. `picture.py` draws the same.
"""

import html
import unicodedata
from dataclasses import dataclass
from string import Template

from cli import on_one_line as printable
from utils import atomic_write

SAMPLES = (("toward the label", 1.0), ("against it", -1.0), ("not read", None))


@dataclass(frozen=True)
class Explanation:
    """What a classifier says of a sentence, and what each word adds to log p(label | sentence)."""

    predicted: str
    probability: float
    label: str  # the one that is explained
    label_probability: float
    gold: str | None
    words: list[str]
    values: dict[str, list[float | None]]  # by method, in nats; None: the model never read the word

    @property
    def heading(self) -> str:
        """good 0.519 (gold: average); what speaks for average 0.480"""
        gold = f" (gold: {printable(self.gold)})" if self.gold not in (None, self.predicted) else ""
        other = f"; what speaks for {printable(self.label)} {self.label_probability:.3f}"
        other = other if self.label != self.predicted else ""
        return f"{printable(self.predicted)} {self.probability:.3f}{gold}{other}"


def shares(values: list[float | None]) -> list[float | None]:
    """Each value's share of the largest, from -1 to 1; None stays None."""
    whole = _largest(values) or 1.0
    return [None if value is None else value / whole for value in values]


def scaled(method: str, values: list[float | None]) -> str:
    """The method, and what its deepest color stands for."""
    return f"{method}, deepest color {_largest(values):.3g}"


def _largest(values: list[float | None]) -> float:
    return max((abs(value) for value in values if value is not None), default=0.0)


def signed(value: float | None) -> str:
    """Three digits behind the point; - for what was not read."""
    if value is None:
        return "-"
    return f"{value:+.3f}" if round(value, 3) else "0.000"


# ---------------------------------------------------------------- text

# Of the 256 colors of a terminal, pale to deep; black is legible on each.
_TOWARD, _AGAINST = (153, 117, 75, 33), (223, 222, 215, 208)


def table(explanation: Explanation) -> str:
    """The heading, then a word a line with its value by each method, in columns."""
    rows = [["word", *explanation.values]]
    columns = zip(*explanation.values.values(), strict=True)
    for word, values in zip(explanation.words, columns, strict=True):
        rows.append([printable(word), *map(signed, values)])
    width = max(_columns(row[0]) for row in rows)
    widths = [len(method) for method in explanation.values]
    lines = [explanation.heading]
    for word, *cells in rows:
        padded = [f"{cell:>{n}}" for cell, n in zip(cells, widths, strict=True)]
        lines.append("  ".join([word + " " * (width - _columns(word)), *padded]))
    return "\n".join(lines)


def _columns(text: str) -> int:
    """How many columns of a terminal a text takes."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.combining(c) > 0 for c in text)


def colored(explanation: Explanation) -> str:
    """The heading, then for each method the sentence in ANSI colors."""
    lines = [explanation.heading]
    for method, values in explanation.values.items():
        words = [
            _ansi(printable(word), share)
            for word, share in zip(explanation.words, shares(values), strict=True)
        ]
        lines += [f"  {scaled(method, values)}:", f"  {' '.join(words)}"]
    return "\n".join(lines)


def colored_legend() -> str:
    return "  ".join(_ansi(f" {text} ", share) for text, share in SAMPLES)


def _ansi(text: str, share: float | None) -> str:
    if share is None:
        return f"\033[2;9m{text}\033[0m"  # faint, struck through
    depth = round(abs(share) * len(_TOWARD))
    if not depth:
        return text
    background = (_TOWARD if share > 0 else _AGAINST)[depth - 1]
    return f"\033[38;5;16;48;5;{background}m{text}\033[0m"


# ---------------------------------------------------------------- a page

_BLUE, _ORANGE = (0, 114, 178), (230, 159, 0)  # Okabe and Ito's
_DEEPEST = 0.65  # opacity, at which black text on white and white on black stay legible


def color(share: float) -> tuple[int, int, int, float]:
    """Red, green, blue in 0..255 and opacity in 0..1 behind a word."""
    return (*(_BLUE if share > 0 else _ORANGE), _DEEPEST * abs(share))


_PAGE = Template("""\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; }
body { max-width: 46rem; margin: 2rem auto; padding: 0 1rem; font: 1rem/1.5 sans-serif; }
h1 { font-size: 1.4rem; }
h2 { font-size: 1.1rem; margin: 2.5rem 0 0.5rem; }
h3 { font-size: 0.85rem; font-weight: normal; margin: 0.8rem 0 0; opacity: 0.75; }
p { margin: 0; line-height: 2; overflow-wrap: anywhere; }
span { padding: 0.15em 0.25em; border-radius: 0.25em; }
s { opacity: 0.55; }
summary { margin-top: 0.8rem; font-size: 0.85rem; }
th, td { padding: 0 1rem 0 0; text-align: right; font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; overflow-wrap: anywhere; }
</style>
<h1>$title</h1>
<p>$legend</p>
<p>The value of a word, in nats, shows when the pointer rests on it.</p>
$sections
</html>
""")


def write_page(path: str, explanations: list[Explanation], title: str) -> None:
    text = page(explanations, title)
    with atomic_write(path) as file:
        file.write(text)


def page(explanations: list[Explanation], title: str) -> str:
    """HTML that loads nothing and runs nothing, for light and dark."""
    legend = " ".join(_marked(text, share, "") for text, share in SAMPLES)
    sections = "\n".join(map(_section, explanations))
    return _PAGE.substitute(title=_text(title), legend=legend, sections=sections)


def _section(explanation: Explanation) -> str:
    lines = ["<section>", f"<h2>{_text(explanation.heading)}</h2>"]
    for method, values in explanation.values.items():
        words = [
            _marked(word, share, signed(value))
            for word, share, value in zip(explanation.words, shares(values), values, strict=True)
        ]
        lines.append(f"<h3>{_text(scaled(method, values))}</h3>")
        lines.append(f'<p dir="auto">{" ".join(words)}</p>')
    head = "".join(f"<th>{_text(cell)}</th>" for cell in ("word", *explanation.values))
    lines += ["<details><summary>in numbers</summary>", f"<table><tr>{head}</tr>"]
    columns = zip(*explanation.values.values(), strict=True)
    for word, values in zip(explanation.words, columns, strict=True):
        cells = "".join(f"<td>{_text(cell)}</td>" for cell in (word, *map(signed, values)))
        lines.append(f"<tr>{cells}</tr>")
    return "\n".join([*lines, "</table></details>", "</section>"])


def _text(text: str) -> str:
    return html.escape(printable(text))


def _marked(word: str, share: float | None, value: str) -> str:
    title = f' title="{value}"' if value else ""
    if share is None:
        return f"<s{title}>{_text(word)}</s>"
    red, green, blue, opacity = color(share)
    background = f"rgba({red}, {green}, {blue}, {opacity:.2f})"
    return f'<span{title} style="background: {background}">{_text(word)}</span>'
