"""Where the time of a row goes, operator by operator.

python -m benchmarks.profile "generate, causal" [--shape stories42M] [--contender ours]
"""

import tempfile

import torch
from torch.profiler import ProfilerActivity, profile

import cli
from benchmarks import jobs
from benchmarks.rows import all_rows

N_LINES = 12


def main(argv: list[str] | None = None) -> None:
    parser = cli.ArgumentParser(description="Where the time of a row goes.")
    parser.add_argument("row", help="as the table of benchmarks.run names it")
    parser.add_argument("--shape", choices=list(jobs.SHAPES), default="stories42M")
    parser.add_argument("--contender", default="ours")
    parser.add_argument("--threads", type=cli.positive_int, default=2)
    args = parser.parse_args(argv)
    if args.contender == "transformers":
        cli.require_packages("transformers")
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as scratch:
        rows = {row.name: row for row in all_rows(scratch) if row.maker != "start_up"}
        if args.row not in rows:
            raise ValueError(f"{args.row!r} is not a row; there are {'; '.join(rows)}")
        row = rows[args.row]
        if args.contender not in row.contenders:
            raise ValueError(f"--contender {args.contender}: is none of {row.contenders}")
        job = getattr(jobs, row.maker)(args.contender, shape=args.shape, **row.options)
    for _ in range(2):  # the first run takes memory and builds kernels
        job(None)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        job(None)
    events = sorted(profiler.key_averages(), key=lambda e: -e.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    print(f"{args.contender}, {args.shape}, {args.row}: {total / 1e3:.1f} ms in operators")
    print("share     calls  us each  operator")
    for event in events[:N_LINES]:
        share, each = event.self_cpu_time_total / total, event.self_cpu_time_total / event.count
        print(f"{share:5.1%} {event.count:9d} {each:8.1f}  {event.key}")


if __name__ == "__main__":
    cli.run(main)
