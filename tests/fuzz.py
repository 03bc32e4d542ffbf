"""Feeds the readers hostile files and checks how they fail.

    python tests/fuzz.py --cases 100000 --seed 0 --out results/fuzz.json   # the long run
    python tests/fuzz.py --cases 2000 --target tokenizer                   # one target

Whatever lies in the folder, a program here ends with a documented exit code; an input error is one
line on standard error that names the file; no file appears but the chosen outputs; nothing in a
file is executed. A run also bounds each case: 5 seconds, and 1 GiB beyond what the imports take.

Every target has a process of its own. One that dies or hangs is a finding too, and the target goes
on behind it. `tests/fuzz_targets.py` says what is drawn and what reads it; `tests/test_fuzz.py`
runs a few thousand cases of the same.
"""

import argparse
import contextlib
import fnmatch
import json
import math
import multiprocessing
import os
import pickle
import platform
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.configuration import set_hypothesis_home_dir

# Else it leaves a folder .hypothesis where it is started.
_HOME = tempfile.TemporaryDirectory()
set_hypothesis_home_dir(_HOME.name)
# As pytest's `pythonpath`: run as a script, Python looks in this folder alone.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

Inputs = dict[str, bytes]  # what lies in the folder, by name
LIMIT_S = 5.0
HANG_S = 60.0  # then the process is ended
MEMORY_BYTES = 2**30
LONGEST_LINE = 6000  # a person is to read it
BATCH = 200  # cases between two reports of a child


@dataclass(frozen=True)
class Target:
    """One reader: what it is fed, how it is called, and how it may end.

    `act` runs in the folder of the inputs and ends with SystemExit. `outputs` are the names that it
    may write there, as patterns, `names` the words one of which an input error has to hold.
    """

    name: str
    cases: Any  # a hypothesis strategy of Inputs
    act: Callable[[], None]
    codes: tuple[int, ...] = (0, 2)
    outputs: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    share: float = 1.0


@dataclass
class Outcome:
    code: int | None
    seconds: float
    problem: str | None


def examine(target: Target, inputs: Inputs) -> Outcome:
    """Runs one case in a folder of its own and says what is wrong with how it ended."""
    home = Path.cwd()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as outer:
        folder = Path(outer, "folder")
        folder.mkdir()
        for name, content in inputs.items():
            (folder / name).write_bytes(content)
        os.chdir(folder)
        try:
            with _captured() as read_error:
                started = time.perf_counter()
                code, problem = _ending(target.act)
                seconds = time.perf_counter() - started
                error = read_error()
        finally:
            os.chdir(home)
        found = {path.relative_to(folder.parent).as_posix() for path in folder.parent.rglob("*")}
    allowed = ["folder", *(f"folder/{name}" for name in target.outputs)]
    known = {f"folder/{name}" for name in inputs}
    strangers = {n for n in found - known if not any(fnmatch.fnmatchcase(n, a) for a in allowed)}
    if problem is None:
        problem = _problem(target, inputs, code, error, strangers)
    return Outcome(code, seconds, problem)


def _ending(act: Callable[[], None]) -> tuple[int | None, str | None]:
    """(exit code, what else than an exit it was)."""
    try:
        act()
    except SystemExit as ended:
        return ended.code or 0, None
    except BaseException as error:
        if isinstance(error, (KeyboardInterrupt, GeneratorExit)):
            raise
        *_, last = traceback.extract_tb(error.__traceback__)
        ours = [f for f in traceback.extract_tb(error.__traceback__) if ".venv" not in f.filename]
        place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else last.name
        return None, f"{type(error).__name__} at {place}: {str(error)[:200]}"
    return None, "no SystemExit"


