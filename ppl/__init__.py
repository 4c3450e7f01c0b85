"""Models, traces and targets: the language that every algorithm of expectax shares."""

from ._control import bounded_while as bounded_while
from ._control import cond as cond
from ._control import switch as switch
from ._custom import distribution as distribution
from ._errors import AddressError as AddressError
from ._errors import ControlFlowError as ControlFlowError
from ._errors import DistributionError as DistributionError
from ._errors import ExpectaxError as ExpectaxError
from ._errors import NonFiniteError as NonFiniteError
from ._errors import OutsideModelError as OutsideModelError
from ._errors import ShapeError as ShapeError
from ._errors import StrategyError as StrategyError
from ._errors import SupportError as SupportError
from ._masked import At as At
from ._masked import Masked as Masked
from ._masked import at as at
from ._masked import masked as masked
from ._observe import deterministic as deterministic
from ._observe import factor as factor
from ._observe import observe as observe
from ._posterior import Posterior as Posterior
from ._program import Model as Model
from ._program import Program as Program
from ._program import model as model
from ._sample import sample as sample
from ._selection import Selection as Selection
from ._selection import select as select
from ._trace import Trace as Trace

if __name__ != "expectax.ppl":
    raise ImportError("import expectax.ppl, not ppl")
