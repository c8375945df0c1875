"""Models: found by name, read, spread over the ranks, and saved."""

from mezo_scale.models.fsdp2 import shard_fsdp2
from mezo_scale.models.load import Loaded, check, load
from mezo_scale.models.zero3 import deepspeed_config

__all__ = ["Loaded", "check", "deepspeed_config", "load", "shard_fsdp2"]
