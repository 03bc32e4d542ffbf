"""Write the tables of finetuning results and of speed into the READMEs, and results/README.md.

    python -m results.report [--plot]

Each README table stands between two comment lines that name it. --plot draws results/figures/ too
and needs matplotlib.
"""

import json
from pathlib import Path
from typing import NamedTuple

import benchmarks.report
from results import figures, page
from results.page import MAJORITY_CLASS, markdown_table, p_value
from results.significance import Comparison
from results.studies import (
    BASELINES,
    PUBLISHED,
    Study,
    compare_with_plain,
    load,
    majority_share,
    mean_std,
    n_seeds,
    ranked,
    scores,
    select,
    trained_percent,
)
from utils import ArgumentParser, atomic_write, run_script

FOLDER = Path(__file__).resolve().parent
READMES = ("README.md", "README.zh-TW.md", "data/mini/README.md")


class Column(NamedTuple):
    """A column of accuracies. `is_compared`: its split chose no epoch, so it gets a test, too."""

    name: str
    dataset: str
    folds: int | None
    split: str
    is_compared: bool


COLUMNS = (
    Column("SST dev", "sst", None, "dev", False),
    Column("SST test", "sst", None, "test", True),
    Column("CFIMDB dev", "cfimdb", None, "dev", False),
    Column("CFIMDB 5-fold", "cfimdb", 5, "dev", True),
)


def table(studies: list[Study], model: str) -> str:
    """Return a row per method of `model` on all training data; a column nobody ran is left out."""
    studies = select(studies, model=model, train_share=1.0)
    groups: dict[Column, dict[str, Study]] = {}
    for column in COLUMNS:
        group = ranked(select(studies, dataset=column.dataset, folds=column.folds))
        groups[column] = {s["method"]: s for s in group if scores(s, column.split)}
    groups = {column: group for column, group in groups.items() if group}
    comparisons = {
        column: compare_with_plain(list(group.values()), column.split)
        for column, group in groups.items()
        if column.is_compared
    }
    empty = [""] * len(comparisons)
    published = [_published(column.name) for column in groups]
    majority = [f"{majority_share(list(g.values()), c.split):.3f}" for c, g in groups.items()]
    head = [f"{model}, mean (std) over seeds", "trained %", *(column.name for column in groups)]
    head += [*(f"{column.name}, minus plain (p)" for column in comparisons), "seeds"]
    rows = [
        ["reference, stories42M, published", "100", *published, *empty, "10"],
        [MAJORITY_CLASS, "0", *majority, *empty, ""],
    ]
    for method in _methods(groups):
        found = {column: group[method] for column, group in groups.items() if method in group}
        cells = [mean_std(scores(found[c], c.split)) if c in found else "" for c in groups]
        cells += [_difference(of_column.get(method)) for of_column in comparisons.values()]
        share = trained_percent(next(iter(found.values())))
        rows.append([method, share, *cells, _seeds_cell(found)])
    return markdown_table(head, rows)


def tables(studies: list[Study]) -> str:
    """Return a table per model, in the order of their names."""
    return "\n\n".join(table(studies, model) for model in sorted({s["model"] for s in studies}))


def _methods(groups: dict[Column, dict[str, Study]]) -> list[str]:
    """Return the methods in row order: baselines, then by SST dev, then those without SST dev."""
    methods = dict.fromkeys(method for group in groups.values() for method in group)
    place = {method: i for i, method in enumerate(BASELINES)}
    return sorted(methods, key=lambda method: place.get(method, len(BASELINES)))


def _published(name: str) -> str:
    return "{:.3f} ({:.3f})".format(*PUBLISHED[name]) if name in PUBLISHED else ""


def _seeds_cell(found: dict[Column, Study]) -> str:
    """Return "5", or "5 (CFIMDB 5-fold 2)" if a later column has another number of seeds."""
    counts = {column.name: n_seeds(study) for column, study in found.items()}
    first = next(iter(counts.values()))
    others = ", ".join(f"{name} {n}" for name, n in counts.items() if n != first)
    return f"{first} ({others})" if others else first


def _difference(comparison: Comparison | None) -> str:
    return f"{comparison.difference:+.3f} ({p_value(comparison.p)})" if comparison else ""


def speed_table(path: Path = FOLDER / "speed.json", shape: str = "stories42M") -> str:
    """Return the rows of one shape that `python -m benchmarks.run` measured."""
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    rows_of_shape = [row for row in rows if row["shape"] == shape]
    return benchmarks.report.table(benchmarks.report.with_limits(rows_of_shape))


def with_tables(text: str, results: str, speed: str) -> str:
    """Replace what stands between the marks of each table; without marks `text` is unchanged."""
    for name, table in (("results.report", results), ("speed", speed)):
        begin, end = f"<!-- {name} begins -->", f"<!-- {name} ends -->"
        if begin in text and end in text:
            before, after = text.split(begin)[0], text.split(end)[1]
            text = f"{before}{begin}\n{table}\n{end}{after}"
    return text


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(prog="results.report", description=__doc__.split("\n")[0])
    parser.add_argument("--plot", action="store_true", help="draw results/figures/ too")
    args = parser.parse_args(argv)
    studies = load(FOLDER / "records")
    if args.plot:
        figures.draw_all(studies, FOLDER / "figures")
    results, speed = tables(studies), speed_table()
    print(results, speed, sep="\n\n")
    texts = {FOLDER / "README.md": page.page(studies)}
    for path in (FOLDER.parent / name for name in READMES):
        texts[path] = with_tables(path.read_text(encoding="utf-8"), results, speed)
    for path, text in texts.items():
        with atomic_write(path) as file:
            file.write(text)


if __name__ == "__main__":
    run_script(main)
