"""Inference on a posterior: importance sampling, particle filters, MCMC."""

from expectax.ppl._keyless import keyed as keyed
from expectax.ppl._keyless import random_key as random_key

from ._ancestors import Ancestors as Ancestors
from ._ancestors import ancestors as ancestors
from ._annealed_importance import annealed_importance as annealed_importance
from ._chains import Chains as Chains
from ._change import change as change
from ._change import check_change as check_change
from ._compositions import pmmh as pmmh
from ._compositions import rmsmc as rmsmc
from ._compositions import smc as smc
from ._compositions import smc2 as smc2
from ._exact import Measure as Measure
from ._exact import exact as exact
from ._hamiltonian import hmc as hmc
from ._hamiltonian import nuts as nuts
from ._importance import importance as importance
from ._kernel import Adaptation as Adaptation
from ._kernel import Info as Info
from ._kernel import Kernel as Kernel
from ._kernel import Stage as Stage
from ._kernel import State as State
from ._mcmc import mcmc as mcmc
from ._particle_filter import Filtered as Filtered
from ._particle_filter import particle_filter as particle_filter
from ._particles import Particles as Particles
from ._persistent import persistent as persistent
from ._population import Population as Population
from ._population import advance as advance
from ._population import extend as extend
from ._population import rejuvenate as rejuvenate
from ._population import resample as resample
from ._population import reweight as reweight
from ._population import spawn as spawn
from ._pseudo_marginal import PseudoMarginal as PseudoMarginal
from ._pseudo_marginal import pseudo_marginal as pseudo_marginal
from ._sampled import Sampled as Sampled
from ._sampled import Schedule as Schedule
from ._smc_over import data_tempered as data_tempered
from ._smc_over import smc_over as smc_over
from ._summary import Row as Row
from ._summary import Summary as Summary
from ._summary import summarize as summarize
from ._target import Flat as Flat
from ._target import Target as Target
from ._tempered import tempered as tempered
from ._valid import assert_valid as assert_valid
from ._weights import effective_sample_size as effective_sample_size
from ._weights import log_mean_exp as log_mean_exp
from ._weights import normalized_weights as normalized_weights

if __name__ != "expectax.inference":
    raise ImportError("import expectax.inference, not inference")
