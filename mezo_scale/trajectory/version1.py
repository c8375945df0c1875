"""Files of version 1, which earlier releases wrote: they are read, and never written.

    magic "MEZOTRJ1" | header length u32 | header CRC-32 u32 | header JSON (UTF-8) | records

A record has no chain value and says nothing of the records before it:

    step u64 | flags u32 | number u32 | loss f64 | K x seed u64 | K x projected gradient f64 | G x K x alpha f32
    | G x decay f32 | CRC-32 u32 of all before it

An entry with flags 2 has the same size, and instead of the loss and what follows a piece of the bitmap of unread
parameters.
"""

from __future__ import annotations

import zlib

import numpy as np

from mezo_scale.errors import TrajectoryError
from mezo_scale.trajectory.codec import unpack_header
from mezo_scale.trajectory.record import Header
from mezo_scale.trajectory.steps import Contents, Steps, check_end, payload, unread_positions

MAGIC = b"MEZOTRJ1"
_UNREAD, _PAYLOAD = 2, 16
_FINAL = (
    "is of version 1, whose last record can't be told from a damaged one: finish the run with the release that began "
    "it, or replay it and begin a new run from that checkpoint"
)


def read(data: bytes, where: str) -> Contents:
    """A file's bytes. Raises TrajectoryError."""
    header, start = unpack_header(data, where)
    slot = np.dtype([("step", "<u8"), ("flags", "<u4"), ("number", "<u4"), *payload(header), ("crc", "<u4")])
    count = (len(data) - start) // slot.itemsize
    slots = np.frombuffer(data, slot, count, start)
    sums, crcs = (zlib.crc32(slots[number : number + 1].tobytes()[:-4]) for number in range(count)), slots["crc"]
    good = next((number for number, found in enumerate(sums) if found != crcs[number]), count)
    is_step, changes = _ordered(header, slots[:good], where)
    steps = int(is_step.sum())
    whole = start + slot.itemsize * (int(np.flatnonzero(is_step)[-1]) + 1 if steps else 0)
    pieces = -(-len(header.manifest) // (8 * (slot.itemsize - _PAYLOAD - 4)))
    check_end(data, whole, start + good * slot.itemsize, good, slot.itemsize, pieces + 1, where)
    unread = [change for change in changes if change[0] < steps]
    return Contents(header, Steps(slots[:good][is_step], unread), whole, len(data), final=_FINAL)


def _ordered(header: Header, slots: np.ndarray, where: str) -> tuple[np.ndarray, list[tuple[int, tuple[int, ...]]]]:
    """Which records are steps, and the whole bitmaps with the steps they belong to. Raises TrajectoryError."""
    is_step = slots["flags"] != _UNREAD
    before = np.cumsum(is_step) - is_step
    wrong = slots["step"] != before.astype(np.uint64)
    changes, bits, room = [], b"", slots.dtype.itemsize - _PAYLOAD - 4
    need = -(-len(header.manifest) // 8)
    for at in np.flatnonzero(~is_step | np.append(False, ~is_step[:-1])).tolist() if len(slots) else ():
        if not is_step[at]:
            wrong[at] |= slots["number"][at] * room != len(bits) or len(bits) >= need
            bits += slots[at : at + 1].tobytes()[_PAYLOAD : _PAYLOAD + room]
        else:
            wrong[at] |= len(bits) < need
            changes.append((int(slots["step"][at]), unread_positions(header, bits)))
            bits = b""
    if wrong.any():
        raise TrajectoryError(f"{where} is damaged at record {int(wrong.argmax())}: restore the file from a copy")
    return is_step, changes
