"""The trajectory: one small record per step, from which every weight can be rebuilt.

File layout, little-endian:

    magic "MEZOTRJ1" | header length u32 | header CRC-32 u32 | header JSON (UTF-8) | records

A record has a fixed size, known from the header (K directions, G parameter groups):

    step u64 | flags u32 | reserved u32 | loss f64 | K x (seed u64) | K x (projected gradient f64)
    | G x K x (alpha f32) | G x (decay f32) | CRC-32 u32 of all before it

Where the set of parameters that nothing has read changes, entries of the same size stand before the step's record:

    step u64 | flags u32 (2) | number u32 | that many bytes of a bitmap, bit k: parameter k of the manifest is unread
    | CRC-32 u32

Records are appended and on disk before they are applied. A file cut in the middle of its last record lost a step that
nobody applied: the torn end is dropped when the file is next opened for appending. Damage anywhere else is an error.
"""

from __future__ import annotations

import dataclasses
import json
import struct
import zlib
from dataclasses import dataclass

import numpy as np

from mezo_scale.errors import TrajectoryError
from mezo_scale.trajectory.record import Header, StepRecord

MAGIC = b"MEZOTRJ1"
_PREFIX = struct.Struct("<8sII")
_ENTRY = struct.Struct("<QII")
_SKIPPED, _UNREAD = 1, 2


@dataclass(frozen=True, slots=True)
class Bits:
    """A piece of the bitmap of unread parameters, from `step` on."""

    step: int
    number: int
    bits: bytes


def pack_header(header: Header) -> bytes:
    """The file's beginning."""
    # What is as it was before there was such a field is left out: a file's header is packed again to find its length.
    given = ((field, getattr(header, field.name)) for field in dataclasses.fields(header))
    fields = {field.name: value for field, value in given if value != field.default}
    text = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
    return _PREFIX.pack(MAGIC, len(text), zlib.crc32(text)) + text


def unpack_header(data: bytes, where: str) -> tuple[Header, int]:
    """The header, and where the records begin. Raises TrajectoryError."""
    if len(data) < _PREFIX.size or not data.startswith(MAGIC):
        raise TrajectoryError(f"{where} is not a trajectory: it does not begin with {MAGIC.decode()}")
    _, length, crc = _PREFIX.unpack_from(data)
    text = data[_PREFIX.size : _PREFIX.size + length]
    if len(text) < length or zlib.crc32(text) != crc:
        raise TrajectoryError(f"{where} has a damaged header: restore the file from a copy")
    try:
        return Header(**json.loads(text)), _PREFIX.size + length
    except (TypeError, ValueError):
        raise TrajectoryError(
            f"{where} has a header of another release: use the mezo-scale release that wrote it"
        ) from None


def record_size(header: Header) -> int:
    """Bytes of a record, CRC included."""
    return _format(header).size + 4


def pack(header: Header, record: StepRecord) -> bytes:
    """A record's bytes, CRC included."""
    flags = _SKIPPED if record.skipped else 0
    body = _format(header).pack(
        record.step, flags, 0, record.loss, *record.seeds, *record.projected_grads, *record.alphas, *record.decays
    )
    return _with_crc(body)


def pack_unread(header: Header, record: StepRecord) -> bytes:
    """The entries that say which parameters are unread from this record on."""
    unread = np.zeros(len(header.manifest), dtype=bool)
    unread[list(record.unread)] = True
    bits, room = np.packbits(unread, bitorder="little").tobytes(), _room(header)
    pieces = [bits[start : start + room].ljust(room, b"\0") for start in range(0, len(bits), room)]
    entries = (_ENTRY.pack(record.step, _UNREAD, number) + piece for number, piece in enumerate(pieces))
    return b"".join(map(_with_crc, entries))


def unpack(header: Header, data: bytes) -> StepRecord | Bits | None:
    """A record from its bytes; None if they are not what was written."""
    body, (crc,) = data[:-4], struct.unpack("<I", data[-4:])
    if zlib.crc32(body) != crc:
        return None
    step, flags, number = _ENTRY.unpack_from(body)
    if flags == _UNREAD:
        return Bits(step, number, body[_ENTRY.size :])
    _, _, _, loss, *rest = _format(header).unpack(body)
    k, g = header.num_directions, header.num_groups
    alphas = tuple(rest[2 * k : 2 * k + g * k])
    return StepRecord(step, tuple(rest[:k]), tuple(rest[k : 2 * k]), alphas, tuple(rest[2 * k + g * k :]), loss)


def unread_of(header: Header, pieces: list[Bits]) -> tuple[int, ...] | None:
    """Which parameters a whole bitmap names; None while pieces are missing."""
    count = len(header.manifest)
    if len(pieces) * _room(header) * 8 < count:
        return None
    bits = np.frombuffer(b"".join(piece.bits for piece in pieces), dtype=np.uint8)
    return tuple(np.flatnonzero(np.unpackbits(bits, bitorder="little")[:count]).tolist())


def _room(header: Header) -> int:
    return _format(header).size - _ENTRY.size


def _with_crc(body: bytes) -> bytes:
    return body + struct.pack("<I", zlib.crc32(body))


def _format(header: Header) -> struct.Struct:
    """A record before its CRC."""
    k, g = header.num_directions, header.num_groups
    return struct.Struct(f"<QIId{k}Q{k}d{g * k}f{g}f")
