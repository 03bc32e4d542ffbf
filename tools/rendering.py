"""Show explanations as a table for terminals and as a self-contained HTML page.

Words for the label are blue and words against it orange, colors that people with any color vision
distinguish. A color is as deep as the value's share of the largest value in its sentence.
"""

import html
import unicodedata
from dataclasses import dataclass
from string import Template

from utils import on_one_line


@dataclass(frozen=True)
class Explanation:
    """A prediction for a sentence, and each word's contribution to log p(label | sentence)."""

    predicted: str
    probability: float
    label: str  # the label that the values explain
    label_probability: float
    gold: str | None
    words: list[str]
    values: dict[str, list[float | None]]  # in nats by method; None if the model read no token

    @property
    def heading(self) -> str:
        """good 0.519 (gold: average); the words for average 0.480"""
        gold = f" (gold: {self.gold})" if self.gold not in (None, self.predicted) else ""
        other = f"; the words for {self.label} {self.label_probability:.3f}"
        other = other if self.label != self.predicted else ""
        return on_one_line(f"{self.predicted} {self.probability:.3f}{gold}{other}")


def shares(values: list[float | None]) -> list[float]:
    """Divide each value by the largest absolute value: -1 to 1, and 0 for None."""
    largest = max((abs(value) for value in values if value is not None), default=0.0) or 1.0
    return [0.0 if value is None else value / largest for value in values]


def signed(value: float | None) -> str:
    """Return +0.123, or "-" for a word that the model did not read."""
    if value is None:
        return "-"
    return f"{value:+.3f}" if round(value, 3) else "0.000"


# ---------------------------------------------------------------- a table

# Of a terminal's 256 colors, pale to deep; black text is legible on each.
_FOR, _AGAINST = (153, 117, 75, 33), (223, 222, 215, 208)


def table(explanation: Explanation, is_colored: bool = False) -> str:
    """Return the heading and a line for each word with its value by each method."""
    words = ["word", *map(on_one_line, explanation.words)]
    width = max(map(_columns, words))
    lines = [word + " " * (width - _columns(word)) for word in words]
    for method, values in explanation.values.items():
        cells = [method, *(signed(value).rjust(len(method)) for value in values)]
        if is_colored:
            cells[1:] = map(_colored, cells[1:], shares(values))
        lines = [f"{line}  {cell}" for line, cell in zip(lines, cells, strict=True)]
    return "\n".join([explanation.heading, *lines])


def _columns(text: str) -> int:
    """Return the number of terminal columns of a text."""
    n_wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + n_wide - sum(unicodedata.combining(c) > 0 for c in text)


def _colored(text: str, share: float) -> str:
    depth = round(abs(share) * len(_FOR))
    if not depth:
        return text
    background = (_FOR if share > 0 else _AGAINST)[depth - 1]
    return f"\033[38;5;16;48;5;{background}m{text}\033[0m"


# ---------------------------------------------------------------- a page

_BLUE, _ORANGE = "0, 114, 178", "230, 159, 0"  # Okabe and Ito's
_DEEPEST = 0.65  # opacity that leaves black text on white, and white on black, legible

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
</style>
<h1>$title</h1>
<p>$legend Point at a word to see its value in nats.</p>
$sections
</html>
""")


def page(explanations: list[Explanation], title: str) -> str:
    """Return HTML that loads nothing and runs nothing, for light and dark screens."""
    legend = _marked("for the label", 1.0, "") + " " + _marked("against it", -1.0, "")
    sections = "\n".join(map(_section, explanations))
    return _PAGE.substitute(title=_text(title), legend=legend, sections=sections)


def _section(explanation: Explanation) -> str:
    lines = ["<section>", f"<h2>{_text(explanation.heading)}</h2>"]
    for method, values in explanation.values.items():
        rows = zip(explanation.words, shares(values), map(signed, values), strict=True)
        words = " ".join(_marked(*row) for row in rows)
        lines += [f"<h3>{_text(method)}</h3>", f'<p dir="auto">{words}</p>']
    return "\n".join([*lines, "</section>"])


def _marked(word: str, share: float, value: str) -> str:
    color = f"rgba({_BLUE if share > 0 else _ORANGE}, {_DEEPEST * abs(share):.2f})"
    return f'<span title="{value}" style="background: {color}">{_text(word)}</span>'


def _text(text: str) -> str:
    return html.escape(on_one_line(text))
