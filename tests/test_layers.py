"""The layer rule of structure.md: a module imports only from layers of smaller numbers."""

import ast
import sys

import pytest

from conftest import ROOT

LAYERS = [
    {
        *("config", "linear", "rope", "optimizer", "utils"),
        *("checkpoint", "interrupts", "sampling"),
    },
    {"base_llama", "tokenizer", "steps", "cli", "labelled", "locks", "distributed"},
    {"resume", "llama", "outputs", "sources"},
    {"classifier", "dataset", "options", "archive", "generation"},
    {"training"},
    {"predict", "sanity_check", "prepare_submit", "optimizer_test", "rope_test"},
    {"run_llama"},
]
LEVEL = {module: level for level, modules in enumerate(LAYERS) for module in modules}
# advanced/ stands on the model and what is above it; some of its files are shared.
SHARED = {
    f"advanced.{name}"
    for name in (
        *("corpus", "language_model", "rendering", "sharding", "templates"),
        *("hf_format", "safetensors_file", "tokenizer_formats"),
    )
}
UNDER_METHODS = {module for module in LEVEL if LEVEL[module] <= LEVEL["dataset"]}
COMPOSERS = {
    "run",
    "experiment",
    "assembly",
    "averages",
    "record",
    "zero_shot",
    "explain",
    "picture",
}  # these stand on all
METHODS = sorted({path.stem for path in ROOT.glob("advanced/*.py")} - COMPOSERS)
PROJECT = [
    path
    for folder in (".", "data", "advanced", "benchmarks", "results")
    for path in ROOT.glob(f"{folder}/*.py")
]
RUNTIME_PACKAGES = {"torch", "numpy", "sentencepiece", "tqdm", "sklearn"}


def imported_modules(source: str) -> set[str]:
    """Top-level names of every import in a source, wherever it stands."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
    return names


def test_every_top_level_module_has_a_layer():
    assert {path.stem for path in ROOT.glob("*.py")} == set(LEVEL)


@pytest.mark.parametrize("module", sorted(LEVEL))
def test_modules_import_only_from_higher_layers_and_the_runtime_packages(module):
    for name in imported_modules((ROOT / f"{module}.py").read_text(encoding="utf-8")):
        if name in LEVEL:
            assert LEVEL[name] < LEVEL[module], f"{module} imports {name}"
        else:
            assert name in RUNTIME_PACKAGES | sys.stdlib_module_names, f"{module} imports {name}"


@pytest.mark.parametrize("method", METHODS)
def test_methods_stand_on_the_model_and_not_on_each_other(method):
    source = (ROOT / "advanced" / f"{method}.py").read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("advanced"):
            whole = [f"advanced.{alias.name}" for alias in node.names]
            imported = whole if node.module == "advanced" else [node.module]
            assert set(imported) <= SHARED, f"{method} imports {imported}"
    names = imported_modules(source) - {"advanced"}
    assert names <= UNDER_METHODS | RUNTIME_PACKAGES | sys.stdlib_module_names


def test_nothing_above_imports_what_measures_it():
    for path in PROJECT:
        used = imported_modules(path.read_text(encoding="utf-8")) & {"benchmarks", "results"}
        allowed = {"benchmarks": {"benchmarks"}, "results": {"benchmarks", "results"}}
        assert used <= allowed.get(path.parent.name, set()), f"{path.name} imports {used}"


def test_the_network_is_used_in_fetch_alone():
    network = {"urllib", "http", "socket", "ssl", "ftplib", "requests"}
    for path in PROJECT:
        used = imported_modules(path.read_text(encoding="utf-8")) & network
        assert bool(used) == (path.name == "fetch.py"), f"{path.name} imports {used}"


def test_nothing_unpickles_arbitrary_objects():
    for path in PROJECT:
        source = path.read_text(encoding="utf-8")
        assert imported_modules(source).isdisjoint({"pickle", "dill", "joblib"}), path.name
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                safe = [k.value for k in node.keywords if k.arg == "weights_only"]
                assert [ast.unparse(value) for value in safe] == ["True"], path.name
