"""Feed the readers hostile files and check how they fail.

    python tests/fuzz.py
    python tests/fuzz.py --cases 100000 --seed 0
    python tests/fuzz.py --cases 2000 --target tokenizer

Every case must end with exit code 0, or with 2 and one line on standard error that names the file;
no other file appears, nothing in a file is executed, and 5 seconds and 1 GiB suffice. Each target
(tests/fuzz_targets.py) runs in a process of its own, so that a crash is a finding, too.
"""

import contextlib
import os
import pickle
import subprocess
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

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.configuration import set_hypothesis_home_dir

_HOME = tempfile.TemporaryDirectory()  # otherwise a folder .hypothesis appears
set_hypothesis_home_dir(_HOME.name)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # as pytest's `pythonpath`

Inputs = dict[str, bytes]  # the content of each file in the folder
LIMIT_S = 5.0
MEMORY_BYTES = 2**30
LONGEST_LINE = 6000
BATCH = 200  # cases of one seed


@dataclass(frozen=True)
class Target:
    """One reader: a strategy of its inputs, and what reads them.

    `act` runs in the folder of the inputs and ends with SystemExit. An error line must hold one of
    the inputs' names or of `words`.
    """

    name: str
    cases: Any
    act: Callable[[], None]
    words: tuple[str, ...] = ()
    share: float = 1.0


def examine(target: Target, inputs: Inputs) -> str | None:
    """Run one case in a folder of its own and return what is wrong with how it ended."""
    home = Path.cwd()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for name, content in inputs.items():
            Path(folder, name).write_bytes(content)
        os.chdir(folder)
        try:
            with _captured() as read_error:
                code = _exit_code(target.act)
                error = read_error()
        finally:
            os.chdir(home)
        strangers = {path.name for path in Path(folder).iterdir()} - {*inputs}
    if strangers:
        return f"wrote {sorted(strangers)[:3]}"
    if code == 0:
        return None
    if code != 2:
        return f"ended with {code}: {error[:200]}"
    if error.count("\n") != 1 or "Traceback" in error:
        return f"not one line: {error[:200]}"
    if len(error) > LONGEST_LINE:
        return f"a line of {len(error)} characters: {error[:200]}"
    if not any(word in error for word in (*inputs, *target.words)):
        return f"names no file: {error[:200]}"
    return None


def _exit_code(act: Callable[[], None]) -> int | str:
    try:
        act()
    except SystemExit as ended:
        return ended.code or 0
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}: {error}"[
            :300
        ]
    return "no SystemExit"


@contextlib.contextmanager
def _captured() -> Iterator[Callable[[], str]]:
    """Capture standard error, also of C++, and drop standard output."""
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
            yield read
        finally:
            sys.stderr.close()
            sys.stdout, sys.stderr = streams
            os.dup2(kept, 2)
            os.close(kept)


@contextlib.contextmanager
def bounded_memory(n_bytes: int = MEMORY_BYTES) -> Iterator[None]:
    """On Linux, raise MemoryError where more than this is taken beyond the present size."""
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


def run_cases(target: Target, n_cases: int, first_seed: int, limit_s: float = LIMIT_S) -> int:
    """Run a target's cases in this process, print what is wrong, and return how many are."""
    case = Path(tempfile.gettempdir(), f"fuzz-{target.name}.pickle")  # for when it crashes
    problems, seconds = Counter(), []

    @settings(
        max_examples=min(BATCH, n_cases),
        phases=[Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),  # large files are drawn from few choices
    )
    @given(target.cases)
    def run(inputs: Inputs) -> None:
        case.write_bytes(pickle.dumps(inputs))
        started = time.perf_counter()
        problem = examine(target, inputs)
        seconds.append(time.perf_counter() - started)
        if problem is None and seconds[-1] > limit_s and len(seconds) > 1:  # the first one imports
            problem = f"took {seconds[-1]:.1f} s"
        if problem is not None:
            problems[problem] += 1
            case.replace(case.with_stem(f"{case.stem}-{len(problems)}"))

    with bounded_memory(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, on strange tensors
        for batch in range(-(-n_cases // BATCH)):
            seed(first_seed + batch)(run)()
    n_problems = sum(problems.values())
    print(
        f"{target.name}: {len(seconds)} cases, slowest {max(seconds):.2f} s, {n_problems} findings"
    )
    for number, (problem, n) in enumerate(problems.items(), start=1):
        print(f"  {n} x {problem[:300]} ({case.with_stem(f'{case.stem}-{number}')})")
    return n_problems


def main(argv: list[str] | None = None) -> int:
    from fuzz_targets import TARGETS
    from utils import ArgumentParser

    parser = ArgumentParser(__doc__)
    parser.add_argument("--cases", type=int, default=20_000, metavar="N",
        help="cases of all targets together (default: %(default)s)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, metavar="N",
        help="seed of the first batch of cases (default: %(default)s)")  # fmt: skip
    parser.add_argument("--target", choices=list(TARGETS), help="reader to feed (default: all)")
    args = parser.parse_args(argv)
    if args.target:
        return int(run_cases(TARGETS[args.target], args.cases, args.seed) > 0)
    shares, failed = sum(target.share for target in TARGETS.values()), []
    for target in TARGETS.values():
        options = ["--cases", str(round(args.cases * target.share / shares))]
        options += ["--seed", str(args.seed), "--target", target.name]
        code = subprocess.run([sys.executable, __file__, *options], check=False).returncode
        if code != 0:
            failed.append(f"{target.name} (exit code {code})")
    print(f"findings in: {', '.join(failed) or 'no target'}; inputs in {tempfile.gettempdir()}")
    return int(bool(failed))


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
