"""Rules of style that the source itself can be asked about: short modules, nothing left to do."""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator

from helpers.source_tree import PACKAGE, ROOT, assert_none, modules, tree

# Of every module. A page that two shallow files would make a reader turn back and forth may be this long.
MAX_LINES = 400
MAX_LOOP_LINES = 200


def test_the_training_loop_fits_on_a_page() -> None:
    lines = len((ROOT / PACKAGE / "loop.py").read_text(encoding="utf-8").splitlines())
    assert lines < MAX_LOOP_LINES, (
        f"{PACKAGE}/loop.py has {lines} lines, expected fewer than {MAX_LOOP_LINES}"
    )


def test_every_module_is_short() -> None:
    sizes = {file: len(file.read_text(encoding="utf-8").splitlines()) for file in modules().values()}
    found = [f"{file.relative_to(ROOT)}:{size}" for file, size in sizes.items() if size >= MAX_LINES]
    assert_none(found, f"modules have fewer than {MAX_LINES} lines: split these")


def test_no_function_is_empty() -> None:
    found = [
        f"{file.relative_to(ROOT)}:{function.lineno} {function.name}"
        for file in modules().values()
        for function in empty_functions(tree(file))
    ]
    assert_none(found, "functions without a body")


def empty_functions(root: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Functions that only pass, but for the methods of Protocols."""
    protocols = [
        node
        for node in ast.walk(root)
        if isinstance(node, ast.ClassDef) and any("Protocol" in ast.unparse(base) for base in node.bases)
    ]
    exempt = {id(child) for node in protocols for child in node.body}
    for node in ast.walk(root):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and id(node) not in exempt:
            nothing = (
                isinstance(statement, ast.Pass)
                or (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant))
                for statement in node.body
            )
            if all(nothing):
                yield node


def test_nothing_is_left_to_do() -> None:
    found = []
    for file in modules().values():
        for token in tokenize.generate_tokens(io.StringIO(file.read_text(encoding="utf-8")).readline):
            comment = token.type == tokenize.COMMENT and any(
                word in token.string for word in ("TODO", "FIXME", "XXX")
            )
            if comment or (token.type == tokenize.NAME and token.string == "NotImplementedError"):
                found.append(f"{file.relative_to(ROOT)}:{token.start[0]} {token.string}")
    assert_none(found, "unfinished work")


def test_a_function_that_only_passes_is_seen() -> None:
    code = (
        "class P(Protocol):\n    def a(self): ...\ndef b():\n    'Says.'\n    pass\ndef c():\n    return 1\n"
    )
    assert [function.name for function in empty_functions(ast.parse(code))] == ["b"]
