"""The noise, version 1, and the sweeps over memory that use it: see `mezo_scale.noise.api`."""

from mezo_scale.noise.api import normal, rademacher, rounding_bits, rows, view, write_
from mezo_scale.noise.kind import NORMAL, RADEMACHER, Noise
from mezo_scale.noise.spec import VERSION, direction_seed, param_id

__all__ = [
    "NORMAL",
    "RADEMACHER",
    "VERSION",
    "Noise",
    "direction_seed",
    "normal",
    "param_id",
    "rademacher",
    "rounding_bits",
    "rows",
    "view",
    "write_",
]
