"""Estimate the speed-up of many devices from one device's finetuning step, as a Markdown table.

    python -m benchmarks.many_devices

docs/performance.md explains the formula and its assumptions. This command times nothing.
"""

import json
import math

from benchmarks.processor import RESULTS
from benchmarks.report import Measured, markdown, seconds_of

MEASURED = {"cpu": "speed-amd-epyc-family-25-model-17.json", "cuda": "speed-nvidia-h200.json"}
DEVICES = (8, 64, 1024)
N_BUCKETS = 5  # in which DistributedDataParallel sums the gradients of stories42M
# device, Gbit/s, microseconds, whether each device has its own batch
CASES = (
    ("cpu", 10, 20, False),
    ("cpu", 10, 20, True),
    ("cuda", 400, 3, False),
    ("cuda", 400, 3, True),
)


def exchange_seconds(n: int, n_bytes: int, bytes_per_s: float, latency: float) -> float:
    """Return the seconds to sum gradients over n devices by recursive halving and doubling.

    Thakur, Rabenseifner and Gropp 2005, Int. J. High Perform. Comput. Appl. 19: each byte is sent
    2 (n - 1) / n times, each bucket in 2 log2(n) messages.
    """
    n_messages = 2 * math.ceil(math.log2(n)) * N_BUCKETS
    return 2 * (n - 1) / n * n_bytes / bytes_per_s + n_messages * latency


def speedup(n: int, row: Measured, bytes_per_s: float, latency: float, own_batch: bool) -> float:
    """Return the speed-up of n devices over one; no exchange overlaps with computation."""
    passes, update = (seconds_of(row, "one rank", parts) for parts in ((0, 1), (2,)))
    n_rows = row["n_rows"]
    share = n_rows if own_batch else math.ceil(n_rows / n)  # rows of the busiest device
    exchange = exchange_seconds(n, row["gradient_bytes"], bytes_per_s, latency)
    seconds = share / n_rows * passes + update + exchange
    return (n if own_batch else 1) * (passes + update) / seconds


def finetuning_step(device: str) -> Measured:
    """Return the measured step of stories42M in float32."""
    rows = json.loads((RESULTS / MEASURED[device]).read_text(encoding="utf-8"))["ranks"]
    wanted = {"shape": "stories42M", "row": "finetune", "device": device, "bf16": False}
    return next(row for row in rows if wanted.items() <= row.items())


def main() -> None:
    steps = {device: finetuning_step(device) for device in MEASURED}
    head, columns = ["devices"], []
    for device, gbit_s, microseconds, own_batch in CASES:
        row = steps[device]
        batch = f"{row['n_rows']} rows {'each' if own_batch else 'in all'}"
        head.append(f"{device}, {batch}, {gbit_s} Gbit/s, {microseconds} µs")
        link = gbit_s * 1e9 / 8, microseconds * 1e-6
        columns.append([f"{speedup(n, row, *link, own_batch):,.1f}" for n in DEVICES])
    print(markdown(head, list(zip(map(str, DEVICES), *columns, strict=True))))


if __name__ == "__main__":
    main()
