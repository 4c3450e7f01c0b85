"""Programmable variational inference: objectives as programs, and their unbiased gradient estimators."""

from ._bounds import elbo as elbo
from ._bounds import iwelbo as iwelbo
from ._fit import Fit as Fit
from ._fit import fit as fit
from ._objective import Estimate as Estimate
from ._objective import Objective as Objective
from ._objective import estimate as estimate
from ._objective import log_density as log_density
from ._objective import objective as objective
from ._objective import simulate as simulate
from ._objective import value_and_grad as value_and_grad
from ._strategy import Enum as Enum
from ._strategy import Reinforce as Reinforce
from ._strategy import Reparam as Reparam

if __name__ != "expectax.vi":
    raise ImportError("import expectax.vi, not vi")
