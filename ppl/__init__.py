"""Models, traces and targets: the language that every algorithm of expectax shares."""

from ._errors import AddressError as AddressError
from ._errors import ControlFlowError as ControlFlowError
from ._errors import DistributionError as DistributionError
from ._errors import ExpectaxError as ExpectaxError
from ._errors import NonFiniteError as NonFiniteError
from ._errors import OutsideModelError as OutsideModelError
from ._errors import ShapeError as ShapeError
from ._errors import StrategyError as StrategyError
from ._errors import SupportError as SupportError
from ._posterior import Posterior as Posterior
from ._program import Model as Model
from ._program import Program as Program
from ._program import Trace as Trace
from ._program import model as model
from ._sample import sample as sample

if __name__ != "expectax.ppl":
    raise ImportError("import expectax.ppl, not ppl")
