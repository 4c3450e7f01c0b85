"""Inference on a posterior: importance sampling, particle filters, MCMC."""

from expectax.ppl._keyless import keyed as keyed
from expectax.ppl._keyless import random_key as random_key

from ._chains import Chains as Chains
from ._check_kernel import KernelCheck as KernelCheck
from ._check_kernel import check_kernel as check_kernel
from ._combinators import cycle as cycle
from ._combinators import mixture as mixture
from ._combinators import repeat as repeat
from ._elliptical import elliptical_slice as elliptical_slice
from ._exact import Measure as Measure
from ._exact import exact as exact
from ._gibbs import gibbs as gibbs
from ._hamiltonian import hmc as hmc
from ._hamiltonian import nuts as nuts
from ._importance import importance as importance
from ._invariant import assert_invariant as assert_invariant
from ._involutive import involutive as involutive
from ._kernel import Adaptation as Adaptation
from ._kernel import Info as Info
from ._kernel import Kernel as Kernel
from ._kernel import Stage as Stage
from ._kernel import State as State
from ._langevin import barker as barker
from ._langevin import mala as mala
from ._mcmc import mcmc as mcmc
from ._metropolis import mh as mh
from ._on import on as on
from ._particle_filter import Filtered as Filtered
from ._particle_filter import particle_filter as particle_filter
from ._particles import Particles as Particles
from ._pseudo_marginal import PseudoMarginal as PseudoMarginal
from ._pseudo_marginal import pseudo_marginal as pseudo_marginal
from ._random_walk import random_walk as random_walk
from ._replica import replica_exchange as replica_exchange
from ._resample import resample as resample
from ._slice import slice as slice
from ._stochastic_gradient import sghmc as sghmc
from ._stochastic_gradient import sgld as sgld
from ._summary import Row as Row
from ._summary import Summary as Summary
from ._summary import summarize as summarize
from ._target import Flat as Flat
from ._target import Target as Target
from ._weights import effective_sample_size as effective_sample_size
from ._weights import log_mean_exp as log_mean_exp
from ._weights import normalized_weights as normalized_weights

if __name__ != "expectax.inference":
    raise ImportError("import expectax.inference, not inference")
