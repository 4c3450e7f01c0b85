"""expectax: probabilistic programming with programmable variational inference in JAX."""

from numpyro import distributions as dist

from . import inference as inference
from . import ppl as ppl
from . import vi as vi
from .ppl import Model as Model
from .ppl import Posterior as Posterior
from .ppl import Program as Program
from .ppl import Trace as Trace
from .ppl import model as model
from .ppl import sample as sample

__version__ = "0.1.0"
__all__ = ["Model", "Posterior", "Program", "Trace", "dist", "inference", "model", "ppl", "sample", "vi"]
