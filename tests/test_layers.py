"""The import rule of structure.md: dependencies point down.

    PYTHONPATH=. python tests/test_layers.py

prints the modules and lines behind `import llama` and `import run_llama`.
"""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# A module may import from its own floor's room and from the floors below.
FLOORS = [
    {"utils"},
    {"config"},
    {"rope", "tokenizer", "optimizer"},
    {"formats", "fast"},
    {"base_llama"},
    {"llama"},
    {"classifier"},
    {"training"},
    {"pretraining"},
    {"run_llama", "tools", "advanced", "sanity_check", "optimizer_test", "rope_test"},
    {"benchmarks"},
    {"results"},
]
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
SELF_CONTAINED = {"prepare_submit", "data"}  # they import nothing of the project
RUNTIME_PACKAGES = {"torch", "numpy", "sentencepiece", "tqdm", "sklearn", "scipy", "filelock"}
EXTRAS = {"transformers", "safetensors", "tokenizers", "matplotlib"}  # inside functions only
MODULES = sorted(
    path.relative_to(ROOT)
    for pattern in ("*.py", "*/*.py", "*/*/*.py")
    for path in ROOT.glob(pattern)
    if path.relative_to(ROOT).parts[0] not in ("tests", "runs") and ".venv" not in path.parts
)


def room_of(module: str) -> str:
    return module.split(".")[0]


def tree_of(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def imports(tree: ast.AST) -> set[str]:
    """Every dotted name that is imported, wherever the import stands."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def behind(module: str) -> dict[str, int]:
    """Lines of each module of the project that importing `module` may load."""
    lines, todo = {}, [module]
    while todo:
        name = todo.pop()
        stem = ROOT / name.replace(".", "/")
        paths = [path for path in (stem.with_suffix(".py"), stem / "__init__.py") if path.exists()]
        if paths and name not in lines:
            lines[name] = len(paths[0].read_text(encoding="utf-8").splitlines())
            todo += imports(tree_of(paths[0].relative_to(ROOT)))
    return lines


def test_every_module_is_on_a_floor():
    rooms = {path.parts[0].removesuffix(".py") for path in MODULES}
    assert rooms == set(LEVEL) | SELF_CONTAINED


def test_imports_point_down():
    for path in MODULES:
        room = path.parts[0].removesuffix(".py")
        for name in imports(tree_of(path)):
            if room_of(name) in LEVEL:
                assert room not in SELF_CONTAINED, f"{path} imports {name}"
                is_own_room = room_of(name) == room and len(path.parts) > 1
                assert is_own_room or LEVEL[room_of(name)] < LEVEL[room], f"{path} imports {name}"
            else:
                packages = set() if room == "prepare_submit" else RUNTIME_PACKAGES | EXTRAS
                allowed = packages | sys.stdlib_module_names
                assert room_of(name) in allowed, f"{path} imports {name}"


def test_development_extras_are_imported_inside_functions():
    for path in MODULES:
        for node in tree_of(path).body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                assert {room_of(name) for name in imports(node)}.isdisjoint(EXTRAS), path


def test_only_fetch_uses_the_network_and_nothing_unpickles_objects():
    network = {"urllib", "http", "socket", "ssl", "ftplib", "requests"}
    for path in MODULES:
        tree = tree_of(path)
        rooms = {room_of(name) for name in imports(tree)}
        assert rooms.isdisjoint({"pickle", "dill", "joblib"}), path
        assert path == Path("data/fetch.py") or rooms.isdisjoint(network), path
        assert not {"torch.load", "torch.serialization", "torch.serialization.load"} & imports(tree)
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            assert not ast.unparse(call.func).endswith("serialization.load"), path
            if ast.unparse(call.func) == "torch.load":
                safe = [keyword.value for keyword in call.keywords if keyword.arg == "weights_only"]
                assert [ast.unparse(value) for value in safe] == ["True"], path


def test_the_model_loads_nothing_that_trains():
    assert {room_of(name) for name in behind("llama")} <= {
        *("llama", "base_llama", "rope", "config", "utils", "formats", "fast"),
    }
    assert {room_of(name) for name in behind("run_llama")}.isdisjoint(
        {"pretraining", "tools", "advanced", "benchmarks", "results"}
    )


if __name__ == "__main__":
    for start in ("llama", "run_llama"):
        lines = behind(start)
        print(f"import {start}: {len(lines)} modules, {sum(lines.values())} lines")
        for name, n in sorted(lines.items()):
            print(f"  {n:4d}  {name}")
