"""What DeepSpeed's configurations in ds_configs/ say: the plan counts with the numbers that runs are given."""

import json
import sysconfig
from functools import cache
from pathlib import Path
from typing import Any

from mezo_scale.errors import RecipeError

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
    places = (Path(__file__).parents[2], Path(sysconfig.get_path("data")) / "share" / "mezo-scale")
    path = next((place / name for place in places if (place / name).is_file()), None)
    if path is None:
        raise RecipeError(f"there is no {name} beside the package or in {places[1]}: install mezo-scale anew")
    settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["zero_optimization"]
    return settings
