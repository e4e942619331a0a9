"""Text that comes with every Python: the language reference and the standard library's docstrings, about 2 MB.

`python -m fastroberta.train` trains on it when it is given no data, so a first run needs no download.
"""

from __future__ import annotations

import ast
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path


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
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                docstring = ast.get_docstring(node)
                if docstring and len(docstring) >= 40:
                    yield f"{module}.{getattr(node, 'name', '')}", docstring


def write_python_texts(path: Path) -> int:
    """Write `python_texts` as JSON lines with the field `text`; returns the number of documents."""
    count = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for name, text in python_texts():
            file.write(json.dumps({"id": name, "text": text}) + "\n")
            count += 1
    return count
