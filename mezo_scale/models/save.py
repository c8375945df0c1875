"""Saves a model in any layout as an ordinary Hugging Face checkpoint: parameter by parameter, whole or not at all.

Of a model with an adapter only that is saved, as PEFT's own folder.
"""

import copy
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from mezo_scale import collectives
from mezo_scale.errors import SharedError
from mezo_scale.models import adapters, low_bits
from mezo_scale.models.conversion import Piece, names_saved, pieces
from mezo_scale.models.stream import WeightFiles, sync
from mezo_scale.sharding import Shard
from mezo_scale.sharding.discovery import modules
from mezo_scale.sharding.gather import Gather, stored

T = TypeVar("T")

MAX_FILE_BYTES = 5_000_000_000


def write(
    model: nn.Module,
    processor: Any,
    directory: Path,
    *,
    max_file_bytes: int = MAX_FILE_BYTES,
    masters: Sequence[Shard] = (),
    seal: Callable[[Path], None] | None = None,
) -> None:
    """Writes weights (safetensors), configuration and processor, or the adapter; every rank calls it.

    Rank 0 writes. It holds its shards, one parameter and another rank's part of that; the others hold their shards and
    such a part. The folder is complete or not there: written beside, synced, then renamed. An older one is replaced.

    Args:
        max_file_bytes: of one file's weights, if it holds more than one.
        masters: the low halves of masters, which go into a folder in it (see `low_bits`).
        seal: called on rank 0 with the folder under its temporary name, as the last that is written there.

    Raises:
        SharedError: it can't be written, on every rank; an older checkpoint is kept.
        ShardingError, ModelError: the model can't be gathered; nothing is written then.
    """
    root: Any = next(module for _, module in modules(model))
    if adapters.config_in(root) is not None:
        _on_first(directory, lambda: _write_adapter(root, directory, seal))
        return
    shards, tied = stored(model)
    gather = Gather(shards)
    numbers = {shard.name: number for number, shard in enumerate(shards)}
    owners = names_saved(root, {name: name for name in numbers} | tied)
    empty = [torch.empty(shard.shape, dtype=shard.local.dtype, device="meta") for shard in shards]
    plan = pieces(root, {name: empty[numbers[owner]] for name, owner in owners.items()})
    beside = directory.with_name(directory.name + ".partial")
    on_first = partial(_on_first, directory)
    try:
        files, low = on_first(
            lambda: _begin(root, processor, directory, beside, plan, low_bits.planned(masters), max_file_bytes)
        ) or (None, None)
        error: OSError | None = None
        for piece in plan:
            # The others gather with rank 0 to the end: they do not know yet what it can't write.
            whole = {name: gather(numbers[owners[name]]) for name in piece.sources}
            if files is not None and error is None:
                error = _write(files, piece, root, whole)
            del whole
        if masters:
            error = low_bits.write(low if error is None else None, masters) or error
        on_first(lambda: _finish([part for part in (files, low) if part], directory, beside, error, seal))
    except SharedError:
        if collectives.rank() == 0:
            shutil.rmtree(beside, ignore_errors=True)
        raise


def _begin(
    root: Any,
    processor: Any,
    directory: Path,
    beside: Path,
    plan: list[Piece],
    masters: dict[str, Tensor],
    max_file_bytes: int,
) -> tuple[WeightFiles, WeightFiles | None]:
    """Everything but the weights."""
    _make_room(directory, beside)
    tensors = {name: tensor for piece in plan for name, tensor in piece.targets.items()}
    size = sum(tensor.nbytes for tensor in (*tensors.values(), *masters.values()))
    free = shutil.disk_usage(beside).free
    if free < size:
        raise OSError(None, f"it takes {size / 1e9:.2f} GB and {free / 1e9:.2f} GB are free")
    root.save_pretrained(beside, state_dict={})
    if getattr(processor, "pads_with_text", False):
        processor = copy.deepcopy(processor)
        processor.pad_token = None
    try:
        processor.save_pretrained(beside)
    except Exception as error:  # tokenizers has no type of its own for the system's errors
        raise error if "os error" not in str(error) else OSError(None, str(error)) from None
    files = WeightFiles(beside, tensors, max_file_bytes)
    if not masters:
        return files, None
    (beside / low_bits.FOLDER).mkdir()
    return files, WeightFiles(beside / low_bits.FOLDER, masters, max_file_bytes)


def _write(files: WeightFiles, piece: Piece, root: Any, whole: dict[str, Tensor | None]) -> OSError | None:
    """What went wrong."""
    try:
        files.write(piece.turned_back(root, {name: tensor for name, tensor in whole.items() if tensor is not None}))
    except OSError as error:
        files.abandon()
        return error
    return None


def _write_adapter(root: Any, directory: Path, seal: Callable[[Path], None] | None) -> None:
    beside = directory.with_name(directory.name + ".partial")
    _make_room(directory, beside)
    try:
        adapters.write(root, beside)
        if seal is not None:
            seal(beside)
        _put_in_place(directory, beside)
    except SafetensorError as error:  # of the system's errors, too
        raise OSError(None, str(error)) from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _make_room(directory: Path, beside: Path) -> None:
    old = _old(directory)
    if old.exists() and not directory.exists():
        old.rename(directory)  # the last one was killed between its two renames
    for leftover in (beside, old):
        shutil.rmtree(leftover, ignore_errors=True)
    beside.mkdir(parents=True)


def _finish(
    parts: list[WeightFiles],
    directory: Path,
    beside: Path,
    error: OSError | None,
    seal: Callable[[Path], None] | None,
) -> None:
    if error is not None:
        raise error
    for files in parts:
        files.close()
    if seal is not None:
        seal(beside)
    _put_in_place(directory, beside)


def _put_in_place(directory: Path, beside: Path) -> None:
    """The folder that is whole takes the place of the older one, if there is one."""
    sync([*beside.rglob("*"), beside])
    replaces = directory.exists()
    if replaces:
        directory.rename(_old(directory))
    try:
        beside.rename(directory)
    except OSError:
        if replaces:
            _old(directory).rename(directory)
        raise
    sync([directory.parent])
    shutil.rmtree(_old(directory), ignore_errors=True)


def _old(directory: Path) -> Path:
    return directory.with_name(directory.name + ".old")


def _on_first(directory: Path, do: Callable[[], T]) -> T | None:
    """What rank 0 alone does while the others wait. Raises SharedError on every rank if the system lets it not."""
    result, said = None, ""
    if collectives.rank() == 0:
        try:
            result = do()
        except OSError as error:
            said = (
                f"the checkpoint {directory} can't be written ({error.strerror or error}): make room or give another "
                "folder, and save again; an older checkpoint is kept"
            )
    if said := collectives.broadcast_bytes(said.encode()).decode():
        raise SharedError(said)
    return result
