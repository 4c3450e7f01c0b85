"""Nested dicts by path: the form of choices, constraints and tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

Choices = dict[str, Any]


def leaves_of(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield `(path, leaf)` of a nested dict, paths joined by `/`."""
    for address, value in tree.items():
        here = f"{path}/{address}" if path else str(address)
        if isinstance(value, dict):
            yield from leaves_of(value, here)
        else:
            yield here, value


def nested(pairs: Iterable[tuple[str, Any]]) -> Choices:
    """Return the nested dict of `(path, leaf)` pairs."""
    tree: Choices = {}
    for path, leaf in pairs:
        *scopes, last = path.split("/")
        inner = tree
        for scope in scopes:
            inner = inner.setdefault(scope, {})
        inner[last] = leaf
    return tree


def merged(*trees: Choices) -> Choices:
    """Return the union of nested dicts; of two leaves at one path the later one stays."""
    return nested(pair for tree in trees for pair in leaves_of(tree))
