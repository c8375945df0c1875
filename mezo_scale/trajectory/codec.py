"""The file of a trajectory, version 2: a header, then records of one size, each bound to all bytes before it.

Little-endian; K directions and G parameter groups, which the header says:

    magic "MEZOTRJ2" | header length u32 | header CRC-32 u32 | header JSON (UTF-8) | records

    step u64 | kind u32 | number u32 | synced u64 | payload | chain u64 | CRC-32 u32 of all before it in the record

    STEP 1, SKIP 2    a step, written or skipped; number 0; payload: loss f64 | K x seed u64 | K x projected gradient
                      f64 | G x K x alpha f32 | G x decay f32
    UNREAD 3          before a step from which the set of unread parameters is another: piece `number` of a bitmap
    CLOSE 4           the writer left in order after `step` steps; number 0, payload 0
    5                 reserved for a snapshot

`synced` counts the records that were known to be on the disk when this one was written: all but those of the last few
appends, of which the header's `unsynced` is the most, this record's own among them. `chain` is BLAKE2b with 8 bytes
over the whole file from its first byte up to the chain value itself. So one hash over the file checks it all, and a
record that was moved, left out or taken from another run breaks it.
"""

from __future__ import annotations

import dataclasses
import json
import struct
import zlib
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from mezo_scale.errors import TrajectoryError
from mezo_scale.trajectory.record import Header, StepRecord
from mezo_scale.trajectory.steps import Contents, Rows, Steps, check_end, fill, payload, unread_bits, unread_positions

MAGIC = b"MEZOTRJ2"
STEP, SKIP, UNREAD, CLOSE = 1, 2, 3, 4
_PREFIX = struct.Struct("<8sII")
_PAYLOAD, _TRAILER = 24, 12  # bytes before and after a record's payload


def pack_header(header: Header, magic: bytes = MAGIC) -> bytes:
    """A file's beginning."""
    # What is as it was before there was such a field is left out: a file's header is packed again to find its length.
    given = ((field, getattr(header, field.name)) for field in dataclasses.fields(header))
    present = {field.name: value for field, value in given if value != field.default}
    text = json.dumps(present, sort_keys=True, separators=(",", ":")).encode()
    return _PREFIX.pack(magic, len(text), zlib.crc32(text)) + text


def unpack_header(data: bytes, where: str) -> tuple[Header, int]:
    """The header of a file of any version, and where the rest begins. Raises TrajectoryError."""
    if len(data) < _PREFIX.size:
        raise TrajectoryError(f"{where} has a damaged header: restore the file from a copy")
    _, length, crc = _PREFIX.unpack_from(data)
    text = data[_PREFIX.size : _PREFIX.size + length]
    if len(text) < length or zlib.crc32(text) != crc:
        raise TrajectoryError(f"{where} has a damaged header: restore the file from a copy")
    try:
        return Header(**json.loads(text)), _PREFIX.size + length
    except (TypeError, ValueError, RecursionError):
        raise TrajectoryError(
            f"{where} has a header of another release: use the mezo-scale release that wrote it"
        ) from None


def slot(header: Header) -> np.dtype[np.void]:
    """The dtype of a record."""
    fields = [("step", "<u8"), ("kind", "<u4"), ("number", "<u4"), ("synced", "<u8"), *payload(header)]
    return np.dtype([*fields, ("chain", "<u8"), ("crc", "<u4")])


class Chain:
    """The hash of all that a file holds so far; records are sealed with it as they are added."""

    def __init__(self, begun: bytes) -> None:
        self._hash = blake2b(begun, digest_size=8)

    def seal(self, body: bytes | memoryview) -> bytes:
        """The chain value and the CRC that belong behind a record's body."""
        self._hash.update(body)
        chain = self._hash.digest()
        trailer = chain + struct.pack("<I", zlib.crc32(chain, zlib.crc32(body)))
        self._hash.update(trailer)
        return trailer


def chain_of(sealed: bytes) -> int:
    """The chain value of the last of some sealed records."""
    return int.from_bytes(sealed[-_TRAILER:-4], "little")


def pack_step(header: Header, record: StepRecord, before: tuple[int, ...], synced: int) -> list[bytes]:
    """The records of a step, not yet sealed.

    Args:
        before: the unread parameters of the step before.
        synced: records that are on the disk for certain.
    """
    row = np.zeros(1, slot(header))
    row["step"], row["synced"] = record.step, synced
    row["kind"] = SKIP if record.skipped else STEP
    fill(row, record)
    return [*(_pieces(header, record, synced) if record.unread != before else ()), row.tobytes()[:-_TRAILER]]


def pack_close(header: Header, steps: int, synced: int) -> list[bytes]:
    """The record that says that nothing was left to write, not yet sealed."""
    return [struct.pack("<QIIQ", steps, CLOSE, 0, synced) + bytes(_room(header))]


