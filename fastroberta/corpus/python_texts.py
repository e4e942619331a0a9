"""Text that comes with every Python: the language reference and the standard library's docstrings, about 2 MB.

`python -m fastroberta.train` trains on it when it is given no data, so a first run needs no download.
"""

from __future__ import annotations

import ast
import contextlib
import gc
import json
import sysconfig
from collections import deque
from collections.abc import Iterator
from pathlib import Path

_BLOCKS = ("body", "handlers", "orelse", "finalbody", "cases")  # fields of a statement that hold statements


def python_texts() -> Iterator[tuple[str, str]]:
    """The name and text of each topic in `pydoc_data.topics` and of each docstring in the standard library.

    Modules are parsed, not imported, because importing some of them opens windows or prints.
    """
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        yield f"topic:{name}", text
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted((*library.glob("*.py"), *library.glob("[a-z]*/*.py"))):
        if {"site-packages", "test", "tests", "idlelib", "turtledemo", "lib2to3", "pydoc_data"} & set(path.parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # some files are invalid on purpose
            continue
        module = ".".join(path.relative_to(library).with_suffix("").parts)
        for node in list_definitions(tree):
            docstring = ast.get_docstring(node)
            if docstring and len(docstring) >= 40:
                yield f"{module}.{getattr(node, 'name', '')}", docstring


def list_definitions(
    tree: ast.Module,
) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """The module, its classes and its functions, in the order of `ast.walk`, which also walks through expressions."""
    rest: deque[ast.AST] = deque([tree])
    while rest:
        node = rest.popleft()
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node
        for block in _BLOCKS:
            rest.extend(getattr(node, block, ()))


def write_python_texts(path: Path) -> int:
    """Write `python_texts` as JSON lines with the field `text`; returns the number of documents."""
    count = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file, _without_collector():
        for name, text in python_texts():
            file.write(json.dumps({"id": name, "text": text}) + "\n")
            count += 1
    return count


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
    """Without Python's garbage collector, which walks a syntax tree many times while it grows; trees hold no cycles."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
