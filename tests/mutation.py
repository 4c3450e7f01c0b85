"""Seeded bugs: does the suite find them? Run by hand: `python tests/mutation.py [part of a name]`; it prints the score.

Each mutant is one change to a copy of the package, with the tests that should fail. First the unchanged copy must pass
them all. A mutant that cannot even be imported counts for nothing and is reported as an error.
"""

import concurrent.futures
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
COPIED = ("src", "ppl", "vi", "inference", "models", "tests", "pyproject.toml", "README.md")
TOGETHER = 2


class Mutant(NamedTuple):
    """A change of `old`, which must occur, to `new`, in a file; and the tests to run."""

    name: str
    file: str
    old: str
    new: str
    tests: str


def population(name: str, old: str, new: str, tests: str = "test_population.py") -> Mutant:
    return Mutant(name, "inference/_population.py", old, new, f"tests/inference/{tests}")


FILTERS = "tests/inference/test_filters_exact.py"
RESAMPLING = "tests/inference/test_weights_resample.py"
SCHEMES = "inference/_resampling_schemes.py"
GIBBS = "tests/inference/test_particle_gibbs.py"
KERNELS = "tests/inference/test_kernels_exact.py"

MUTANTS = [
    population(
        "resampling keeps the old weights",
        "zeros = jnp.zeros_like(population.log_weights)",
        "zeros = population.log_weights",
    ),
    population(
        "resampling forgets the evidence",
        "zeros, population.log_evidence, state)",
        "zeros, population.log_offset, state)",
    ),
    population(
        "an ancestor's state is left behind",
        "(population.latents, population.state))\n        zeros",
        "(population.latents, population.latents))\n        state = population.state\n        zeros",
    ),
    population(
        "an ancestor's past is left behind",
        "latents, state = jax.tree.map(lambda x: x[index], (population.latents, population.state))",
        "latents, state = population.latents, jax.tree.map(lambda x: x[index], population.state)",
    ),
    population("a guided step forgets the proposal's density", "step.log_weight - log_q", "step.log_weight"),
    population(
        "a step's weight replaces the old one",
        "log_weights = population.log_weights + change\n    return Population(posterior, latents, log_weights, population.log_offset, state, time + 1)",
        "log_weights = change\n    return Population(posterior, latents, log_weights, population.log_offset, state, time + 1)",
    ),
    population(
        "reweighting forgets the old density",
        "posterior.log_density_inside(z) - population.posterior.log_density_inside(z)",
        "posterior.log_density_inside(z)",
    ),
    population(
        "extension forgets the old density",
        "outcome.log_weight - log_q - before.log_density_inside(z)",
        "outcome.log_weight - log_q",
    ),
    population("extension forgets the proposal", "outcome.log_weight - log_q - before", "outcome.log_weight - before"),
    population(
        "a spawn by a proposal forgets its density",
        "target.log_density_inside(outcome.choices) - outcome.log_density, []",
        "target.log_density_inside(outcome.choices), []",
    ),
    population(
        "a moved trajectory keeps its old state",
        "state = jax.vmap(lambda z: program.rebind(merged(z, observations)).outputs)(latents)",
        "state = population.state",
    ),
    population(
        "a move targets the whole posterior",
        'return self.posterior if self.time is None else prefix(self.posterior, self.time, "a population")',
        'return self.posterior if self.time is None else prefix(self.posterior, max(self.time - 1, 1), "a population")',
    ),
    population(
        "the threshold is turned round",
        "needed = effective_sample_size(population.log_weights) < threshold",
        "needed = effective_sample_size(population.log_weights) > threshold",
        "test_population.py",
    ),
    Mutant(
        "systematic resampling with one u for each",
        SCHEMES,
        "jax.random.uniform(key, (), weights.dtype), num)",
        "jax.random.uniform(key, (num,), weights.dtype), num)",
        RESAMPLING,
    ),
    Mutant(
        "systematic levels are not spread",
        SCHEMES,
        "ends = jnp.ceil(place - uniform)",
        "ends = jnp.ceil(place - 0.5 * uniform)",
        RESAMPLING,
    ),
    Mutant(
        "the law of systematic resampling is the stratified one",
        "inference/_resampling_laws.py",
        "return jnp.maximum(jnp.min(last) - jnp.max(first), 0.0)",
        "return jnp.prod(jnp.maximum(last - first, 0.0))",
        RESAMPLING,
    ),
    Mutant(
        "residual resampling draws from the whole weights",
        SCHEMES,
        "return whole.astype(jnp.int32), num * weights - whole",
        "return whole.astype(jnp.int32), num * weights",
        RESAMPLING,
    ),
    Mutant(
        "time is turned round",
        "inference/_sequence.py",
        'return self.length - 1 - time if self.cut.scan.params["reverse"] else time',
        "return time",
        "tests/inference/test_population.py",
    ),
    Mutant(
        "a prefix keeps the wrong observations",
        "inference/_sequence.py",
        "kept = slice(sequence.length - time, None) if",
        "kept = slice(None, time) if",
        "tests/inference/test_population.py",
    ),
    Mutant(
        "PMMH makes the present estimate anew",
        "inference/_compositions.py",
        "theta, own = state\n",
        "theta, own = state[0], run(state[0])\n",
        "tests/inference/test_population.py",
    ),
    Mutant(
        "PMMH without the prior",
        "inference/_compositions.py",
        "there = prior.assess_inside(new)[0] + other.log_evidence",
        "there = other.log_evidence",
        "tests/inference/test_population.py",
    ),
    Mutant(
        "PMMH without the way back",
        "inference/_compositions.py",
        "here = prior.assess_inside(theta)[0] + own.log_evidence - proposal(new).assess_inside(theta)[0]",
        "here = prior.assess_inside(theta)[0] + own.log_evidence - moved.log_density",
        "tests/inference/test_population.py",
    ),
    Mutant(
        "SMC squared weighs by the whole evidence",
        "inference/_compositions.py",
        "change = jax.vmap(lambda f: f.log_evidence)(filters) - before",
        "change = jax.vmap(lambda f: f.log_evidence)(filters)",
        "tests/inference/test_population.py",
    ),
    Mutant(
        "SMC squared moves with too short a filter",
        "inference/_compositions.py",
        "num_steps=time)",
        "num_steps=1)",
        "tests/inference/test_population.py",
    ),
    Mutant(
        "a branch that is not taken counts",
        "inference/_exact.py",
        'terms = jnp.where(extras["mask"], terms, jnp.where(first, 0.0, -jnp.inf))',
        "pass",
        "tests/inference/test_exact.py",
    ),
    Mutant(
        "enumeration runs a reversed loop forwards",
        "inference/_exact.py",
        'order = range(length)[:: -1 if eqn.params["reverse"] else 1]',
        "order = range(length)",
        "tests/inference/test_exact.py",
    ),
    # filters, particle Gibbs, smoothing
    Mutant(
        "a filter keeps its weights when it resamples",
        "inference/_filter_steps.py",
        "after = jnp.zeros_like(log_weights) if ahead is None else -ahead[index]",
        "after = log_weights if ahead is None else -ahead[index]",
        FILTERS,
    ),
    Mutant(
        "a look-ahead is not divided out",
        "inference/_filter_steps.py",
        "else -ahead[index]",
        "else jnp.zeros_like(log_weights)",
        FILTERS,
    ),
    Mutant(
        "a filter's evidence leaves the look-ahead out",
        "inference/_filter_steps.py",
        "cloud.log_offset + log_mean, eves",
        "cloud.log_offset + cloud.log_mean, eves",
        FILTERS,
    ),
    Mutant(
        "a guided filter forgets the proposal",
        "inference/_filter_steps.py",
        "as_weight(step.log_weight) - log_q",
        "as_weight(step.log_weight)",
        FILTERS,
    ),
    Mutant(
        "the reference loses its place",
        "inference/_particle_gibbs.py",
        "whole.at[others].set(others_).at[place].set(jnp.asarray(own, whole.dtype))",
        "whole.at[others].set(others_).at[0].set(jnp.asarray(own, whole.dtype))",
        GIBBS,
    ),
    Mutant(
        "ancestor sampling without the future",
        "inference/_particle_gibbs.py",
        "total = weighed(log_weights, jax.vmap(future)(states))",
        "total = log_weights",
        GIBBS,
    ),
    Mutant(
        "the reference's weight counts its own draw",
        "inference/_particle_gibbs.py",
        "marked = nested((path, Unweighed(x)) for path, x in leaves_of(own))",
        "marked = nested((path, x) for path, x in leaves_of(own))",
        GIBBS,
    ),
    Mutant(
        "backward simulation without the transition",
        "inference/_smoothing.py",
        "weighed(jnp.broadcast_to(log_weights, ahead.shape), ahead))",
        "jnp.broadcast_to(log_weights, ahead.shape))",
        "tests/inference/test_smoothing.py",
    ),
    Mutant(
        "a backward move without its ratio",
        "inference/_smoothing.py",
        "-jnp.inf, there - here)",
        "-jnp.inf, 0.0 * there)",
        "tests/inference/test_smoothing.py",
    ),
    # samplers
    Mutant(
        "a temperature weighs from zero",
        "inference/_tempered.py",
        "powered(beta - cloud.beta, cloud.log_ratio)",
        "powered(beta, cloud.log_ratio)",
        "tests/inference/test_tempered.py -k run",
    ),
    Mutant(
        "a kernel for the temperature before",
        "inference/_tempered.py",
        "target = path.at(beta)",
        "target = path.at(cloud.beta)",
        "tests/inference/test_tempered.py -k run",
    ),
    Mutant(
        "a change without its Jacobian",
        "inference/_change.py",
        "return after, jnp.linalg.slogdet(jacobian)[1]",
        "return after, 0.0",
        "tests/inference/test_change.py",
    ),
    Mutant(
        "a change forgets the forward program",
        "inference/_change.py",
        "- log_k + log_jacobian",
        "+ log_jacobian",
        "tests/inference/test_change.py",
    ),
    Mutant(
        "a change forgets the backward program",
        "inference/_change.py",
        "self.after.log_density_inside(new) + log_l -",
        "self.after.log_density_inside(new) -",
        "tests/inference/test_change.py",
    ),
    # kernels
    Mutant(
        "Metropolis without the way back", "inference/_metropolis.py", "+ log_backward - drawn.log_density", "", KERNELS
    ),
    Mutant(
        "Gibbs takes the likeliest value",
        "inference/_gibbs.py",
        'number = sample("value", dist.Categorical(logits=possible))',
        'number = jnp.argmax(possible) + 0 * sample("value", dist.Categorical(logits=possible))',
        KERNELS,
    ),
    Mutant(
        "Gibbs forgets all values but one",
        "inference/_gibbs.py",
        "return _drawn(target, jax.vmap(with_element)(support)), None",
        "return _drawn(target, jax.vmap(with_element)(support[:1])), None",
        KERNELS,
    ),
    Mutant(
        "replicas swap the wrong way",
        "inference/_replica.py",
        "(betas[:-1] - betas[1:]) * (values[1:] - values[:-1])",
        "(betas[:-1] - betas[1:]) * (values[:-1] - values[1:])",
        KERNELS,
    ),
    Mutant(
        "an involution without the auxiliary density",
        "inference/_involutive.py",
        "+ log_backward - drawn.log_density + log_jacobian",
        "+ log_jacobian",
        KERNELS,
    ),
    # chains and calibration
    Mutant(
        "a resumed chain draws with the keys of the first draws",
        "inference/_run.py",
        "own = jax.random.fold_in(key, first + n)",
        "own = jax.random.fold_in(key, n)",
        "tests/inference/test_mcmc_resume.py",
    ),
    Mutant(
        "ranks leave ties out",
        "inference/_sbc.py",
        "return less + jax.random.randint(key, jnp.shape(less), 0, ties + 1)",
        "return less",
        "tests/inference/test_sbc.py",
    ),
]


