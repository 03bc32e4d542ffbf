"""An explanation as a PNG: what the page of `rendering.py` shows, laid out by hand.

Needs matplotlib, which `bash setup.sh --dev` installs. Sizes are in points, of which an inch has
72; y goes down the picture.
"""

import math
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from tools.rendering import SAMPLES, Explanation, color, printable, scaled, shares, signed
from utils import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, MARGIN, LINE, GAP = 576.0, 24.0, 28.0, 6.0
TALLEST = 100 * 72.0
SIZES = {"title": 13.0, "heading": 11.0, "method": 8.5, "word": 11.0, "value": 6.5}
SPACE_ABOVE = {"title": 10.0, "heading": 30.0, "method": 19.0, "word": 20.0}
VALUE_DEPTH = 10.0  # below the letters of its word
WRITTEN = 0.25  # the least share of the largest value that is written below its word


class Piece(NamedTuple):
    """A text to be placed, with a value to be written below it, or none."""

    text: str
    share: float | None = 0.0
    value: str = ""


class Placed(NamedTuple):
    """A piece around x, its letters standing on y."""

    piece: Piece
    kind: str
    x: float
    y: float
    width: float


def write_picture(path: str, explanations: list[Explanation], title: str) -> None:
    """Letters that its font lacks are boxes; a line on standard error says so."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        figure = draw(explanations, title)
        with atomic_write(path, "wb") as file:
            figure.savefig(file, format="png", dpi=150)
    if any("missing from" in str(one.message) for one in caught):
        print(f"{path}: its font lacks some letters; a .html shows them", file=sys.stderr)


def draw(explanations: list[Explanation], title: str) -> "Figure":
    """A ValueError where it would be higher than 100 inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties

    figure = Figure(figsize=(WIDTH / 72, 1), dpi=72)  # to measure by, a pixel a point
    renderer = FigureCanvasAgg(figure).get_renderer()
    fonts = {kind: FontProperties(size=SIZES[kind], weight=_weight(kind)) for kind in SIZES}

    def width_of(text: str, kind: str) -> float:
        return renderer.get_text_width_height_descent(text, fonts[kind], ismath=False)[0]

    placed, height = lay_out(explanations, title, width_of)
    figure.set_size_inches(WIDTH / 72, height / 72)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(height, 0))
    axes.set_axis_off()
    for one in placed:
        _draw(axes, one)
    return figure


def _weight(kind: str) -> str:
    return "bold" if kind in ("title", "heading") else "normal"


def lay_out(
    explanations: list[Explanation], title: str, width_of: Callable[[str, str], float]
) -> tuple[list[Placed], float]:
    """Every piece in its place, and the height that they take."""
    placed: list[Placed] = []
    y = MARGIN
    for kind, pieces in _paragraphs(explanations, title):
        x, y = MARGIN, y + SPACE_ABOVE[kind]
        for piece in _cut(pieces, kind, width_of):
            width = max(width_of(piece.text, kind), width_of(piece.value, "value"))
            if x + width > WIDTH - MARGIN and x > MARGIN:
                x, y = MARGIN, y + LINE
            if y > TALLEST:
                raise ValueError(
                    f"a picture of {len(explanations)} sentences would be higher than "
                    f"{TALLEST / 72:.0f} inches; write a .html, or explain fewer"
                )
            placed.append(Placed(piece, kind, x + width / 2, y, width))
            x += width + GAP
        y += VALUE_DEPTH if kind == "word" else 0.0
    return placed, y + MARGIN


def _paragraphs(
    explanations: list[Explanation], title: str
) -> Iterator[tuple[str, Iterable[Piece]]]:
    """(kind, what is set in lines)."""
    yield "title", map(Piece, title.split())
    yield "word", [Piece(text, share) for text, share in SAMPLES]
    for explanation in explanations:
        yield "heading", map(Piece, explanation.heading.split())
        for method, values in explanation.values.items():
            yield "method", map(Piece, scaled(method, values).split())
            columns = zip(explanation.words, shares(values), map(signed, values), strict=True)
            yield "word", [Piece(w, s, v if abs(s or 0) >= WRITTEN else "") for w, s, v in columns]


def _cut(
    pieces: Iterable[Piece], kind: str, width_of: Callable[[str, str], float]
) -> Iterator[Piece]:
    """Those wider than a line in several; the value goes below the first."""
    for text, share, value in pieces:
        text = printable(text)
        n_parts = max(1, math.ceil(width_of(text, kind) / (WIDTH - 2 * MARGIN)))
        size = math.ceil(len(text) / n_parts)
        for start in range(0, len(text), size):
            yield Piece(text[start : start + size], share, "" if start else value)


def _draw(axes: "Axes", one: Placed) -> None:
    from matplotlib.patches import Rectangle

    text, share, value = one.piece
    ink = "#555555" if one.kind == "method" else "black"
    left, right = one.x - one.width / 2, one.x + one.width / 2
    if share:
        red, green, blue, opacity = color(share)
        face = (red / 255, green / 255, blue / 255, opacity)
        box = Rectangle((left - 2, one.y - 11), one.width + 4, 15, facecolor=face, linewidth=0)
        axes.add_patch(box)
    if share is None:
        ink = "#999999"
        axes.plot([left, right], [one.y - 4, one.y - 4], color=ink, linewidth=0.8)
    style = {"ha": "center", "parse_math": False}
    weight = _weight(one.kind)
    axes.text(one.x, one.y, text, size=SIZES[one.kind], color=ink, weight=weight, **style)
    if value:
        axes.text(one.x, one.y + VALUE_DEPTH, value, size=SIZES["value"], color="#333333", **style)
