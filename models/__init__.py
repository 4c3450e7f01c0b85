"""Models with their data and, where there is one, their exact answer."""

from . import posteriordb as posteriordb
from ._air import PIXEL_SD as PIXEL_SD
from ._air import PLACE_MEAN as PLACE_MEAN
from ._air import PLACE_SD as PLACE_SD
from ._air import PRESENCE as PRESENCE
from ._air import SMALL_AIR as SMALL_AIR
from ._air import AIRNetworks as AIRNetworks
from ._air import AIRSizes as AIRSizes
from ._air import air as air
from ._air import air_count as air_count
from ._air import air_guide as air_guide
from ._air import air_posterior as air_posterior
from ._amortised import amortised as amortised
from ._cone import CONE_HEIGHT as CONE_HEIGHT
from ._cone import CONE_LOG_EVIDENCE as CONE_LOG_EVIDENCE
from ._cone import cone as cone
from ._cone import cone_guide as cone_guide
from ._cone import cone_posterior as cone_posterior
from ._cone import cone_start as cone_start
from ._cone import ring_guide as ring_guide
from ._cone import ring_start as ring_start
from ._digits import Digits as Digits
from ._digits import canvases as canvases
from ._digits import digits as digits
from ._digits import resized as resized
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
from ._sigmoid_belief import SigmoidBelief as SigmoidBelief
from ._sigmoid_belief import sigmoid_belief as sigmoid_belief
from ._sigmoid_belief import sigmoid_belief_guide as sigmoid_belief_guide
from ._sigmoid_belief import sigmoid_belief_posterior as sigmoid_belief_posterior
from ._spatial import crop as crop
from ._spatial import paste as paste
from ._vae import VAE as VAE
from ._vae import vae as vae
from ._vae import vae_elbo as vae_elbo
from ._vae import vae_guide as vae_guide

if __name__ != "expectax.models":
    raise ImportError("import expectax.models, not models")
