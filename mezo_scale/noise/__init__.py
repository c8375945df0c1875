"""The noise, and the sweeps over memory that use it: see `mezo_scale.noise.api`."""

from mezo_scale.noise.api import factors, normal, rademacher, rounding_bits, rows, view, write_
from mezo_scale.noise.kind import NORMAL, RADEMACHER, Noise
from mezo_scale.noise.low_rank import Factors
from mezo_scale.noise.spec import VERSION, direction_seed, param_id

__all__ = [
    "NORMAL",
    "RADEMACHER",
    "VERSION",
    "Factors",
    "Noise",
    "direction_seed",
    "factors",
    "normal",
    "param_id",
    "rademacher",
    "rounding_bits",
    "rows",
    "view",
    "write_",
]
