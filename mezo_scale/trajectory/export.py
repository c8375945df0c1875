"""The compact form of a trajectory: what a replay needs, and no more.

    magic "MEZOEXP1" | header length u32 | header CRC-32 u32 | header JSON (UTF-8)
    | length u32 | JSON of that length: steps, whether seeds are stored, changes of the unread parameters
    | an LZMA stream of the columns | BLAKE2b of all before it, 16 bytes

Columns: a bitmap of the skipped steps; decays [steps, G] f32 and alphas [steps, G x K] f32, each as four planes of
bytes, in which sign and exponent lie together and compress; seeds [steps, K] u64 if they do not follow from the run's.
Losses and projected gradients are left out: they read as 0, and as NaN where a step was skipped.
"""

from __future__ import annotations

import json
import lzma
import math
import struct
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt

from mezo_scale.errors import TrajectoryError
from mezo_scale.noise import direction_seed
from mezo_scale.trajectory.codec import pack_header, unpack_header
from mezo_scale.trajectory.record import Header
from mezo_scale.trajectory.steps import Contents, Rows, Steps, payload

MAGIC = b"MEZOEXP1"
_DIGEST = 16
_MOST_STEPS = 2**40  # so that no size is beyond what NumPy counts with
_FINAL = "is an export, which holds what a replay needs and no more: continue the run's own trajectory"
_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 0, "pb": 0}]


def pack(header: Header, steps: Steps) -> bytes:
    """A file's bytes."""
    rows = steps.rows
    derived = np.array_equal(rows["seeds"], _seeds(header, len(rows)))
    about = {"steps": len(rows), "seeds": not derived, "unread": steps.unread}
    columns = [np.packbits(_skipped(rows)).tobytes(), _planes(rows["decays"]), _planes(rows["alphas"])]
    if not derived:
        columns.append(rows["seeds"].tobytes())
    text = json.dumps(about, separators=(",", ":")).encode()
    body = lzma.compress(b"".join(columns), format=lzma.FORMAT_RAW, filters=_FILTERS)
    data = pack_header(header, MAGIC) + struct.pack("<I", len(text)) + text + body
    return data + _digest(data)


def read(data: bytes, where: str) -> Contents:
    """Back from a file's bytes. Raises TrajectoryError if they are not those that were written."""
    body, digest = data[:-_DIGEST], data[-_DIGEST:]
    if _digest(body) != digest:
        raise TrajectoryError(f"{where} is damaged: restore the file from a copy, or export the run once more")
    header, start = unpack_header(body, where)
    try:
        about, begin = _about(header, body, start)
        rows = _rows(header, about, _columns(header, about, body[begin:]))
    except (ValueError, RecursionError, struct.error, lzma.LZMAError):
        raise TrajectoryError(
            f"{where} is no export that can be read, though its digest is right: restore the file from a copy, or "
            "export the run once more"
        ) from None
    unread = [(step, tuple(positions)) for step, positions in about["unread"]]
    return Contents(header, Steps(rows, unread), len(data), len(data), final=_FINAL)


def _about(header: Header, body: bytes, start: int) -> tuple[dict[str, Any], int]:
    """What the JSON text says, checked, and where the columns begin. Raises ValueError, struct.error."""
    (length,) = struct.unpack_from("<I", body, start)
    begin = start + 4 + length
    about = json.loads(body[start + 4 : begin])
    if not isinstance(about, dict) or about.keys() != {"steps", "seeds", "unread"}:
        raise ValueError("other fields than an export's")
    steps, unread = about["steps"], about["unread"]
    if type(steps) is not int or not 0 <= steps <= _MOST_STEPS or type(about["seeds"]) is not bool:
        raise ValueError("no number of steps")
    if not isinstance(unread, list) or not all(_is_change(change, header, steps) for change in unread):
        raise ValueError("no changes of unread parameters")
    return about, begin


def _is_change(change: object, header: Header, steps: int) -> bool:
    if not isinstance(change, list) or len(change) != 2 or not isinstance(change[1], list):
        return False
    step, positions = change
    known = all(type(position) is int and 0 <= position < len(header.manifest) for position in positions)
    return known and type(step) is int and 0 <= step < steps


def _sizes(header: Header, steps: int) -> list[int]:
    """Bytes of the columns: skipped, decays, alphas, seeds."""
    k, g = header.num_directions, header.num_groups
    return [-(-steps // 8), 4 * steps * g, 4 * steps * g * k, 8 * steps * k]


def _columns(header: Header, about: dict[str, Any], packed: bytes) -> bytes:
    """The LZMA stream unpacked, no further than it may be long. Raises ValueError, LZMAError."""
    size = sum(_sizes(header, about["steps"])[: 4 if about["seeds"] else 3])
    unpacking = lzma.LZMADecompressor(format=lzma.FORMAT_RAW, filters=_FILTERS)
    columns = unpacking.decompress(packed, max_length=size + 1)
    if len(columns) != size or not unpacking.eof or unpacking.unused_data:
        raise ValueError("other columns than its steps have")
    return columns


def _rows(header: Header, about: dict[str, Any], columns: bytes) -> Rows:
    steps, k, g = about["steps"], header.num_directions, header.num_groups
    sizes = np.cumsum(_sizes(header, steps)).tolist()
    skipped = np.unpackbits(np.frombuffer(columns[: sizes[0]], dtype=np.uint8), count=steps).astype(bool)
    rows = np.zeros(steps, dtype=np.dtype(payload(header)))
    rows["decays"] = _from_planes(columns[sizes[0] : sizes[1]], (steps, g))
    rows["alphas"] = _from_planes(columns[sizes[1] : sizes[2]], (steps, g * k))
    stored = np.frombuffer(columns[sizes[2] :], dtype="<u8")
    rows["seeds"] = stored.reshape(steps, k) if about["seeds"] else _seeds(header, steps)
    rows["loss"][skipped] = math.nan
    rows["grads"][skipped] = math.nan
    return rows


def _skipped(rows: Rows) -> npt.NDArray[np.bool_]:
    finite: npt.NDArray[np.bool_] = np.isfinite(rows["loss"])
    for name in ("grads", "alphas", "decays"):
        finite &= np.isfinite(rows[name]).all(1)
    return ~finite


def _seeds(header: Header, steps: int) -> npt.NDArray[np.uint64]:
    """As they follow from the run's seed: u64 [steps, K]."""
    directions = range(header.num_directions)
    seeds = [[direction_seed(header.seed, step, k) for k in directions] for step in range(steps)]
    return np.array(seeds, dtype=np.uint64).reshape(steps, header.num_directions)


def _planes(values: npt.NDArray[np.float32]) -> bytes:
    """All first bytes, then all second ones, and so on."""
    return np.ascontiguousarray(values).view(np.uint8).reshape(-1, 4).T.tobytes()


def _from_planes(data: bytes, shape: tuple[int, int]) -> npt.NDArray[np.float32]:
    planes = np.frombuffer(data, dtype=np.uint8).reshape(4, -1)
    return np.ascontiguousarray(planes.T).view("<f4").reshape(shape)


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=_DIGEST).digest()
