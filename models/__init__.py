"""Models with their data and, where there is one, their exact answer."""

from . import posteriordb as posteriordb
from ._eight_schools import EFFECT as EFFECT
from ._eight_schools import REFERENCE as REFERENCE
from ._eight_schools import STANDARD_ERROR as STANDARD_ERROR
from ._eight_schools import eight_schools as eight_schools
from ._eight_schools import eight_schools_guide as eight_schools_guide
from ._eight_schools import eight_schools_start as eight_schools_start
from ._nile import LEVEL_SD as LEVEL_SD
from ._nile import NILE as NILE
from ._nile import OBSERVATION_SD as OBSERVATION_SD
from ._nile import Kalman as Kalman
from ._nile import kalman as kalman
from ._nile import local_level as local_level

if __name__ != "expectax.models":
    raise ImportError("import expectax.models, not models")
