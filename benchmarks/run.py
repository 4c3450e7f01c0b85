"""Run the benchmarks: `python benchmarks/run.py [--only NAME] [--out FOLDER]`.

Prints a table and writes `results.json` and `results.md`. Times are warm medians, the candidates taking turns in one
process; the first call (with tracing and compilation) stands apart.
"""

import os

os.environ.setdefault("NPROC", "8")

import argparse
import json
import platform
from pathlib import Path

import jax
from cases import CASES, Row


def table(rows: list[Row]) -> str:
    """Return the rows as a Markdown table."""
    lines = [
        "| benchmark | ours | by hand | ratio | limit | holds | first call, ours / by hand |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        rival = "-" if r.rival is None else f"{r.rival:.2f} {r.unit}"
        ratio = "-" if r.rival is None else f"{r.ratio:.2f}"
        first = "-" if r.first_ours is None else f"{r.first_ours:.0f} {r.unit}"
        first += "" if r.first_rival is None else f" / {r.first_rival:.0f} {r.unit}"
        lines.append(
            f"| {r.name} | {r.ours:.2f} {r.unit} | {rival} | {ratio} | {r.limit:g} | {'yes' if r.holds else 'NO'} | "
            f"{first} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=CASES, help="run one benchmark")
    parser.add_argument("--out", type=Path, default=Path("benchmark-results"))
    options = parser.parse_args()
    names = [options.only] if options.only else list(CASES)
    rows = [row for name in names for row in CASES[name]()]
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, JAX {jax.__version__}"
    text = f"{machine}, {jax.default_backend()}\n\n{table(rows)}\n"
    print(text)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "results.md").write_text(text)
    records = [r._asdict() | {"ratio": r.ratio, "holds": r.holds} for r in rows]
    (options.out / "results.json").write_text(json.dumps({"machine": machine, "rows": records}, indent=1) + "\n")


if __name__ == "__main__":
    main()
