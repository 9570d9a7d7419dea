"""The package's source as data: its modules, their imports, and what importing a part leads to.

Imports are read from the syntax tree, those inside functions and calls of `importlib.import_module` included.
A part is a top-level module or package of `megatron_laser`.
"""

from __future__ import annotations

import ast
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "megatron_laser"


@dataclass(frozen=True)
class Import:
    """One imported name: `target` is dotted and absolute, as deep as the statement goes."""

    file: Path
    line: int
    target: str
    at_import_time: bool  # not inside a function or under TYPE_CHECKING

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line} imports {self.target}"


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part_of(module: str) -> str:
    """`megatron_laser.config.schema.root` -> `config`; `megatron_laser` itself -> ``."""
    return [*module.split("."), ""][1]


@cache
def modules() -> dict[str, Path]:
    return {module_name(file): file for file in sorted((ROOT / PACKAGE).rglob("*.py"))}


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), str(file))


def imports_of_tree(root: ast.Module, file: Path, module: str) -> list[Import]:
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]

    def visit(node: ast.AST, at_import_time: bool) -> Iterator[Import]:
        for target in _targets(node, package):
            yield Import(file, node.lineno, target, at_import_time)  # type: ignore[attr-defined]
        for child in ast.iter_child_nodes(node):
            later = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            later |= (
                isinstance(node, ast.If) and child in node.body and "TYPE_CHECKING" in ast.dump(node.test)
            )
            yield from visit(child, at_import_time and not later)

    return list(visit(root, True))


def _targets(node: ast.AST, package: str) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            parents = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*parents, base]).rstrip(".")
        return [f"{base}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        name = ast.unparse(node.func)
        if name in ("importlib.import_module", "import_module", "__import__"):
            return [str(node.args[0].value)]
    return []


@cache
def imports(module: str) -> list[Import]:
    file = modules()[module]
    return imports_of_tree(tree(file), file, module)


def all_imports() -> Iterator[tuple[str, Import]]:
    for module in modules():
        for item in imports(module):
            yield module, item


def own_modules(target: str) -> list[str]:
    """The modules of this package that importing `target` runs: packages on the way included."""
    parts = target.split(".")
    prefixes = (".".join(parts[:depth]) for depth in range(1, len(parts) + 1))
    return [prefix for prefix in prefixes if prefix in modules()]


def is_under(target: str, root: str) -> bool:
    return target == root or target.startswith(root + ".")


def folder_of(module: str) -> str:
    """The package that a module lies in; a package lies in itself."""
    return module if modules()[module].name == "__init__.py" else module.rpartition(".")[0]


def beside(source: str, target: str) -> tuple[str, str]:
    """The first two folders on the ways to `source` and `target` that differ; one lying in the other: the same twice.

    `a.b.c`, `a.d` -> `a.b`, `a.d`.
    """
    ways = source.split("."), target.split(".")
    depth = next((index for index, (one, other) in enumerate(zip(*ways)) if one != other), None)
    if depth is None:
        return source, source
    return ".".join(ways[0][: depth + 1]), ".".join(ways[1][: depth + 1])


def circles(graph: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """The circles that a walk along all edges closes, each once, with its first node again at the end."""
    found: list[list[str]] = []
    done: set[str] = set()

    def walk(node: str, way: list[str]) -> None:
        if node in way:
            found.append([*way[way.index(node) :], node])
        elif node not in done:
            for following in sorted(graph[node]):
                walk(following, [*way, node])
            done.add(node)

    for node in sorted(graph):
        walk(node, [])
    return found


def reach(part: str) -> Iterator[tuple[list[Import], Import]]:
    """All imports that importing `part`'s modules can lead to: (chain of own imports, import at its end).

    Shortest chains first. Inside `part` imports in functions count as well; beyond it only those that run at
    import time.
    """
    todo = deque[tuple[str, list[Import]]]((name, []) for name in modules() if part_of(name) == part)
    seen = {name for name, _ in todo}
    while todo:
        module, chain = todo.popleft()
        for item in imports(module):
            if chain and not item.at_import_time:
                continue
            yield chain, item
            for name in own_modules(item.target):
                if name not in seen:
                    seen.add(name)
                    todo.append((name, [*chain, item]))


def violations(parts: tuple[str, ...], forbidden: str) -> list[str]:
    """For each part that leads to an import of `forbidden`, a shortest way there."""
    found = []
    for part in parts:
        for chain, item in reach(part):
            if is_under(item.target, forbidden):
                found.append(" -> ".join(map(str, [*chain, item])))
                break
    return found


def assert_none(found: list[str], rule: str) -> None:
    assert not found, rule + ":\n  " + "\n  ".join(found)


def attribute_lines(root: ast.Module, dotted: str) -> list[int]:
    """Lines on which the expression `dotted` stands, as code rather than in a string or a comment."""
    return [
        node.lineno
        for node in ast.walk(root)
        if isinstance(node, ast.Attribute) and ast.unparse(node) == dotted
    ]
