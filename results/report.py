"""Writes the tables of finetuning results and of speed into the READMEs, from our JSON files.

    python -m results.report

Each table stands between the two comment lines that name it.
"""

import json
import statistics
from pathlib import Path
from typing import Any

import benchmarks.report
import cli
from utils import atomic_write

FOLDER = Path(__file__).resolve().parent
READMES = ("README.md", "README.zh-TW.md", "data/mini/README.md")
# Published with the assignment, for stories42M.pt in its unmasked mode, ten seeds.
REFERENCE = (
    "| reference, stories42M, `full` | 0.414 (0.014) | 0.418 (0.017) | 0.800 (0.115) | 10 | 2e-5 |"
)


def mean_std(values: list[float]) -> str:
    """0.812 (0.004): mean and sample standard deviation; a single value has none."""
    if len(values) < 2:
        return f"{values[0]:.3f}"
    return f"{statistics.mean(values):.3f} ({statistics.stdev(values):.3f})"


def accuracies(study: dict[str, Any], split: str) -> list[float]:
    """Of the seeds that were run at the chosen learning rate; None counts for nothing."""
    chosen = [run[split]["accuracy"] for run in study["runs"] if run["lr"] == study.get("lr")]
    return [accuracy for accuracy in chosen if accuracy is not None]


def table(folder: Path = FOLDER) -> str:
    """A row for each NAME whose studies, sst-NAME.json and cfimdb-NAME.json, are both finished."""
    rows = [
        "| finetuned, mean (std) over seeds | SST dev | SST test | CFIMDB dev | seeds | lr |",
        "|---|---|---|---|---|---|",
        REFERENCE,
    ]
    for path in sorted(folder.glob("sst-*.json")):
        name = path.stem.removeprefix("sst-")
        partner = path.with_name(f"cfimdb-{name}.json")
        if not partner.exists():
            continue
        sst, cfimdb = (json.loads(p.read_text(encoding="utf-8")) for p in (path, partner))
        columns = [accuracies(sst, "dev"), accuracies(sst, "test"), accuracies(cfimdb, "dev")]
        if all(columns) and len({len(values) for values in columns}) == 1:
            cells = " | ".join(mean_std(values) for values in columns)
            lrs = ", ".join(dict.fromkeys(f"{study['lr']:g}" for study in (sst, cfimdb)))
            rows.append(f"| {name} | {cells} | {len(columns[0])} | {lrs} |")
    return "\n".join(rows)


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


def with_tables(text: str) -> str:
    """A README's text with both tables as the files have them now."""
    return insert(insert(text, table(), "results.report"), speed_table(), "speed")


def main(argv: list[str] | None = None) -> None:
    cli.ArgumentParser(prog="results.report", description=__doc__.split("\n")[0]).parse_args(argv)
    print(table(), speed_table(), sep="\n\n")
    for name in READMES:
        path = FOLDER.parent / name
        if path.exists():
            text = path.read_text(encoding="utf-8")
            with atomic_write(path) as file:
                file.write(with_tables(text))


if __name__ == "__main__":
    cli.run(main)
