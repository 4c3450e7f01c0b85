"""Does a guide fit a posterior? The check that every algorithm with a guide or a proposal makes before it runs."""

from __future__ import annotations

from ._errors import AddressError, ControlFlowError, ShapeError, SupportError, nearest
from ._nested import Choices, leaves_of
from ._posterior import Posterior
from ._program import Program
from ._support import contains
from ._table import Entry, choices_of


def check_drawn(table: Choices, what: str) -> None:
    """Refuse a program with data or factors of its own: running it does not draw from the density that it has."""
    for path, entry in leaves_of(table):
        if entry.kind == "observed":
            raise ControlFlowError(
                f"{what}: {path!r} at {entry.site.where} is observed (or a factor) inside the program, whose draws then "
                "have not the density that it gives them. Condition it from outside (program.given), and normalise it "
                "if it is to be drawn from (vi.normalize)."
            )


def check_guide(guide: Program, posterior: Posterior, where: str, covering: bool = False) -> None:
    r"""Refuse a guide whose addresses, shapes or supports do not fit the latents.

    Every latent must have its site in the guide and every site of the guide its latent. A guide's support must lie in
    its latent's (else $E_q[\log p]$ is minus infinity); with `covering`, as importance sampling needs, also the other
    way round.
    """
    table = guide.table()
    check_drawn(table, f"the guide used at {where}")
    sites = dict(leaves_of(choices_of(table)))
    latents = dict(leaves_of(posterior.latent_sites()))
    observed = dict(leaves_of(posterior.observations))
    for path, entry in sites.items():
        if path in observed and path not in latents:
            raise AddressError(f"the guide at {entry.site.where} has a site {path!r}, which the posterior observes.")
        if path not in latents:
            raise AddressError(
                f"the guide's site {path!r} at {entry.site.where} is no latent of the model.{nearest(path, latents)}"
            )
    for path, entry in latents.items():
        if path not in sites:
            raise AddressError(
                f"the guide used at {where} has no site {path!r}, a latent of the model (at {entry.site.where}); its "
                f"posterior would silently be the prior.{nearest(path, sites)}"
            )
        _check_site(path, sites[path], entry, covering)


def _check_site(path: str, guide: Entry, model: Entry, covering: bool) -> None:
    if guide.shape != model.shape:
        raise ShapeError(
            f"site {path!r} has shape {guide.shape} in the guide (at {guide.site.where}) but {model.shape} in the "
            f"model (at {model.site.where})."
        )
    inner, outer = guide.site.support, model.site.support
    if inner is None or outer is None:
        return
    if not contains(outer, inner):
        raise SupportError(
            f"site {path!r}: the guide's support {inner} (at {guide.site.where}) is not inside the model's {outer} "
            f"(at {model.site.where}). Transform the guide's distribution, for instance LogNormal for a positive site."
        )
    if covering and not contains(inner, outer):
        raise SupportError(
            f"site {path!r}: the proposal's support {inner} (at {guide.site.where}) does not cover the model's {outer} "
            f"(at {model.site.where}), so importance weights would be biased."
        )
