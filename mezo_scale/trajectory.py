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
import math
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mezo_scale.errors import TrajectoryError

MAGIC = b"MEZOTRJ1"
_PREFIX = struct.Struct("<8sII")
_SKIPPED = 1


@dataclass(frozen=True, slots=True)
class StepRecord:
    """The second waist: all that one step was, in scalars.

    Attributes:
        step: counted from 0.
        seeds: one per direction.
        projected_grads: (L+ - L-) / (2 eps) per direction, as measured; not finite if a loss was not.
        alphas: the float32 multipliers of z, direction by direction; with several parameter groups group by group.
        decays: the float32 multiplier of the weights, one per parameter group.
        loss: mean over all branches.
    """

    step: int
    seeds: tuple[int, ...]
    projected_grads: tuple[float, ...]
    alphas: tuple[float, ...]
    decays: tuple[float, ...]
    loss: float

    @property
    def decay(self) -> float:
        """The first parameter group's multiplier of the weights."""
        return self.decays[0]

    @property
    def skipped(self) -> bool:
        """Whether something in the step is not finite, so that it writes nothing."""
        return not all(math.isfinite(v) for v in (self.loss, *self.projected_grads, *self.alphas, *self.decays))

    def alphas_of(self, group: int) -> tuple[float, ...]:
        """The multipliers of one parameter group's directions."""
        count = len(self.seeds)
        return self.alphas[group * count : (group + 1) * count]


