"""Writes the tables of finetuning results and of speed into the READMEs, from our JSON files.

    python -m results.report [--plot]

Each table stands between the two comment lines that name it; results/README.md, with everything
that was measured, is written as a whole. --plot draws the figures too and needs matplotlib.
"""

import json
from pathlib import Path
from typing import NamedTuple

import benchmarks.report
import cli
from results import details, figures, studies
from results.details import p_value
from results.significance import Comparison
from results.studies import Study, load, mean_std, measured, select
from utils import atomic_write

FOLDER = Path(__file__).resolve().parent
READMES = ("README.md", "README.zh-TW.md", "data/mini/README.md")


class Column(NamedTuple):
    """Of accuracies; of those by which no epoch was chosen the difference from plain is shown."""

    name: str
    dataset: str
    folds: int | None
    split: str
    is_compared: bool

    def of(self, found: list[Study]) -> list[Study]:
        return select(found, dataset=self.dataset, folds=self.folds)


COLUMNS = (
    Column("SST dev", "sst", None, "dev", False),
    Column("SST test", "sst", None, "test", True),
    Column("CFIMDB dev", "cfimdb", None, "dev", False),
    Column("CFIMDB 5-fold", "cfimdb", 5, "dev", True),
)


def table(found: list[Study], model: str) -> str:
    """A row for each method of `model` on all training data; a cell is empty where not measured,
    and what no method was measured by has no column."""
    found = select(found, model=model, train_share=1.0)
    columns = [c for c in COLUMNS if any(_cell_values([study], c) for study in found)]
    head = [f"{model}, mean (std) over seeds", "trained %", *(c.name for c in columns)]
    compared = [column for column in columns if column.is_compared]
    head += [*(f"{column.name}, minus plain (p)" for column in compared), "seeds"]
    published = [_published(column) for column in columns]
    majorities = [_majority(found, column) for column in columns]
    empty = [""] * len(compared)
    lines = [
        details.line(head),
        "|---" * len(head) + "|",
        details.line(["reference, stories42M, published", "100", *published, *empty, "10"]),
        details.line([details.LARGEST, "0", *majorities, *empty, ""]),
    ]
    differences = [details.compare_with_plain(c.of(found), c.split) for c in compared]
    for method in _order(found):
        of_method = select(found, method=method)
        cells = [method, details.trained_percent(of_method)]
        cells += [mean_std(_cell_values(of_method, column)) for column in columns]
        cells += [_short_difference(by_method.get(method)) for by_method in differences]
        lines.append(details.line([*cells, _seeds(of_method)]))
    return "\n".join(lines)


def tables(found: list[Study]) -> str:
    """A table for each model, in the order of their names."""
    return "\n\n".join(table(found, model) for model in sorted({s["model"] for s in found}))


def _order(found: list[Study]) -> list[str]:
    """Methods by SST dev, those without it last."""
    ordered = studies.ranked(select(found, dataset="sst", folds=None))
    rest = studies.ranked([study for study in found if study not in ordered])
    methods = dict.fromkeys(study["method"] for study in ordered + rest if study["runs"])
    first = [method for method in studies.FIRST if method in methods]
    return list(dict.fromkeys([*first, *methods]))


def _cell_values(of_method: list[Study], column: Column) -> list[float]:
    found = column.of(of_method)
    return measured(found[0], column.split) if found else []


def _short_difference(of_plain: Comparison | None) -> str:
    return f"{of_plain.difference:+.3f} ({p_value(of_plain.p)})" if of_plain else ""


def _published(column: Column) -> str:
    known = studies.published(column.dataset, column.folds, column.split)
    return "" if known is None else f"{known[0]:.3f} ({known[1]:.3f})"


def _majority(found: list[Study], column: Column) -> str:
    share = details.majority_share(column.of(found), column.split)
    return "" if share is None else f"{share:.3f}"


def _seeds(of_method: list[Study]) -> str:
    """How many: 5, or where a column has others: 5 (CFIMDB 5-fold 2); of a soup those it kept."""
    counts = {}
    for column in COLUMNS:
        for study in column.of(of_method):
            if measured(study, column.split):
                counts[column.name] = details.seeds_of(study)
    first = next(iter(counts.values()), "")
    others = ", ".join(f"{name} {n}" for name, n in counts.items() if n != first)
    return f"{first} ({others})" if others else first


def speed_table(path: Path = FOLDER / "speed.json", shape: str = "stories42M") -> str:
    """The rows of one shape of what benchmarks.run measured."""
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    here = [row for row in rows if row["shape"] == shape]
    return benchmarks.report.table(benchmarks.report.with_limits(here))


def insert(text: str, new: str, name: str) -> str:
    """`text` with what stands between the marks replaced; unchanged where it has no marks."""
    before, begin, rest = text.partition(f"<!-- {name} begins -->")
    _, end, after = rest.partition(f"<!-- {name} ends -->")
    return f"{before}{begin}\n{new}\n{end}{after}" if end else text


def with_tables(text: str, results: str, speed: str) -> str:
    """A README's text with both tables as given."""
    return insert(insert(text, results, "results.report"), speed, "speed")


def main(argv: list[str] | None = None) -> None:
    parser = cli.ArgumentParser(prog="results.report", description=__doc__.split("\n")[0])
    parser.add_argument("--plot", action="store_true", help="draw results/*.png too")
    args = parser.parse_args(argv)
    found = load(FOLDER / "records")
    for line in (line for study in found for line in studies.unfinished(study)):
        print(line)
    if args.plot:
        for line in figures.draw_all(found, FOLDER / "figures"):
            print(line)
    results, speed = tables(found), speed_table()
    print(results, speed, sep="\n\n")
    for name in READMES:
        path = FOLDER.parent / name
        if path.exists():
            _write(path, with_tables(path.read_text(encoding="utf-8"), results, speed))
    _write(FOLDER / "README.md", details.page(found, FOLDER))


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text)


if __name__ == "__main__":
    cli.run(main)
