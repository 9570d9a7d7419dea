"""Rules of style that the source itself can be asked about: short modules, nothing left to do."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator

import pytest
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


def test_one_module_knows_gpt_model() -> None:
    """Upstream has named a successor (docs/hybrid_model.md): the move is to be one module."""
    home = "model/policy_model.py"
    found = [
        f"{file.relative_to(ROOT)}:{node.lineno}"
        for file in modules().values()
        if file.relative_to(ROOT / PACKAGE).as_posix() != home
        for node in ast.walk(tree(file))
        if isinstance(node, ast.Import | ast.ImportFrom)
        and any(
            "models.gpt" in name or name == "GPTModel"
            for name in [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
        )
    ]
    assert_none(found, f"{home} alone imports GPTModel and its specs")


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


SGLANG_API = f"{PACKAGE}.rollout.sglang_api"


def test_paths_of_sglangs_http_api_are_named_in_one_module() -> None:
    paths = sglang_paths()
    assert {"/generate", "/pause_generation", "/server_info", "/weights_checker"} <= paths
    found = [
        f"{file.relative_to(ROOT)}:{line} {text}"
        for module, file in modules().items()
        if module != SGLANG_API
        for line, text in spelled_paths(tree(file), paths)
    ]
    assert_none(found, f"only {SGLANG_API} spells what may change in SGLang's next release")


def sglang_paths() -> set[str]:
    """Values of that module's constants which are paths."""
    found = {
        node.value.value
        for node in tree(modules()[SGLANG_API]).body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
    }
    return {value for value in found if isinstance(value, str) and value.startswith("/")}


def spelled_paths(root: ast.Module, paths: set[str]) -> Iterator[tuple[int, str]]:
    """Strings that have one of `paths` in them (docstrings too), and any path given to a `ServerClient`."""
    word = re.compile("|".join(rf"(?<![\w.}}]){re.escape(path)}(?!\w)" for path in sorted(paths)))
    for node in ast.walk(root):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and word.search(node.value):
            yield node.lineno, word.search(node.value)[0]
        if isinstance(node, ast.Call) and {"deadline", "phase"} <= {key.arg for key in node.keywords}:
            yield from ((node.lineno, ast.unparse(text)) for text in node.args[:1] if is_text(text))


def is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


@pytest.mark.parametrize(
    ("code", "seen"),
    [
        ('client.post("/generate", {})', ["/generate"]),
        ('ask(f"{url}/generate")', ["/generate"]),
        ('client.get("/new_in_the_next_one", deadline=1, phase="p")', ["'/new_in_the_next_one'"]),
        ('"POST /generate; ends when the server dies"', ["/generate"]),
        ('"megatron_laser/generate.py", "/generated"', []),
        ("client.get(PATH, deadline=1, phase=p)", []),
    ],
)
def test_a_path_is_seen_wherever_it_is_spelled(code: str, seen: list[str]) -> None:
    assert [text for _, text in spelled_paths(ast.parse(code), {"/generate"})] == seen


def test_a_function_that_only_passes_is_seen() -> None:
    code = (
        "class P(Protocol):\n    def a(self): ...\ndef b():\n    'Says.'\n    pass\ndef c():\n    return 1\n"
    )
    assert [function.name for function in empty_functions(ast.parse(code))] == ["b"]
