"""What DeepSpeed's configurations in ds_configs/ say: the plan counts with the numbers that runs are given."""

import json
from functools import cache
from typing import Any

from mezo_scale.errors import RecipeError
from mezo_scale.recipe.paths import BESIDE, find_beside

CONFIGS = {
    ("float32", None): "ds_configs/zero3.json",
    ("float32", "cpu"): "ds_configs/zero3_offload_cpu.json",
    ("float32", "nvme"): "ds_configs/zero3_offload_nvme.json",
    ("bfloat16", None): "ds_configs/zero3_bf16.json",
    ("bfloat16", "cpu"): "ds_configs/zero3_bf16_offload_cpu.json",
}
"""By what the weights are stored in, and where their shards lie."""


@cache
def zero3_settings(stored: str, offload: str | None) -> dict[str, Any]:
    """`zero_optimization` of the configuration for such shards. Raises RecipeError: there is none."""
    name = CONFIGS.get((stored, offload))
    if name is None:
        raise RecipeError(
            f"zero3 has no configuration for {stored} with shards on {offload or 'devices'}: expected one of "
            f"{', '.join(CONFIGS.values())}"
        )
    path = find_beside(name)
    if path is None:
        raise RecipeError(f"there is no {name} beside the package or in {BESIDE[1]}: install mezo-scale anew")
    settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["zero_optimization"]
    return settings
