"""Name the processor of a measurement, and the file that keeps the measurement."""

import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).resolve().parent.parent / "results"


def processor_name() -> str:
    """Return the system's name for this processor, or at least its architecture."""
    name, cpuinfo = "", Path("/proc/cpuinfo")
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        name = subprocess.check_output(command, encoding="utf-8").strip()
    elif cpuinfo.exists():
        name = name_in(cpuinfo.read_text(encoding="utf-8"))
    return name or platform.processor() or platform.machine() or "unknown"


def name_in(cpuinfo: str) -> str:
    """Return the model name in Linux's cpuinfo, with family and model if the name has no number."""
    first, _, _ = cpuinfo.strip().partition("\n\n")
    fields = dict(
        re.split(r"\s*:\s*", line, maxsplit=1) for line in first.split("\n") if ":" in line
    )
    name = fields.get("model name", "")
    if name and not re.search(r"\d", name):
        name += f" (family {fields.get('cpu family', '?')}, model {fields.get('model', '?')})"
    return name


def describe() -> dict[str, Any]:
    """Return the head of a file of measurements."""
    return {
        "name": processor_name(),
        "torch": torch.__version__,
        "vectors": torch.backends.cpu.get_cpu_capability(),
    }


def speed_file(name: str) -> Path:
    """Return results/speed-<processor>.json."""
    short = re.sub(r"\((R|TM)\)|\bCPU\b|\bProcessor\b|@.*", " ", name, flags=re.IGNORECASE)
    slug = "-".join(re.findall(r"[a-z0-9]+", short.lower()))
    return RESULTS / f"speed-{slug}.json"


def speed_files() -> list[Path]:
    """Return the files of all processors measured so far."""
    return sorted(RESULTS.glob("speed-*.json"))