def copy_of(package: pathlib.Path) -> pathlib.Path:
    """Return a copy of the package and its tests."""
    target = pathlib.Path(tempfile.mkdtemp(prefix="mutant-"))
    for name in COPIED:
        source = package / name
        if source.is_dir():
            shutil.copytree(source, target / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target / name)
    return target


def run_tests(where: pathlib.Path, tests: str) -> tuple[int, str]:
    """Run tests against a copy; return pytest's exit code and output."""
    environment = os.environ | {"PYTHONPATH": str(where / "src"), "PYTHONDONTWRITEBYTECODE": "1", "NPROC": "8"}
    origin = "import expectax; print(expectax.__file__)"
    found = subprocess.run([sys.executable, "-c", origin], env=environment, cwd=where, capture_output=True, text=True)
    if found.returncode == 0:
        assert found.stdout.startswith(str(where)), found.stdout
    command = [sys.executable, "-m", "pytest", "-n0", "-x", "-q", "-m", "not by_hand", *tests.split()]
    done = subprocess.run(command, env=environment, cwd=where, capture_output=True, text=True)
    return done.returncode, done.stdout[-2000:] + done.stderr[-500:]


def judge(mutant: Mutant) -> tuple[str, float]:
    """Return `killed`, `survived` or an error, and the seconds it took."""
    start, where = time.monotonic(), copy_of(ROOT)
    try:
        path = where / mutant.file
        text = path.read_text()
        if mutant.old not in text:
            return "error: the text to change is not there", 0.0
        path.write_text(text.replace(mutant.old, mutant.new))
        code, output = run_tests(where, mutant.tests)
        errors = " error" in output.splitlines()[-1] if output.splitlines() else True
        verdict = {0: "survived", 1: "error: " + output[-300:] if errors else "killed"}.get(
            code, f"error: {output[-300:]}"
        )
        return verdict, time.monotonic() - start
    finally:
        shutil.rmtree(where)


def main() -> int:
    wanted = [m for m in MUTANTS if not sys.argv[1:] or sys.argv[1] in m.name or sys.argv[1] in m.file]
    where = copy_of(ROOT)
    for tests in sorted({m.tests for m in wanted}):
        code, output = run_tests(where, tests)
        if code != 0:
            print(f"the unchanged code fails {tests}:\n{output}")
            return 2
    shutil.rmtree(where)
    with concurrent.futures.ThreadPoolExecutor(TOGETHER) as pool:
        verdicts = list(pool.map(judge, wanted))
    for mutant, (verdict, seconds) in zip(wanted, verdicts, strict=True):
        print(f"{verdict:10} {seconds:5.0f} s  {mutant.file}: {mutant.name}")
    killed = sum(verdict == "killed" for verdict, _ in verdicts)
    print(f"score: {killed} of {len(wanted)} mutants killed ({100 * killed / len(wanted):.0f} %)")
    return 0 if killed >= 0.95 * len(wanted) else 1


if __name__ == "__main__":
    sys.exit(main())
