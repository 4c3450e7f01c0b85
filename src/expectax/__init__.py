"""expectax: probabilistic programming with programmable variational inference in JAX."""

from numpyro import distributions as dist

from . import inference as inference
from . import models as models
from . import ppl as ppl
from . import vi as vi
from .ppl import Model as Model
from .ppl import Posterior as Posterior
from .ppl import Program as Program
from .ppl import Selection as Selection
from .ppl import Trace as Trace
from .ppl import at as at
from .ppl import block as block
from .ppl import bounded_while as bounded_while
from .ppl import cond as cond
from .ppl import condition as condition
from .ppl import debug as debug
from .ppl import deterministic as deterministic
from .ppl import distribution as distribution
from .ppl import do as do
from .ppl import factor as factor
from .ppl import from_numpyro as from_numpyro
from .ppl import load_trace as load_trace
from .ppl import log_likelihood as log_likelihood
from .ppl import marginalize_discrete as marginalize_discrete
from .ppl import mask as mask
from .ppl import masked as masked
from .ppl import model as model
from .ppl import observe as observe
from .ppl import predictive as predictive
from .ppl import rename as rename
from .ppl import render as render
from .ppl import reparameterize as reparameterize
from .ppl import sample as sample
from .ppl import scale as scale
from .ppl import scope as scope
from .ppl import select as select
from .ppl import shapes as shapes
from .ppl import substitute as substitute
from .ppl import switch as switch
from .ppl import with_data_subsample as with_data_subsample

__version__ = "0.1.0"
__all__ = [
    "Model",
    "Posterior",
    "Program",
    "Selection",
    "Trace",
    "at",
    "block",
    "bounded_while",
    "cond",
    "condition",
    "debug",
    "deterministic",
    "dist",
    "distribution",
    "do",
    "factor",
    "from_numpyro",
    "inference",
    "load_trace",
    "log_likelihood",
    "marginalize_discrete",
    "mask",
    "masked",
    "model",
    "observe",
    "ppl",
    "predictive",
    "rename",
    "render",
    "reparameterize",
    "sample",
    "scale",
    "scope",
    "select",
    "shapes",
    "substitute",
    "switch",
    "vi",
    "with_data_subsample",
]