def read(data: bytes, where: str) -> Contents:
    """A file's bytes, every one of them checked. Raises TrajectoryError."""
    header, start = unpack_header(data, where)
    if header.run_id is None:
        raise TrajectoryError(f"{where} has no run_id in its header: use the mezo-scale release that wrote it")
    size, longest = slot(header).itemsize, header.unsynced * (_number_of_pieces(header) + 1)
    count = (len(data) - start) // size
    good = _verified(data, start, size, count, longest)
    slots = np.frombuffer(data, slot(header), good, start)
    is_step, records = _ordered(header, slots, where)
    whole = start + records * size
    check_end(data, whole, start + good * size, good, size, longest, where)
    slots, is_step = slots[:records], is_step[:records]
    steps = int(is_step.sum())
    rows = slots[:steps] if is_step[:steps].all() else slots[is_step]
    closed = records > 0 and int(slots["kind"][-1]) == CLOSE
    return Contents(header, Steps(rows, _changes(header, slots)), whole, len(data), records, closed)


def _verified(data: bytes, start: int, size: int, count: int, longest: int) -> int:
    """How many records are as they were written, before the first that is not.

    The chain value of a record checks all before it: it is enough to look at the last ones, one by one, where appends
    may be torn. Only if they are wrong themselves, all are looked at.
    """
    first = max(0, count - longest - 1)
    good = _walk(data, start, size, first, count)
    return good if good > first else _walk(data, start, size, 0, count)


def _walk(data: bytes, start: int, size: int, first: int, count: int) -> int:
    view = memoryview(data)
    chain = Chain(view[: start + first * size])  # type: ignore[arg-type]  # any buffer
    for number in range(first, count):
        record = view[start + number * size : start + (number + 1) * size]
        if chain.seal(record[:-_TRAILER]) != record[-_TRAILER:]:
            return number
    return count


def _ordered(header: Header, slots: Rows, where: str) -> tuple[npt.NDArray[np.bool_], int]:
    """Which records are steps, and how many records belong to whole appends.

    Raises:
        TrajectoryError: their order is one that no writer leaves.
    """
    kind, pieces = slots["kind"], _number_of_pieces(header)
    is_step, is_close = (kind == STEP) | (kind == SKIP), kind == CLOSE
    # Of a million records each of these arrays is megabytes: none outlives its use.
    ends = np.arange(1, len(slots) + 1, dtype=np.uint32)
    ends *= is_step | is_close
    np.maximum.accumulate(ends, out=ends)
    records = int(ends[-1]) if len(slots) else 0
    begun = np.concatenate([np.zeros(1, np.uint32), ends[:-1]]) if len(slots) else ends
    del ends
    within = np.arange(len(slots), dtype=np.uint32)
    within -= begun  # pieces of a bitmap before it in its append
    right = np.where(is_step, (within == 0) | (within == pieces), is_close & (within == 0))
    right |= (kind == UNREAD) & (within < pieces)
    within *= kind == UNREAD
    right &= slots["number"] == within
    del within
    right &= slots["step"] == np.cumsum(is_step, dtype=np.uint32) - is_step
    right &= _synced_in_time(slots["synced"], begun, is_step | is_close, header.unsynced)
    if not right.all():
        raise TrajectoryError(f"{where} is damaged at record {int(right.argmin())}: restore the file from a copy")
    return is_step, records


def _synced_in_time(
    synced: Rows, begun: npt.NDArray[np.uint32], is_last: npt.NDArray[np.bool_], unsynced: int
) -> npt.NDArray[np.bool_]:
    """Where no fewer records were on the disk than a writer lets there be.

    Args:
        synced: as the records say, where an append of theirs begins or another one before it.
        begun: per record, where its append begins.
        is_last: whether it is the last one of an append.
        unsynced: as in the header.
    """
    there = np.empty(len(synced), np.uint32)
    np.minimum(synced, begun, out=there, casting="same_kind")
    right: npt.NDArray[np.bool_] = synced == begun[there]
    appends = np.cumsum(is_last, dtype=np.uint32)
    appends -= is_last  # before each record
    appends -= appends[there]  # on the way
    right &= appends < unsynced
    return right


def _changes(header: Header, slots: Rows) -> list[tuple[int, tuple[int, ...]]]:
    """Where the set of unread parameters changes: (first step, positions)."""
    pieces = _number_of_pieces(header)
    changes = []
    for last in np.flatnonzero((slots["kind"] == UNREAD) & (slots["number"] == pieces - 1)).tolist():
        group = (slots[number : number + 1].tobytes() for number in range(last + 1 - pieces, last + 1))
        bits = b"".join(piece[_PAYLOAD:-_TRAILER] for piece in group)
        changes.append((int(slots["step"][last]), unread_positions(header, bits)))
    return changes


def _pieces(header: Header, record: StepRecord, synced: int) -> list[bytes]:
    bits, room = unread_bits(header, record.unread), _room(header)
    starts = enumerate(range(0, len(bits), room))
    return [
        struct.pack("<QIIQ", record.step, UNREAD, number, synced) + bits[start : start + room].ljust(room, b"\0")
        for number, start in starts
    ]


def _number_of_pieces(header: Header) -> int:
    return -(-len(header.manifest) // (8 * _room(header)))


def _room(header: Header) -> int:
    return slot(header).itemsize - _PAYLOAD - _TRAILER
