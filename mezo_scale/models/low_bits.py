"""The low halves of float32 masters in a bfloat16 checkpoint's folder: what rounding "master" knows besides weights."""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from mezo_scale.errors import ModelError
from mezo_scale.models.stream import WeightFiles
from mezo_scale.sharding import Shard
from mezo_scale.sharding.gather import Gather

FOLDER = "low_bits"  # of a checkpoint: transformers reads no weights from folders in it


def planned(shards: Sequence[Shard]) -> dict[str, Tensor]:
    """The tensors that `write` will write, on the meta device."""
    return {shard.name: torch.empty(shard.shape, dtype=shard.local.dtype, device="meta") for shard in shards}


def write(files: WeightFiles | None, shards: Sequence[Shard]) -> OSError | None:
    """Gathers them one by one; every rank calls it, and rank 0 writes as long as it can. Returns what went wrong."""
    gather, error = Gather(shards), None
    for number, shard in enumerate(shards):
        whole = gather(number)
        if files is None or whole is None or error is not None:
            continue
        try:
            files.write({shard.name: whole})
        except OSError as met:
            files.abandon()
            error = met
    return error


def read_(checkpoint: Path, shards: Sequence[Shard]) -> None:
    """Fills a rank's shards from a checkpoint's low bits. Raises ModelError: it has none of that name and shape."""
    places: dict[str, Path] = {}
    for path in (checkpoint / FOLDER).glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            places |= dict.fromkeys(file.keys(), path)
    for shard in shards:
        if shard.name not in places:
            raise ModelError(f"{checkpoint} holds no {shard.name}: take another snapshot, or the base model")
        with safe_open(places[shard.name], framework="pt") as file:
            whole = file.get_tensor(shard.name)
        if (tuple(whole.shape), whole.dtype) != (shard.shape, shard.local.dtype):
            raise ModelError(
                f"{checkpoint} holds {shard.name} as {whole.dtype}{list(whole.shape)}, expected "
                f"{shard.local.dtype}{list(shard.shape)}: take another snapshot, or the base model"
            )
        for offset, start, length in shard.runs.tolist():
            shard.local[offset : offset + length] = whole.view(-1)[start : start + length]
