"""Models, traces and targets: the language that every algorithm of expectax shares."""

from ._block import block as block
from ._control import bounded_while as bounded_while
from ._control import cond as cond
from ._control import switch as switch
from ._custom import distribution as distribution
from ._debug import Finding as Finding
from ._debug import debug as debug
from ._errors import AddressError as AddressError
from ._errors import ControlFlowError as ControlFlowError
from ._errors import DistributionError as DistributionError
from ._errors import ExpectaxError as ExpectaxError
from ._errors import NonFiniteError as NonFiniteError
from ._errors import OutsideModelError as OutsideModelError
from ._errors import ShapeError as ShapeError
from ._errors import SoundnessError as SoundnessError
from ._errors import StorageError as StorageError
from ._errors import StrategyError as StrategyError
from ._errors import SupportError as SupportError
from ._marginalize import marginalize_discrete as marginalize_discrete
from ._masked import At as At
from ._masked import Masked as Masked
from ._masked import at as at
from ._masked import masked as masked
from ._numpyro import from_numpyro as from_numpyro
from ._observe import deterministic as deterministic
from ._observe import factor as factor
from ._observe import observe as observe
from ._posterior import Posterior as Posterior
from ._predictive import log_likelihood as log_likelihood
from ._predictive import predictive as predictive
from ._program import Model as Model
from ._program import Program as Program
from ._program import model as model
from ._render import Graph as Graph
from ._render import render as render
from ._reparameterize import reparameterize as reparameterize
from ._sample import sample as sample
from ._selection import Selection as Selection
from ._selection import select as select
from ._shapes import Shapes as Shapes
from ._shapes import shapes as shapes
from ._storage import load_trace as load_trace
from ._trace import Trace as Trace
from ._transforms import condition as condition
from ._transforms import do as do
from ._transforms import mask as mask
from ._transforms import rename as rename
from ._transforms import scale as scale
from ._transforms import scope as scope
from ._transforms import substitute as substitute
from ._transforms import with_data_subsample as with_data_subsample

if __name__ != "expectax.ppl":
    raise ImportError("import expectax.ppl, not ppl")