@dataclass(frozen=True, slots=True)
class Header:
    """What a trajectory belongs to: refused for any other model, noise or arithmetic.

    Attributes:
        noise_version: see `mezo_scale.noise.VERSION`.
        fingerprint: of the values the weights had before the first step, whatever their layout.
        manifest: per trainable parameter [name, shape, dtype, parameter group, decayed].
        num_directions, num_groups: the record's size follows from them.
        distribution, rounding: how z is drawn and how updates are stored.
        seed, eps: the run's; for the record, a replay needs neither.
    """

    noise_version: int
    fingerprint: str
    manifest: list[list[Any]]
    num_directions: int
    num_groups: int
    distribution: str
    rounding: str
    seed: int
    eps: float

    def record_format(self) -> struct.Struct:
        """The record before its CRC."""
        k, g = self.num_directions, self.num_groups
        return struct.Struct(f"<QIId{k}Q{k}d{g * k}f{g}f")

    def pack(self) -> bytes:
        """The file's beginning."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        text = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
        return _PREFIX.pack(MAGIC, len(text), zlib.crc32(text)) + text

    def check_same(self, other: Header, where: str) -> None:
        """Raise a TrajectoryError that says what differs, if ``other`` is not what this header was written for."""
        if self.noise_version != other.noise_version:
            raise TrajectoryError(
                f"{where} was made with noise version {self.noise_version}, this is version {other.noise_version}: "
                "use the mezo-scale release that wrote it"
            )
        if self.manifest != other.manifest:
            raise TrajectoryError(f"{where} belongs to another model: {_difference(self.manifest, other.manifest)}")
        if self.fingerprint != other.fingerprint:
            raise TrajectoryError(
                f"{where} starts from other weights (fingerprint {self.fingerprint}, these have {other.fingerprint}): "
                "give the base model it was trained from, loaded in the same dtype"
            )
        for name in ("num_directions", "num_groups", "distribution", "rounding"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise TrajectoryError(
                    f"{where} was written with {name} = {mine}, this run has {theirs}: set it to {mine}"
                )


class Trajectory:
    """The records of a run: all of them in memory, and in a file if this rank keeps one.

    - ``create`` refuses to overwrite a file. ``open`` reads one; with ``append=True`` it also drops a torn end.
    - ``append`` returns after the record is on disk (flush and fsync): what was returned is never lost.
    - A failed append (disk full) raises and leaves the file as it was before.
    """

    def __init__(self, header: Header, records: list[StepRecord], file: Any = None) -> None:
        self.header = header
        self.records = records
        self._file = file

    @classmethod
    def create(cls, path: str | os.PathLike[str], header: Header) -> Trajectory:
        """A new file with no records."""
        try:
            file = open(path, "xb")  # noqa: SIM115 - kept open for the run
        except FileExistsError:
            raise TrajectoryError(f"{path} exists already: continue it, or choose another folder") from None
        except OSError as error:
            raise TrajectoryError(f"{path} can't be created: {error.strerror}") from None
        file.write(header.pack())
        _sync(file)
        return cls(header, [], file)

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, append: bool = False) -> Trajectory:
        """An existing file, read whole and checked."""
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise TrajectoryError(f"{path} can't be read: {error.strerror}") from None
        trajectory = cls.parse(data, str(path))
        if append:
            file = open(path, "r+b")  # noqa: SIM115 - kept open for the run
            file.truncate(len(data) - trajectory._torn(data))
            file.seek(0, os.SEEK_END)
            trajectory._file = file
        return trajectory

    @classmethod
    def parse(cls, data: bytes, where: str = "the trajectory") -> Trajectory:
        """Header and records from a file's bytes; an incomplete last record is left out."""
        if len(data) < _PREFIX.size or not data.startswith(MAGIC):
            raise TrajectoryError(f"{where} is not a trajectory: it does not begin with {MAGIC.decode()}")
        _, length, crc = _PREFIX.unpack_from(data)
        text = data[_PREFIX.size : _PREFIX.size + length]
        if len(text) < length or zlib.crc32(text) != crc:
            raise TrajectoryError(f"{where} has a damaged header: restore the file from a copy")
        try:
            header = Header(**json.loads(text))
        except (TypeError, ValueError):
            raise TrajectoryError(
                f"{where} has a header of another release: use the mezo-scale release that wrote it"
            ) from None
        size = header.record_format().size + 4
        body = data[_PREFIX.size + length :]
        records = []
        for number in range(len(body) // size):
            record = _unpack(header, body[number * size : (number + 1) * size])
            last = (number + 1) * size > len(body) - size
            if record is None and last:
                break  # torn: space was reserved, the bytes did not arrive
            if record is None or record.step != number:
                raise TrajectoryError(f"{where} is damaged at record {number}: restore the file from a copy")
            records.append(record)
        return cls(header, records)

    def append(self, record: StepRecord) -> None:
        """Add a step; on disk when this returns."""
        if record.step != len(self.records):
            raise TrajectoryError(
                f"step {record.step} can't follow {len(self.records)} records: steps are counted from 0"
            )
        if self._file is not None:
            start = self._file.tell()
            try:
                self._file.write(pack(self.header, record))
                _sync(self._file)
            except OSError as error:
                self._file.seek(start)
                self._file.truncate(start)
                raise TrajectoryError(
                    f"the trajectory can't be written: {error.strerror}; nothing was applied"
                ) from None
        self.records.append(record)

    def close(self) -> None:
        """Close the file; the records stay in memory."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[StepRecord]:
        return iter(self.records)

    def _torn(self, data: bytes) -> int:
        size = self.header.record_format().size + 4
        whole = len(self.header.pack()) + len(self.records) * size
        return len(data) - whole


def pack(header: Header, record: StepRecord) -> bytes:
    """A record's bytes, CRC included."""
    flags = _SKIPPED if record.skipped else 0
    body = header.record_format().pack(
        record.step, flags, 0, record.loss, *record.seeds, *record.projected_grads, *record.alphas, *record.decays
    )
    return body + struct.pack("<I", zlib.crc32(body))


def _unpack(header: Header, data: bytes) -> StepRecord | None:
    body, (crc,) = data[:-4], struct.unpack("<I", data[-4:])
    if zlib.crc32(body) != crc:
        return None
    step, _, _, loss, *rest = header.record_format().unpack(body)
    k, g = header.num_directions, header.num_groups
    alphas = tuple(rest[2 * k : 2 * k + g * k])
    return StepRecord(step, tuple(rest[:k]), tuple(rest[k : 2 * k]), alphas, tuple(rest[2 * k + g * k :]), loss)


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _difference(mine: list[list[Any]], theirs: list[list[Any]]) -> str:
    """The first thing in which two manifests differ, in words."""
    for one, other in zip(mine, theirs, strict=False):
        if one != other:
            return f"it has {_entry(one)}, the model has {_entry(other)}"
    return f"it has {len(mine)} trainable parameters, the model has {len(theirs)}"


def _entry(entry: list[Any]) -> str:
    name, shape, dtype, group, decayed = entry
    return f"{name} {dtype}{shape} (group {group}{', decayed' if decayed else ''})"
