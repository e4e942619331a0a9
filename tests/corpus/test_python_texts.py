"""The texts inside Python: which docstrings, and in which order."""

import ast
import os

import pytest

from fastroberta import train
from fastroberta.corpus import python_texts
from fastroberta.errors import DataError

SOURCE = '''
"""A module."""
if x:
    def f(a=lambda: 1):
        class C(B, metaclass=M):
            async def g(self): ...
        for _ in y:
            def h(): ...
        else:
            def i(): ...
else:
    with a, b:
        def j(): ...
try:
    class D: ...
except E:
    def k(): ...
else:
    def l(): ...
finally:
    while True:
        def m(): ...
match x:
    case 1:
        def n(): ...
    case _:
        def o(): ...
try:
    pass
except* E:
    def p(): ...
def q(): ...
'''


def test_definitions_are_those_of_ast_walk_in_its_order():
    tree = ast.parse(SOURCE)
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    expected = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    assert len(expected) == 15 and [*python_texts.list_definitions(tree)] == expected


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(python_texts, "python_texts", lambda: [("name", "text")])
    (tmp_path / "python-texts.jsonl").symlink_to("/dev/full")
    with pytest.raises(DataError, match=r"python-texts.jsonl: cannot be written \(.*No space left.*\); make room"):
        train.prepare_python_texts(tmp_path / "data")
    assert capsys.readouterr().err == "reading the documentation that comes with Python\n"
