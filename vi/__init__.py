"""Programmable variational inference: objectives as programs, and their unbiased gradient estimators."""

from ._antithetic import DisARM as DisARM
from ._bounds import elbo as elbo
from ._bounds import iwelbo as iwelbo
from ._cost import add_cost as add_cost
from ._diagnose import Diagnosis as Diagnosis
from ._diagnose import Noise as Noise
from ._diagnose import diagnose as diagnose
from ._divergences import chi_square as chi_square
from ._divergences import forward_kl as forward_kl
from ._divergences import renyi as renyi
from ._estimators import Estimators as Estimators
from ._estimators import estimators as estimators
from ._expectation import expectation as expectation
from ._fit import Fit as Fit
from ._fit import fit as fit
from ._laplace import Laplace as Laplace
from ._laplace import laplace as laplace
from ._measure_valued import MVD as MVD
from ._objective import Estimate as Estimate
from ._objective import Objective as Objective
from ._objective import estimate as estimate
from ._objective import log_density as log_density
from ._objective import objective as objective
from ._objective import simulate as simulate
from ._objective import value_and_grad as value_and_grad
from ._pareto import pareto_shape as pareto_shape
from ._particle_bounds import fivo as fivo
from ._particle_gradients import dreg as dreg
from ._particle_gradients import stl as stl
from ._particle_gradients import vimco as vimco
from ._relaxed import GumbelSoftmax as GumbelSoftmax
from ._relaxed import NoGradient as NoGradient
from ._relaxed import Rebar as Rebar
from ._relaxed import StraightThrough as StraightThrough
from ._semi_amortised import semi_amortised as semi_amortised
from ._stein import svgd as svgd
from ._strategy import Coupled as Coupled
from ._strategy import Draw as Draw
from ._strategy import Enum as Enum
from ._strategy import Reinforce as Reinforce
from ._strategy import Relaxation as Relaxation
from ._strategy import Reparam as Reparam
from ._tempered import thermodynamic as thermodynamic
from ._wake import wake_guide as wake_guide
from ._wake import wake_model as wake_model
from ._wake import wake_sleep as wake_sleep
from ._with_gradients import with_gradients as with_gradients

if __name__ != "expectax.vi":
    raise ImportError("import expectax.vi, not vi")