def _problem(
    target: Target, inputs: Inputs, code: int | None, error: str, strangers: set[str]
) -> str | None:
    """What is wrong with a case that ended with an exit code."""
    if strangers:
        return f"wrote {sorted(strangers)[:3]}"
    if code not in target.codes:
        return f"exit code {code!r}: {error[:200]}"
    if "Traceback" in error:
        return f"a traceback: {error[:200]}"
    if code == 2:
        if error.count("\n") != 1 or not error.endswith("\n"):
            return f"not one line, but {error.count(chr(10))}: {error[:200]}"
        if len(error) > LONGEST_LINE:
            return f"a line of {len(error)} characters: {error[:200]}"
        if not any(name in error for name in (*inputs, *target.names)):
            return f"names no file: {error[:200]}"
    return None


@contextlib.contextmanager
def _captured() -> Iterator[Callable[[], str]]:
    """Takes standard error, that of C++ too, and forgets standard output, as UTF-8 terminals do."""
    kept, streams = os.dup(2), (sys.stdout, sys.stderr)
    with tempfile.TemporaryFile() as file, open(os.devnull, "w", encoding="utf-8") as out:
        os.dup2(file.fileno(), 2)
        sys.stdout = out
        sys.stderr = os.fdopen(os.dup(2), "w", 1, encoding="utf-8", errors="backslashreplace")

        def read() -> str:
            sys.stderr.flush()
            file.seek(0)
            return file.read().decode("utf-8", "replace")

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("always")
                warnings.showwarning = _show_warning
                yield read
        finally:
            sys.stderr.close()
            sys.stdout, sys.stderr = streams
            os.dup2(kept, 2)
            os.close(kept)


def _show_warning(message, category, *_: Any) -> None:
    print(f"{category.__name__}: {message}", file=sys.stderr)


# ---------------------------------------------------------------- a process per target


