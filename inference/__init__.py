"""Inference on a posterior: importance sampling, particle filters, MCMC."""

from ._importance import importance as importance
from ._kernels import Kernel as Kernel
from ._kernels import hmc as hmc
from ._kernels import nuts as nuts
from ._mcmc import Chains as Chains
from ._mcmc import mcmc as mcmc
from ._particle_filter import Filtered as Filtered
from ._particle_filter import particle_filter as particle_filter
from ._particles import Particles as Particles
from ._pseudo_marginal import PseudoMarginal as PseudoMarginal
from ._pseudo_marginal import pseudo_marginal as pseudo_marginal
from ._resample import resample as resample
from ._summary import Row as Row
from ._summary import Summary as Summary
from ._summary import summarize as summarize
from ._weights import effective_sample_size as effective_sample_size
from ._weights import log_mean_exp as log_mean_exp
from ._weights import normalized_weights as normalized_weights

if __name__ != "expectax.inference":
    raise ImportError("import expectax.inference, not inference")
