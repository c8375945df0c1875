"""Safetensors files that are written tensor by tensor: their headers come first, so all shapes must be known.

The layout is that of https://huggingface.co/docs/safetensors: 8 bytes with the header's length (little-endian), the
header as JSON, the tensors' bytes without gaps.
"""

import contextlib
import errno
import json
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save
from torch import Tensor

PATTERN = "model{suffix}.safetensors"
_INDEX = "model.safetensors.index.json"
_ALIGN = 8


class WeightFiles:
    """The weights of one checkpoint, as transformers names and divides them.

    Args:
        folder: is there, and has no weights yet.
        tensors: names, shapes and dtypes of all that will be written, on the meta device.
        max_file_bytes: of one file's tensors, if it holds more than one.

    Raises:
        OSError: they can't be written. So does `write`, and `close`.
    """

    def __init__(self, folder: Path, tensors: Mapping[str, Tensor], max_file_bytes: int) -> None:
        self._places: dict[str, tuple[BinaryIO, int, Tensor]] = {}
        self._files: list[BinaryIO] = []
        split = split_state_dict_into_shards_factory(
            dict(tensors),
            get_storage_size=lambda tensor: int(tensor.nbytes),
            filename_pattern=PATTERN,
            max_shard_size=max_file_bytes,
        )
        for name, members in split.filename_to_tensors.items():
            file = (folder / name).open("wb")
            self._files.append(file)
            self._begin(file, {member: tensors[member] for member in members})
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            (folder / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def _begin(self, file: BinaryIO, tensors: Mapping[str, Tensor]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end, places = 0, {}
        # Wide elements first, so that each tensor lies where its elements may lie.
        for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].element_size()):
            places[name], end = end, end + tensor.nbytes
            offsets = [places[name], end]
            header[name] = {"dtype": _dtype(tensor.dtype), "shape": list(tensor.shape), "data_offsets": offsets}
        text = json.dumps(header, separators=(",", ":")).encode()
        text = text.ljust(-(-len(text) // _ALIGN) * _ALIGN)
        file.write(struct.pack("<Q", len(text)) + text)
        begin = file.tell()
        self._places |= {name: (file, begin + offset, tensors[name]) for name, offset in places.items()}

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Writes tensors on the CPU to their places. Raises ValueError for one of another shape than was announced."""
        for name, tensor in tensors.items():
            file, offset, expected = self._places.pop(name)
            if (tensor.shape, tensor.dtype) != (expected.shape, expected.dtype):
                raise ValueError(
                    f"{name} is {tuple(tensor.shape)} {tensor.dtype}, announced was {tuple(expected.shape)} "
                    f"{expected.dtype}"
                )
            file.seek(offset)
            file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)

    def close(self) -> None:
        """Raises ValueError if something was announced and not written."""
        if self._places:
            raise ValueError(f"{', '.join(self._places)} were announced and not written")
        for file in self._files:
            file.close()

    def abandon(self) -> None:
        """Closes what can be closed."""
        for file in self._files:
            with contextlib.suppress(OSError):
                file.close()


def sync(paths: Iterable[Path]) -> None:
    """Returns when files and folders are on the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:  # some file systems sync no folders
            if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
        finally:
            os.close(descriptor)


def _dtype(dtype: torch.dtype) -> str:
    """The format's name of a dtype, as the library has it."""
    name: str = json.loads(save({"x": torch.empty(0, dtype=dtype)})[_ALIGN:])["x"]["dtype"]
    return name
