"""What the scripts of this folder share: options, tables, figures, and the timing of the folder above."""

import os

os.environ.setdefault("NPROC", "8")

import argparse
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

sys.path.insert(0, str(Path(__file__).parents[1]))


def options(description: str | None, *, sizes: bool = False, **more: dict[str, Any]) -> argparse.Namespace:
    """Parse `--quick`, `--output`, `--size` where it makes sense, and the script's own options."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke run: few steps, numbers without meaning")
    parser.add_argument("--output", type=Path, default=Path("expectax-output"), help="folder for figures and tables")
    if sizes:
        parser.add_argument("--size", choices=("small", "full"), default="small")
    for name, settings in more.items():
        parser.add_argument(f"--{name}", **settings)
    return parser.parse_args()


def machine() -> str:
    """Say where the numbers come from."""
    return f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, JAX {jax.__version__}"


def report(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]], folder: Path, name: str) -> None:
    """Print a Markdown table and write it to `folder/name.md`."""
    body = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    lines = [f"{title} ({machine()})", "", "| " + " | ".join(header) + " |", "|" + "---|" * len(header), *body]
    text = "\n".join(lines) + "\n"
    print(text, flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text(text)


def panels(rows: int, columns: int, width: float = 3.2, height: float = 3.0) -> tuple[Any, Any]:
    """Return a figure that needs no display, and its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def save(figure: Any, folder: Path, name: str) -> None:
    """Save a figure as `folder/name.png` and say so."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.png"
    figure.savefig(path, dpi=130)
    print(f"figure: {path}", flush=True)
