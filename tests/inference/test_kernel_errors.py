"""What kernels and their tests refuse: each error names the site and says what to do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from expectax import dist, inference, ppl, vi

KEY = jax.random.key(0)
pytestmark = pytest.mark.usefixtures("quick_compiles")


@ppl.model
def model():
    label = ppl.sample("label", dist.Bernoulli(0.3))
    count = ppl.sample("count", dist.Poisson(2.0))
    probs = ppl.sample("probs", dist.Dirichlet(jnp.ones(3)))
    x = ppl.sample("x", dist.Normal(1.0 * label, 1.0))
    t = ppl.sample("t", dist.StudentT(3.0, x, 1.0))
    child = ppl.sample("child", dist.Normal(x, 1.0))
    ppl.sample("y", dist.Normal(t + child + probs[0] + count, 1.0))


POSTERIOR = model().given({"y": 1.0})


def begin(kernel, posterior=POSTERIOR):
    """Start a kernel and move once."""
    target = inference.Target(posterior)

    def run(key):
        latents = posterior.latents(posterior.generate(key)[0].choices)
        state = inference.keyed(lambda z: kernel.init(target, z))(key, latents)
        parameters = kernel.adaptation(target, state).unadapted
        return inference.keyed(lambda s: kernel.step(target, s, parameters))(key, state)

    return run(KEY)


@ppl.model
def other_address(z):
    ppl.sample("lable", dist.Bernoulli(0.5))


@ppl.model
def other_shape(z):
    ppl.sample("x", dist.Normal(jnp.zeros(2), 1.0))


@ppl.model
def in_a_branch(z):
    jax.lax.cond(z["label"] == 1, lambda: ppl.sample("x", dist.Normal(0.0, 1.0)), lambda: 0.0)


@ppl.model
def right(z):
    ppl.sample("x", dist.Normal(z["x"], 1.0))


def scaled(z, u):
    return z, u


I = inference  # noqa: E741
REFUSED = {
    "gibbs of an infinite support": (
        lambda: I.gibbs("count"),
        ppl.ControlFlowError,
        "gibbs: 'count' at .*: no finite|'count'.*no finite",
    ),
    "gibbs of a number": (lambda: I.gibbs("x"), ppl.ControlFlowError, "'x'.*no finite, known support"),
    "gibbs of all": (lambda: I.gibbs(), ppl.ControlFlowError, "no finite, known support"),
    "gibbs of nothing known": (lambda: I.gibbs("lable"), ppl.AddressError, "'lable'.*Did you mean 'label'"),
    "on nothing known": (lambda: I.on("z", I.nuts()), ppl.AddressError, "no site 'z'"),
    "on nothing": (lambda: I.on(ppl.select(), I.nuts()), ppl.ControlFlowError, "selects no latent"),
    "on an index": (lambda: I.on(ppl.select(("probs", ())), I.nuts()), ppl.ControlFlowError, "'probs'.*by index"),
    "nuts on a label": (lambda: I.on("label", I.nuts()), ppl.SupportError, "'label'.*discrete"),
    "mala on a count": (lambda: I.on("count", I.mala()), ppl.SupportError, "'count'.*discrete"),
    "mh without a program": (lambda: I.mh(lambda z: z), TypeError, "mh's proposal.*bound program"),
    "mh of another address": (
        lambda: I.mh(other_address),
        ppl.AddressError,
        "'lable'.*Did you mean 'label'.*involutive",
    ),
    "mh of another shape": (lambda: I.mh(other_shape), ppl.ShapeError, r"'x'.*float32\[2\].*float32\[\]"),
    "mh in a branch": (lambda: I.mh(in_a_branch), ppl.ControlFlowError, "'x'.*branch"),
    "involutive in a branch": (
        lambda: I.on("x", I.involutive(in_a_branch_of_its_own, scaled)),
        ppl.ControlFlowError,
        "'u'.*branch",
    ),
    "involutive on a simplex": (lambda: I.involutive(right, scaled), ppl.SupportError, "'probs'.*no Jacobian"),
    "involution of another shape": (
        lambda: I.on("x", I.involutive(right, lambda z, u: ({"x": jnp.zeros(2)}, u))),
        ppl.ShapeError,
        r"latents, but 'x': float32\[\] became float32\[2\]",
    ),
    "involution that loses one": (
        lambda: I.on("x", I.involutive(right, lambda z, u: (z, {}))),
        ppl.ShapeError,
        "auxiliary choices, but 'x': .* became nothing",
    ),
    "ellipse of a StudentT": (lambda: I.elliptical_slice("t"), ppl.DistributionError, "'t' at .*StudentT"),
    "ellipse of a label": (lambda: I.elliptical_slice("label"), ppl.DistributionError, "'label' at .*Bernoulli"),
    "ellipse of two that depend": (
        lambda: I.elliptical_slice(["x", "child"]),
        ppl.DistributionError,
        "'child' at .*'x'",
    ),
    "mixed density tempered": (
        lambda: I.replica_exchange(I.gibbs("label"), [1.0, 0.5], tempered="density"),
        ppl.ControlFlowError,
        "discrete and continuous",
    ),
}


@ppl.model
def in_a_branch_of_its_own(z):
    jax.lax.cond(z["x"] > 0, lambda: ppl.sample("u", dist.Normal(0.0, 1.0)), lambda: 0.0)


@pytest.mark.parametrize("name", REFUSED)
def test_kernels_refuse(name):
    kernel, error, message = REFUSED[name]
    with pytest.raises(error, match=message) as caught:
        begin(kernel())
    if "' at " in message or "'.*" in message and error is not TypeError:
        assert ".py:" in str(caught.value)


SETTINGS = {
    "mala": (lambda: I.mala(target_acceptance=1.0), ValueError, "target_acceptance.*1.0"),
    "barker": (lambda: I.barker(target_acceptance=0.0), ValueError, "target_acceptance.*0.0"),
    "random_walk": (lambda: I.random_walk(target_acceptance=2.0), ValueError, "target_acceptance.*2.0"),
    "slice": (lambda: I.slice(max_expansions=0), ValueError, "max_expansions.*0"),
    "no function": (lambda: I.mh(3), TypeError, "function"),
    "no involution": (lambda: I.involutive(right, None), TypeError, "involution"),
    "no kernels": (lambda: I.cycle(), ValueError, "at least one"),
    "no kernel": (lambda: I.cycle(I.nuts), TypeError, "needs a kernel"),
    "on no kernel": (lambda: I.on("x", I.nuts), TypeError, "needs a kernel"),
    "weights of another number": (lambda: I.mixture(I.nuts(), weights=[0.5, 0.5]), ValueError, "need 1 weights"),
    "negative weights": (lambda: I.mixture(I.nuts(), I.mala(), weights=[1.0, -1.0]), ValueError, "weights >= 0"),
    "state-dependent weights": (
        lambda: I.mixture(I.nuts(), I.mala(), weights=lambda z: z),
        TypeError,
        "constant numbers",
    ),
    "repeat": (lambda: I.repeat(I.nuts(), 0), ValueError, "count >= 1"),
    "temperatures": (lambda: I.replica_exchange(I.nuts(), [1.0, 1.0]), ValueError, "fall from 1"),
    "first temperature": (lambda: I.replica_exchange(I.nuts(), [0.9, 0.5]), ValueError, "fall from 1"),
    "flat density": (lambda: I.replica_exchange(I.nuts(), [1.0, 0.0], tempered="density"), ValueError, "> 0"),
    "tempered": (lambda: I.replica_exchange(I.nuts(), [1.0, 0.0], tempered="prior"), ValueError, "tempered"),
    "nested replicas": (
        lambda: I.cycle(I.replica_exchange(I.nuts(), [1.0, 0.0]), I.nuts()),
        ppl.ControlFlowError,
        "keeps more than the latents",
    ),
    "repeated replicas": (
        lambda: I.on("x", I.repeat(I.replica_exchange(I.nuts(), [1.0, 0.0]), 2)),
        ppl.ControlFlowError,
        "keeps more than the latents",
    ),
    "step size": (lambda: I.sgld(lambda key: None, step_size=0.0), ValueError, "step_size > 0"),
    "minibatch": (lambda: I.sghmc(None, step_size=0.1), TypeError, "minibatch"),
    "friction": (lambda: I.sghmc(lambda key: None, step_size=0.1, friction=0.0), ValueError, "friction"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_out_of_range_are_refused(name):
    make, error, message = SETTINGS[name]
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    "kernel",
    [I.mala(), I.random_walk(), I.slice(), I.elliptical_slice(), I.mh(right), I.gibbs(), I.cycle(I.mala())],
    ids=lambda kernel: kernel.name,
)
def test_estimated_densities_are_refused(kernel):
    hidden = ppl.model(lambda x: ppl.sample("y", dist.Normal(x + ppl.sample("h", dist.Normal(0.0, 1.0)), 1.0)))

    @ppl.model
    def estimated():
        x = ppl.sample("x", dist.Normal(0.0, 1.0))
        ppl.sample("data", vi.marginal(hidden(x), "y", vi.sir(3)))

    with pytest.raises(ppl.DistributionError, match="only estimated.*pseudo_marginal"):
        begin(kernel, estimated().given({"data": {"y": 0.5}}))


def test_a_minibatch_with_other_latents_is_refused():
    two = ppl.model(lambda: ppl.sample("x", dist.Normal(jnp.zeros(2), 1.0)))
    one = ppl.model(lambda: ppl.sample("x", dist.Normal(0.0, 1.0)))
    with pytest.raises(ppl.ShapeError, match="2 unconstrained numbers, the posterior 1"):
        begin(I.sgld(lambda key: two().given({}), step_size=0.1), one().given({}))


def test_checks_refuse():
    check = inference.check_kernel
    with pytest.raises(ppl.AddressError, match="'yy'.*Did you mean 'y'"):
        check(I.nuts(), model(), "yy", key=KEY)
    with pytest.raises(ppl.ControlFlowError, match="no latent to move"):
        check(I.nuts(), model(), ~ppl.select(), key=KEY)
    with pytest.raises(ValueError, match="num_steps >= 1"):
        check(I.nuts(), model(), "y", key=KEY, num_steps=0)
    with pytest.raises(TypeError, match="typed key"):
        check(I.nuts(), model(), "y", key=jax.random.PRNGKey(0))
    with pytest.raises(ppl.ControlFlowError, match="'.*' at .*no finite, known support.*check_kernel"):
        inference.assert_invariant(I.gibbs(), POSTERIOR)
    coin = ppl.model(lambda: ppl.sample("x", dist.Bernoulli(0.5)))
    walk = I.involutive(ppl.model(lambda z: ppl.sample("u", dist.Normal(0.0, 1.0))), lambda z, u: (z, u))
    with pytest.raises(ppl.ControlFlowError, match="'u'.*check_kernel"):
        inference.assert_invariant(walk, coin().given({}))


def test_an_involution_that_does_not_lead_back_fails_when_it_is_checked():
    once = lambda z, u: ({"x": z["x"] + u["x"]}, u)  # noqa: E731
    there_and_back = lambda z, u: ({"x": z["x"] + u["x"]}, {"x": -u["x"]})  # noqa: E731
    run = lambda f: begin(I.on("x", I.involutive(right, f, check=True)))  # noqa: E731
    run(there_and_back)
    with pytest.raises(Exception, match="not its own inverse"):
        run(once)
    assert np.isfinite(begin(I.on("x", I.involutive(right, once)))[0].log_density)
