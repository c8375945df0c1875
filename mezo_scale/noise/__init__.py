"""The noise, and the sweeps over memory that use it: see `mezo_scale.noise.api`."""

from mezo_scale.noise.api import (
    Perturbed,
    factors,
    normal,
    part_of,
    rademacher,
    rounding_bits,
    rows,
    view,
    write_,
    write_all_,
)
from mezo_scale.noise.kind import NORMAL, RADEMACHER, Noise
from mezo_scale.noise.low_rank import Factors
from mezo_scale.noise.parts import Branches, Part
from mezo_scale.noise.spec import VERSION, direction_seed, param_id

__all__ = [
    "NORMAL",
    "RADEMACHER",
    "VERSION",
    "Branches",
    "Factors",
    "Noise",
    "Part",
    "Perturbed",
    "direction_seed",
    "factors",
    "normal",
    "param_id",
    "part_of",
    "rademacher",
    "rounding_bits",
    "rows",
    "view",
    "write_",
    "write_all_",
]
