"""Every flag that an attack can raise is explained."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import fedmi.attacks
from fedmi.leakage.flags import EXPLANATIONS

SOURCES = Path(fedmi.attacks.__file__).parent
CALLS = {"_flagged", "flagged"}
"""Functions that are given flags by name."""


@cache
def constants() -> dict[str, set[str]]:
    """NAME -> the strings that modules of attacks give that name."""
    found: dict[str, set[str]] = {}
    for tree in trees():
        for node in tree.body:
            if isinstance(node, ast.Assign):
                for name, value in _named(node.targets[0], node.value):
                    found.setdefault(name, set()).add(value)
    return found


@cache
def trees() -> tuple[ast.Module, ...]:
    return tuple(ast.parse(path.read_text()) for path in sorted(SOURCES.rglob("*.py")))


def _named(target: ast.expr, value: ast.expr) -> Iterator[tuple[str, str]]:
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
        for one, other in zip(target.elts, value.elts, strict=True):
            yield from _named(one, other)
    elif isinstance(target, ast.Name) and isinstance(value, ast.Constant):
        yield target.id, str(value.value)


def flags_in(tree: ast.Module) -> set[str]:
    """Strings, or constants that stand for them, in sets within functions and in calls that flag.

    Sets of a class's own (channels, schemas, kinds of malice) are no flags.
    """
    found = set[str]()
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        for node in ast.walk(function):
            if isinstance(node, ast.Set):
                found |= {text for part in node.elts for text in _texts(part)}
            if isinstance(node, ast.Call) and _called(node) in CALLS:
                found |= {text for part in node.args for text in _texts(part)}
            if isinstance(node, ast.Call) and _called(node) == "add" and node.args:
                on = node.func.value if isinstance(node.func, ast.Attribute) else None
                if isinstance(on, ast.Name) and "flag" in on.id:
                    found |= _texts(node.args[0])
    return {text.partition(":")[0] for text in found if "_" in text}


def _called(node: ast.Call) -> str:
    if isinstance(node.func, ast.Attribute):
        return node.func.attr
    return node.func.id if isinstance(node.func, ast.Name) else ""


def _texts(node: ast.expr) -> set[str]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return {node.value}
    if isinstance(node, ast.JoinedStr) and node.values:
        return _texts(node.values[0])
    if isinstance(node, ast.Name) and node.id.isupper():
        return constants().get(node.id, set())
    if isinstance(node, ast.IfExp):
        return _texts(node.body) | _texts(node.orelse)
    return set()


def test_every_flag_of_an_attack_is_explained() -> None:
    found = set[str]().union(*map(flags_in, trees()))
    assert len(found) > 30
    assert {"start_kept", "labels_not_distinct", "sentences_not_found"} <= found
    assert found - EXPLANATIONS.keys() == set()


def test_the_scan_sees_a_flag_that_is_new() -> None:
    tree = ast.parse('def f(flags):\n    return flags | {"never_heard_of"}\n')
    assert flags_in(tree) - EXPLANATIONS.keys() == {"never_heard_of"}
