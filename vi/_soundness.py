r"""Is an objective continuous in what it differentiates through? Checked on its equations, before it first runs.

For draws $x = g(\epsilon, \theta)$ or $x \sim q_\theta$ the gradient estimators take the derivative of the cost
$f(x, \theta)$ where it has one. That is the derivative of its expectation only if $f$ is continuous along the way: at a
jump of height $h$ on the boundary $u(x, \theta) = 0$ the motion of the boundary over the draws contributes
$h$ times their density there times its speed, which no sample sees. So a *step* (a comparison, `floor`, `argmax`, ...)
in a value that is continuous in draws *and* has a derivative by the parameters, through a reparametrised draw or
beside it, must leave the result continuous. How that is decided:

- every value knows the continuous draws it varies with, whether the parameters move it, and the steps that it may
  still jump at;
- a step in noise alone (a dropout mask), in what score-function draws alone return, or in parameters alone is none; nor
  is one whose outcome no draw changes (`x > 0` of a log-normal);
- an elementwise value made with steps is tried on both sides of every boundary (`_continuity.py`): `where(x > c, x, c)`,
  a Huber or hinge loss, `mask * (x - c)` and `|x - round(x)|` are continuous, `where(x > c, 1, x)` is not;
- whatever else is made of a step (an index, a sum of masks, the state of a loop) still jumps;
- steps inside special functions, neural networks and densities of known libraries (`_reading.py`) are trusted, but for
  those that are jumps by nature; so is a support's test of a value against a bound that stands, unless the value's own
  draws cross it;
- `stop_gradient` ends the dependence: it says that no derivative is wanted. A parameter of a site that jumps, whatever
  the site's strategy, makes its cost jump.

An objective whose result jumps is refused. What is refused and is continuous all the same is let through by
`objective.allowing("address")`, which takes a site out of the check.
"""

from __future__ import annotations

from typing import Any

from expectax.ppl import AddressError, SoundnessError, _jax
from expectax.ppl._errors import nearest
from expectax.ppl._sample import sample_p

from ._reading import Jump, Reader, atom


def check_soundness(jaxpr: Any, allow: frozenset[str] = frozenset(), data: int = 0) -> None:
    """Refuse an objective that jumps where the parameters move; see the top of this file.

    Args:
        jaxpr: closed, made by `flatten`.
        allow: full addresses of sites that are not looked at.
        data: how many of the first inputs are data, which nobody differentiates by.

    Raises:
        SoundnessError: it jumps; the message names the site, the primitive and its place.
        AddressError: `allow` names no site of the objective.
    """
    known = frozenset(_addresses(jaxpr))
    for address in sorted(allow - known):
        raise AddressError(f"allow names {address!r}, which is no site of the objective.{nearest(address, known)}")
    for check in (_check_continuity,):
        check(jaxpr, allow, data)


def _addresses(jaxpr: Any) -> list[str]:
    found: list[str] = []
    for eqn in _jax.close(jaxpr)[0].eqns:
        if eqn.primitive is sample_p:
            found.append(eqn.params["site"].address)
        for inner in _jax.sub_jaxprs(eqn):
            found.extend(_addresses(inner))
    return found


def _check_continuity(jaxpr: Any, allow: frozenset[str], data: int) -> None:
    inputs = [atom(v.aval, moved=n >= data) for n, v in enumerate(jaxpr.jaxpr.invars)]
    reader = Reader(allow)
    result, *_ = reader.run(jaxpr, inputs, ())
    if result.jumps:
        first = min(result.jumps, key=lambda jump: jump.number)
        raise SoundnessError(_message(first, reader.densities.get(first)))


def _message(jump: Jump, density: tuple[str, str] | None) -> str:
    sources = sorted(jump.sources)
    sites = " and ".join(f"{s.address!r} (at {s.where})" for s in sources)
    if jump.support:
        scored = "a density" if density is None else "the density of site {!r} (at {})".format(*density)
        what = f"{scored} falls to zero at a bound that this value moves or crosses ({jump.primitive!r})"
    else:
        what = f"it goes through {jump.primitive!r} at {jump.place}, and the result jumps there"
    if any(s.pathwise for s in sources):
        cure = "Use gradient=vi.Reinforce() (or vi.Enum(), for a finite support) at that site"
    else:
        cure = "The parameters move the step itself: let the site's distribution depend on them, not the step"
    names = ", ".join(sorted({repr(s.address) for s in sources}))
    return (
        f"the objective is not continuous in the value of site {sites}: {what}, so its gradient would be biased. {cure}, "
        "or a continuous cost (jnp.maximum, jnp.clip, jax.nn.sigmoid); if it is continuous after all, "
        f"objective.allowing({names})."
    )
