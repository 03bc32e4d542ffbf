"""The scaling rows: starts the ranks, and puts into words what several of them gain.

Strong scaling: the batch stays and the ranks share it. Weak scaling: each rank has what one had.
"""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.ranks import PARTS
from training import distributed

N_SUMMED = PARTS.index("waited")  # parts that make a step; what follows is part of these
Measured = dict[str, Any]  # a row as `benchmarks.ranks` writes it
PREFIX = "scaling, "  # of these rows' names
ROOT = Path(__file__).resolve().parent.parent


def measure_scaling(
    row: str, shape: str, n_ranks: int, repeats: int, threads: int, use_gpu: bool, bf16: bool,
    scratch: str, command: str,
) -> Measured:  # fmt: skip
    """ValueError where the ranks fail; what they said stands on standard error then."""
    out = Path(scratch) / "ranks.json"
    options = ["--shape", shape, "--row", row, "--repeats", str(repeats), "--out", str(out)]
    options += ["--threads", str(threads), *["--use_gpu"] * use_gpu, *["--bf16"] * bf16]
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(n_ranks)]
    mine = {key: value for key, value in os.environ.items() if key not in distributed.VARIABLES}
    done = subprocess.run(
        [sys.executable, "-m", *launch, "-m", "benchmarks.ranks", *options],
        cwd=ROOT,
        env={**mine, "OMP_NUM_THREADS": str(threads)},
        check=False,
    )
    if done.returncode:
        raise ValueError(f"{PREFIX}{row}, {shape}: its ranks failed, see above")
    return {**json.loads(out.read_text(encoding="utf-8")), "command": command}


def parts_of(measured: Measured, way: str) -> dict[str, float]:
    """Seconds of each part of a step, the medians over the turns."""
    turns = measured["seconds"][way]
    return {part: statistics.median(turn[i] for turn in turns) for i, part in enumerate(PARTS)}


def seconds_of(measured: Measured, way: str) -> float:
    """The median over the turns: of a step, or of what has no parts."""
    return statistics.median(sum(turn[:N_SUMMED]) for turn in measured["seconds"][way])


def key(measured: Measured) -> tuple[Any, ...]:
    """What tells rows apart."""
    return tuple(measured[name] for name in ("shape", "row", "device", "bf16", "n_ranks"))


COLUMNS = (
    *("shape", "row", "ranks", "tokens/s, one rank", "of the peak", "tokens/s, ranks"),
    *("strong", "weak", "one process, all threads", "exchange", "waited"),
)


def scaling_table(rows: list[Measured]) -> str:
    """Markdown: what ranks gain, and what their exchange costs."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for row in rows:
        cells = [row["shape"], name_of(row), str(row["n_ranks"]), *map(_shown, _figures(row))]
        lines.append(f"| {' | '.join(cells + [''] * (len(COLUMNS) - len(cells)))} |")
    return "\n".join(lines)


def name_of(row: Measured) -> str:
    return f"{row['row']}{', bf16' * row['bf16']}{', GPU' * (row['device'] == 'cuda')}"


def _figures(row: Measured) -> list[float]:
    """What the columns from the fourth on show."""
    n_tokens, alone = row["n_rows"] * row["tokens_of_row"], seconds_of(row, "one rank")
    peak = row["product_operations"] / seconds_of(row, "product")
    figures = [n_tokens / alone, row["operations"] / alone / peak]
    if row["n_ranks"] == 1:
        return figures
    together = seconds_of(row, "ranks")
    return [
        *figures,
        n_tokens / together,
        alone / together,
        seconds_of(row, "one rank, a share") / together,
        alone / seconds_of(row, "one rank, all threads"),
        seconds_of(row, "exchange") / together,
        parts_of(row, "ranks")["waited"] / together,
    ]


def _shown(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 10 else f"{value:.2f}"
