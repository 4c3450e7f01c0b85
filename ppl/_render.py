"""A picture of a program: its dependence graph, read off the equations, in Graphviz's language."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
from typing import Any

from ._dependence import dependences
from ._distribution import lane_shape
from ._nested import leaves_of
from ._observe import Recorded
from ._posterior import Posterior
from ._program import Program, program_of
from ._staging import stage
from ._table import Entry


@dataclasses.dataclass(frozen=True)
class Graph:
    """The result of `render`. Example: see `render`.

    Attributes:
        source: the graph in Graphviz's DOT language.
        edges: pairs `(parent, child)` of paths.
    """

    source: str
    edges: tuple[tuple[str, str], ...]

    def __repr__(self) -> str:
        """Show the source."""
        return self.source

    def _repr_svg_(self) -> str | None:
        if shutil.which("dot") is None:
            return None  # notebooks then show the source
        done = subprocess.run(["dot", "-Tsvg"], input=self.source, capture_output=True, text=True, timeout=60)
        return done.stdout if done.returncode == 0 else None


def render(target: Program | Posterior) -> Graph:
    """Draw the dependence of a program's sites: choices as circles, data grey, computed values dashed, plates as boxes.

    Args:
        target: a bound program or a posterior (whose observed sites are grey).

    Returns:
        A graph: an SVG in notebooks where Graphviz's `dot` is installed; `.source` is its text, `.edges` the pairs.

    An edge means that the parent's value enters the child's distribution by some path of deterministic code, or decides
    whether the child is made. Lanes and time steps are plates.

    Example:
        >>> import expectax as ex
        >>> from expectax import dist
        >>> @ex.model
        ... def pair():
        ...     x = ex.sample("x", dist.Normal(0.0, 1.0))
        ...     ex.sample("y", dist.Normal(x, 1.0))
        >>> ex.render(pair()).edges
        (('x', 'y'),)
    """
    program = program_of(target, "render")
    observed = {path for path, _ in leaves_of(target.observations)} if isinstance(target, Posterior) else set()
    staged = stage(program)
    parents = dependences(staged.jaxpr).parents
    entries = dict(leaves_of(staged.table))
    edges = tuple(sorted((parent, child) for child, found in parents.items() for parent in found if parent != child))
    loops = [path for path, found in parents.items() if path in found]
    tree: dict[Any, Any] = {}
    for path, entry in entries.items():
        plate = tree
        for label in _plates(entry):
            plate = plate.setdefault((label,), {})
        plate[path] = _node(path, entry, path in observed)
    lines = ["digraph {", "  rankdir=TB;", *_cluster(tree, "  ", [0])]
    lines += [f"  {json.dumps(a)} -> {json.dumps(b)};" for a, b in edges]
    lines += [
        f'  {json.dumps(path)} -> {json.dumps(path)} [style=dotted, label="next step"];' for path in sorted(loops)
    ]
    return Graph("\n".join([*lines, "}"]), edges)


def _plates(entry: Entry) -> list[str]:
    lanes = entry.site.sizes if isinstance(entry.site, Recorded) else lane_shape(entry.site.lanes)
    return [f"{size} time steps" for size in entry.times] + [f"{size} lanes" for size in lanes]


def _node(path: str, entry: Entry, observed: bool) -> str:
    if entry.kind == "deterministic":
        style = "shape=box, style=dashed"
    elif observed or entry.kind == "observed":
        style = "shape=ellipse, style=filled, fillcolor=lightgrey"
    else:
        style = "shape=ellipse"
    return f"{json.dumps(path)} [{style}];"


def _cluster(tree: dict[Any, Any], indent: str, count: list[int]) -> list[str]:
    lines = []
    for key, value in tree.items():
        if isinstance(value, str):
            lines.append(indent + value)
            continue
        count[0] += 1
        lines += [f"{indent}subgraph cluster_{count[0]} {{", f'{indent}  label="{key[0]}";']
        lines += [*_cluster(value, indent + "  ", count), indent + "}"]
    return lines
