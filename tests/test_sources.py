"""Python sources are parsed within bounds; test_prepare_submit.py has the laws of imports."""

import threading

import pytest

from sources import MAX_SOURCE, source_problems

N = MAX_SOURCE


@pytest.mark.parametrize(
    "source",
    [
        *("1" + "+1" * (N // 2 - 1), "a" + ".a" * (N // 2 - 1), "a" + "()" * (N // 2 - 1)),
        *("-" * (N - 1) + "1", "(" * N, "[" * 99 + "a b", "not " * (N // 4 - 1) + "a"),
        *("if a:\n b\n" + "elif a:\n b\n" * (N // 12), "9" * N, "a = " * (N // 4 - 1) + "b"),
        *("".join(" " * i + "if a:\n" for i in range(600)), 'f"{' * (N // 3), "\0" * N),
    ],
    ids=lambda source: source[:6],
)
def test_the_deepest_source_that_is_read_neither_crashes_nor_hides_the_others(source):
    size = threading.stack_size()
    sources = {"deep.py": source.encode(), "last.py": b"import nowhere"}
    lines = source_problems(sources, list(sources))
    assert lines[-1] == "last.py imports nowhere, which is not in the zip"
    assert all(line.startswith("deep.py: not valid Python (") for line in lines[:-1])
    assert len(lines) <= 2 and all(len(line) < 300 for line in lines)
    assert threading.stack_size() == size


@pytest.mark.parametrize(
    "statement",
    [
        *("if a:\n  {}", "if a: pass\nelif b: pass\nelse:\n  {}", "for a in b:\n  {}"),
        *("for a in b: pass\nelse:\n  {}", "while a:\n  {}", "with a:\n  {}", "class A:\n  {}"),
        *("def f():\n  {}", "async def f():\n  async with a:\n    {}", "try:\n  {}\nfinally: pass"),
        *("try: pass\nexcept E:\n  {}", "try: pass\nexcept E: pass\nelse:\n  {}", "a; {}"),
        *("try: pass\nfinally:\n  {}", "match a:\n  case 1:\n    {}", "a = lambda: 1\n{}"),
        "async def f():\n  async for a in b:\n    {}",
    ],
)
def test_an_import_is_seen_wherever_a_statement_can_stand(statement):
    source = statement.format("import nowhere").encode()
    assert source_problems({"a.py": source}, ["a.py"]) == [
        "a.py imports nowhere, which is not in the zip"
    ]


def test_many_imports_of_many_files_are_not_a_product():
    files = {f"p{i}/{'d/' * 100}m.py": b"" for i in range(1000)}
    imports = [f"import {name[:-3].replace('/', '.')}\n" for name in files]
    text = "".join(imports) + "import p1\n" * 3000 + "import " + "a." * 20_000 + "a\n"
    files["main.py"] = (text + "from p1 import " + ", ".join(f"n{i}" for i in range(9000))).encode()
    (line,) = source_problems(files, list(files))
    assert line.startswith("main.py imports a.a.a") and len(line) < 300
