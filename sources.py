"""Which modules the Python files of a folder import, and whether those are among the files."""

import ast
import gc
import sys
import threading
import warnings
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import cli

RUNTIME_PACKAGES = frozenset({"torch", "numpy", "sentencepiece", "tqdm", "sklearn"})

# Python 3.10 takes some 80 bytes of C stack per level of nesting, uncounted: a source of MAX_SOURCE
# bytes can have half as many levels, which is 10 MiB, while the main thread has 8 (Windows: 1).
_STACK = 64 * 2**20
# Bounds on what is parsed. Of the densest source, "a" on every line, 1 MB takes 2 s of one core,
# and a file of 256 KB takes 240 MB of memory.
MAX_SOURCE = 256 * 2**10  # five times the longest file of this project
MAX_SOURCES = 2 * 2**20  # half as much again as all files of this project, tests included

_Import = tuple[str, list[str]]  # a module's name from the root, and what may be modules within it


def source_problems(sources: Mapping[str, bytes], names: Collection[str]) -> list[str]:
    """What does not parse, and the imports that would fail: those of the root modules, and of all
    that these import. `names` are all files; both go by their paths from the root.

    The caller sees to MAX_SOURCE and MAX_SOURCES.
    """
    size = threading.stack_size(_STACK)
    try:
        with ThreadPoolExecutor(max_workers=1) as thread:
            imports, problems = thread.submit(_parse_all, sources).result()
    finally:
        threading.stack_size(size)
    return problems + list(_import_problems(imports, names))


def _parse_all(sources: Mapping[str, bytes]) -> tuple[dict[str, list[_Import]], list[str]]:
    """The imports of every file, and what is wrong with the others; no tree outlives its file."""
    imports, problems = {}, []
    was_collecting = gc.isenabled()
    gc.disable()  # a third of the time goes into looking for cycles, and a tree has none
    try:
        for name, source in sources.items():
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # such as "\d" in a plain string
                    imports[name] = list(_imports(name, ast.parse(source)))
            except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
                reason = " ".join(str(error).split()) or "nested too deeply"
                problems.append(f"{cli.shown(name)}: not valid Python ({cli.shown(reason)})")
    finally:
        if was_collecting:
            gc.enable()
    return imports, problems


def _imports(importer: str, tree: ast.Module) -> Iterator[_Import]:
    """Every import statement of a file, wherever it stands."""
    queue = deque([tree])
    while queue:
        node = queue.popleft()
        for field in ("body", "handlers", "orelse", "finalbody", "cases"):
            queue.extend(getattr(node, field, ()))
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            folders = importer.split("/")[: -node.level] if node.level else []
            module = ".".join([*folders, *filter(None, [node.module])])
            members = [alias.name for alias in node.names]
            yield from [(module, members)] if module else ((name, []) for name in members)


def _import_problems(imports: Mapping[str, list[_Import]], names: Collection[str]) -> Iterator[str]:
    pythons = [name for name in names if name.endswith(".py")]
    modules = {name.removesuffix(".py") for name in pythons}
    packages = {folder for name in pythons for folder in _folders(name)}
    queue = [name for name in imports if "/" not in name]
    queued = set(queue)
    for importer in queue:  # grows on the way
        for module, members in imports[importer]:
            path = module.replace(".", "/")
            if path in modules or path in packages:
                paths = [path, *_folders(path), *(f"{path}/{member}" for member in members)]
                for file in (f"{p}{end}" for p in paths for end in (".py", "/__init__.py")):
                    if file in imports and file not in queued:
                        queued.add(file)
                        queue.append(file)
            elif module.split(".")[0] not in RUNTIME_PACKAGES | sys.stdlib_module_names:
                yield f"{cli.shown(importer)} imports {cli.shown(module)}, which is not in the zip"


def _folders(path: str) -> Iterator[str]:
    while path := path.rpartition("/")[0]:
        yield path
