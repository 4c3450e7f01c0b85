"""`python -m expectax`: one model fitted four ways, and a filter beside its exact answer, on real data."""

import os

os.environ.setdefault("NPROC", "8")  # two batched LAPACK calls at once can deadlock JAX 0.10 on two cores

import argparse
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Run the demonstration; see `--help`."""
    parser = argparse.ArgumentParser(
        prog="python -m expectax",
        description="Fit eight schools (Rubin 1981) by NUTS, importance sampling, the 5-particle importance-weighted "
        "bound and the ELBO; filter the Nile flows (Cobb 1978) with particles beside the exact Kalman filter. Nothing "
        "is downloaded. Prints tables and saves one figure.",
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed (default 0)")
    parser.add_argument(
        "--out", type=Path, default=Path("expectax-output"), help="folder for the figure (default expectax-output)"
    )
    options = parser.parse_args(arguments)
    existing = next(path for path in (options.out, *options.out.absolute().parents) if path.exists())
    if not existing.is_dir():
        parser.error(f"--out {options.out}: {existing} is a file, not a folder")

    from expectax._demo import run

    return run(options.seed, options.out, sys.stdout)


if __name__ == "__main__":
    raise SystemExit(main())
