"""What was measured, in words: the table, the targets, and what the table has no column for."""

from typing import Any

from benchmarks.rows import CONTENDERS, Counts, all_rows

Measured = dict[str, Any]  # a row as results/speed.json has it


def with_limits(rows: list[Measured]) -> list[Measured]:
    """The rows, each with `limit_seconds` on a machine of the rates that were measured with it."""
    limits = {row.name: row.limit for row in all_rows("")}
    return [
        row | {"limit_seconds": limits[row["row"]](Counts(row["shape"], row["rates"]))}
        for row in rows
    ]


def speedup(measured: Measured, other: str) -> float | None:
    """How many times faster ours is than another contender."""
    contenders = measured["contenders"]
    if other not in contenders:
        return None
    return contenders[other]["median"] / contenders["ours"]["median"]


def table(rows: list[Measured]) -> str:
    """Markdown: rates, ratios, distance from the limit, memory."""
    lines = [
        "| shape | row | naive | ours | transformers | / naive | / transformers | of the limit "
        "| memory / naive |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["shape"], f"{row['row']} ({row['unit']})"]
        for name in CONTENDERS:
            m = row["contenders"].get(name)
            cells.append(_shown(row["amount"] / m["median"], row["unit"]) if m else "")
        for name in ("naive", "transformers"):
            ratio = speedup(row, name)
            cells.append(f"{ratio:.2f}" if ratio else "")
        share = row["limit_seconds"] / row["contenders"]["ours"]["median"]
        cells.append(f"{share:.2f}" if share else "")
        memory = {name: m["peak_mb"] for name, m in row["contenders"].items()}
        is_process_itself = row["row"].startswith("start-up")
        cells.append("" if is_process_itself else f"{memory['ours'] / memory['naive']:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _shown(rate: float, unit: str) -> str:
    if unit == "s":
        return f"{1 / rate:.3f}"
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}"


def others(rows: list[Measured]) -> str:
    """What the table has no column for."""
    lines = []
    for row in rows:
        named = [name for name in row["contenders"] if name not in CONTENDERS]
        if named:
            seconds = (f"{name} {row['contenders'][name]['median']:.4f} s" for name in named)
            lines.append(f"{row['shape']}, {row['row']}: {', '.join(seconds)}")
        if row["ours_vs_naive"]:
            lines.append(f"{row['shape']}, {row['row']}: ours and naive: {row['ours_vs_naive']}")
    return "\n".join(lines)


def check(rows: list[Measured], targets: dict[str, dict[str, float]]) -> str:
    """The targets of the stories42M shape, each met or missed."""
    lines = []
    for row in rows:
        for against, bound in targets.get(row["row"], {}).items():
            if row["shape"] != "stories42M":
                continue
            m = row["contenders"]
            if against == "memory":
                reached = m["ours"]["peak_mb"] / m["naive"]["peak_mb"]
            elif against == "limit":
                reached = row["limit_seconds"] / m["ours"]["median"]
            elif against == "beyond import and reading":
                unavoidable = ("import torch", "read file")
                reached = m["ours"]["median"] - sum(m[name]["median"] for name in unavoidable)
            else:
                reached = speedup(row, against)
            at_most = against in ("memory", "beyond import and reading")
            met = reached <= bound if at_most else reached >= bound
            verdict = "met" if met else "MISSED"
            target = f"target: {'at most' if at_most else 'at least'} {bound:.2f}"
            lines.append(f"{verdict}: {row['row']}, {against}: {reached:.2f} ({target})")
    return "\n".join(lines)