def child(name: str, n_cases: int, first_seed: int, current: str, pipe: Any) -> None:
    """Runs `n_cases` of a target, batch after batch, and sends what came of each batch."""
    from fuzz_targets import TARGETS

    torch.set_num_threads(1)
    target = TARGETS[name]
    examine(target, {})  # what is imported or made on first use
    with bounded_memory():
        for batch in range(-(-n_cases // BATCH)):
            report = _run_batch(
                target, min(BATCH, n_cases - batch * BATCH), first_seed + batch, Path(current), pipe
            )
            pipe.send({**report, "peak_mb": _peak_mb()})
    pipe.send(None)


def _run_batch(target: Target, n_cases: int, batch_seed: int, current: Path, pipe: Any) -> dict:
    report: dict[str, Any] = {"cases": 0, "codes": Counter(), "slowest_s": 0.0, "findings": []}

    @seed(batch_seed)
    @settings(
        max_examples=n_cases,
        phases=[Phase.generate],
        database=None,
        deadline=None,
        # A large file is drawn from few choices, and it is the reader that takes the time.
        suppress_health_check=list(HealthCheck),
    )
    @given(target.cases)
    def run(inputs: Inputs) -> None:
        current.write_bytes(pickle.dumps(inputs))
        pipe.send("alive")
        outcome = examine(target, inputs)
        problem = outcome.problem
        if problem is None and outcome.seconds > LIMIT_S:
            problem = f"took {outcome.seconds:.1f} s"
        report["cases"] += 1
        report["codes"][str(outcome.code)] += 1
        report["slowest_s"] = max(report["slowest_s"], outcome.seconds)
        if problem is not None:
            report["findings"].append(finding("failure", problem, inputs))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, on the strange tensors that are drawn
        run()
    return report


def finding(kind: str, text: str, inputs: Inputs) -> dict[str, Any]:
    """A finding with what reproduces it, where that is short."""
    contents = {
        name: content.hex() if len(content) <= 2000 else f"{len(content)} bytes"
        for name, content in inputs.items()
    }
    return {"kind": kind, "text": text, "inputs": contents}


@contextlib.contextmanager
def bounded_memory(n_bytes: int = MEMORY_BYTES) -> Iterator[None]:
    """Linux: whoever takes more than this beyond the present size gets a MemoryError."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        yield
        return
    import resource

    in_use = int(statm.read_text(encoding="utf-8").split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (in_use + n_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def _peak_mb() -> float:
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return 0.0
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def run_target(name: str, n_cases: int, first_seed: int) -> dict[str, Any]:
    """Every case of a target, by as many processes as it takes."""
    total: dict[str, Any] = {"cases": 0, "codes": Counter(), "slowest_s": 0.0, "findings": []}
    total["peak_mb"] = 0.0
    started, lost = time.perf_counter(), 0
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        current = Path(folder, "case")
        while total["cases"] + lost < n_cases:
            done = total["cases"] + lost
            receiver, sender = context.Pipe(duplex=False)
            arguments = (name, n_cases - done, first_seed + -(-done // BATCH), str(current), sender)
            process = context.Process(target=child, args=arguments)
            process.start()
            sender.close()
            end = _collect(receiver, total)
            if process.is_alive() and end == "hangs":
                process.kill()
            process.join()
            if end is None:
                break  # a strategy may have fewer cases than were asked for
            inputs = pickle.loads(current.read_bytes()) if current.exists() else {}
            text = f"{end}, exit code {process.exitcode}"
            total["findings"].append(finding("crash", text, inputs))
            lost += BATCH
    total["seconds"] = round(time.perf_counter() - started, 1)
    return total


def _collect(receiver: Any, total: dict[str, Any]) -> str | None:
    """Adds up a child's reports; None where it came to its end, else how it did not."""
    while True:
        if not receiver.poll(HANG_S):
            return "hangs"
        try:
            message = receiver.recv()
        except EOFError:
            return "dies"
        if message is None:
            return None
        if message != "alive":
            total["cases"] += message["cases"]
            total["codes"].update(message["codes"])
            total["findings"] += message["findings"]
            for key in ("slowest_s", "peak_mb"):
                total[key] = max(total[key], message[key])


def main(argv: list[str] | None = None) -> int:
    from fuzz_targets import TARGETS

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", action="append", choices=list(TARGETS))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    os.environ["OMP_NUM_THREADS"] = "1"  # for the children, which are one at a time
    chosen = {name: TARGETS[name] for name in args.target or TARGETS}
    shares = sum(target.share for target in chosen.values())
    results = {}
    for number, (name, target) in enumerate(chosen.items()):
        n_cases = math.ceil(args.cases * target.share / shares)
        result = run_target(name, n_cases, args.seed + number * 1_000_000)
        results[name] = result
        print(
            f"{name:12} {result['cases']:7} cases in {result['seconds']:7.1f} s, "
            f"codes {dict(result['codes'])}, slowest {result['slowest_s']:.2f} s, "
            f"peak {result['peak_mb']:.0f} MB, findings {len(result['findings'])}",
            flush=True,
        )
        for text in dict.fromkeys(re.sub(r"\d+", "N", f["text"]) for f in result["findings"]):
            print(f"  {text[:300]}", flush=True)
    n_findings = sum(len(result["findings"]) for result in results.values())
    if args.out:
        content = json.dumps(_document(args, results), indent=1) + "\n"
        args.out.write_text(content, encoding="utf-8")
    return 1 if n_findings else 0


def _document(args: argparse.Namespace, results: dict[str, dict]) -> dict[str, Any]:
    command = f"python tests/fuzz.py --cases {args.cases} --seed {args.seed}"
    command += "".join(f" --target {name}" for name in args.target or [])
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    rounded = {
        name: {
            **result,
            "slowest_s": round(result["slowest_s"], 3),
            "peak_mb": round(result["peak_mb"]),
        }
        for name, result in results.items()
    }
    return {
        "command": f"{command} --out results/fuzz.json",
        "seed": args.seed,
        "versions": {**versions, "hypothesis": hypothesis.__version__},
        "cases": sum(result["cases"] for result in results.values()),
        "findings": sum(len(result["findings"]) for result in results.values()),
        "targets": rounded,
    }


if __name__ == "__main__":
    sys.exit(main())
