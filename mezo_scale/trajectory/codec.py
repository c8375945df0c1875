"""The trajectory: one small record per step, from which every weight can be rebuilt.

File layout, little-endian:

    magic "MEZOTRJ1" | header length u32 | header CRC-32 u32 | header JSON (UTF-8) | records

A record has a fixed size, known from the header (K directions, G parameter groups):

    step u64 | flags u32 | reserved u32 | loss f64 | K x (seed u64) | K x (projected gradient f64)
    | G x K x (alpha f32) | G x (decay f32) | CRC-32 u32 of all before it

Records are appended and flushed to disk before they are applied. A file cut in the middle of its last record lost a
step
that nobody applied: the torn end is dropped when the file is next opened for appending. Damage anywhere else is an
    error.
"""

from __future__ import annotations

import json
import struct
import zlib

from mezo_scale.errors import TrajectoryError
from mezo_scale.trajectory.record import Header, StepRecord

MAGIC = b"MEZOTRJ1"
_PREFIX = struct.Struct("<8sII")
_SKIPPED = 1


def pack_header(header: Header) -> bytes:
    """The file's beginning."""
    fields = {name: getattr(header, name) for name in header.__slots__}
    if header.frozen is None:
        del fields["frozen"]  # as before there was such a field: a file's header is packed again to find its length
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
    return body + struct.pack("<I", zlib.crc32(body))


def unpack(header: Header, data: bytes) -> StepRecord | None:
    """A record from its bytes; None if they are not what was written."""
    body, (crc,) = data[:-4], struct.unpack("<I", data[-4:])
    if zlib.crc32(body) != crc:
        return None
    step, _, _, loss, *rest = _format(header).unpack(body)
    k, g = header.num_directions, header.num_groups
    alphas = tuple(rest[2 * k : 2 * k + g * k])
    return StepRecord(step, tuple(rest[:k]), tuple(rest[k : 2 * k]), alphas, tuple(rest[2 * k + g * k :]), loss)


def _format(header: Header) -> struct.Struct:
    """A record before its CRC."""
    k, g = header.num_directions, header.num_groups
    return struct.Struct(f"<QIId{k}Q{k}d{g * k}f{g}f")
