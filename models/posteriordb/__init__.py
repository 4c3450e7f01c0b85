"""Twelve posteriors of posteriordb, each with its data, Stan's log density and gradient, and reference statistics.

posteriordb (https://github.com/stan-dev/posteriordb, BSD-3-Clause; its notice is `data/LICENSE`) is a collection of
posteriors written in Stan, with long reference runs. Here they are expectax programs that agree with Stan's densities.
"""

from ._blr import blr as blr
from ._garch import garch11 as garch11
from ._gaussian_process import gp_regr as gp_regr
from ._hidden_markov import HiddenMarkovNormal as HiddenMarkovNormal
from ._hidden_markov import hmm_example as hmm_example
from ._kidiq import kidscore_momiq as kidscore_momiq
from ._load import StanPosterior as StanPosterior
from ._load import load as load
from ._load import names as names
from ._logearn import logearn_height as logearn_height
from ._lotka_volterra import lotka_volterra as lotka_volterra
from ._mesquite import logmesquite_logvash as logmesquite_logvash
from ._mixture import low_dim_gauss_mix as low_dim_gauss_mix
from ._nes import nes as nes
from ._records import Points as Points
from ._records import Reference as Reference
from ._restricted import Restricted as Restricted
from ._wells import wells_dist as wells_dist
