"""The log of a run: records appended to a file, each on disk before its step is applied."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from mezo_scale.errors import TrajectoryError
from mezo_scale.trajectory import codec
from mezo_scale.trajectory.record import Header, StepRecord


class Trajectory:
    """The records of a run: all of them in memory, and in a file if this rank keeps one.

    - ``create`` refuses to overwrite a file. ``open`` reads one; with ``append=True`` it also drops a torn end.
    - ``append`` returns after the record is on disk (flush and fsync): what was returned is never lost.
    - A failed append (disk full) raises and leaves the file as it was before; it is the last that this process tries.
    """

    def __init__(self, header: Header, records: list[StepRecord], file: io.FileIO | None = None) -> None:
        self.header = header
        self.records = records
        self._file = file
        self._failed = ""

    @classmethod
    def create(cls, path: str | os.PathLike[str], header: Header) -> Trajectory:
        """A new file with no records."""
        try:
            file = io.FileIO(path, "x")
        except FileExistsError:
            raise TrajectoryError(f"{path} exists already: continue it, or choose another folder") from None
        except OSError as error:
            raise TrajectoryError(f"{path} can't be created: {error.strerror}") from None
        try:
            _write(file, codec.pack_header(header))
        except OSError as error:
            file.close()
            os.unlink(path)  # half a header would keep the run from starting again
            raise TrajectoryError(f"{path} can't be written: {error.strerror}") from None
        return cls(header, [], file)

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, append: bool = False) -> Trajectory:
        """An existing file, read whole and checked."""
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise TrajectoryError(f"{path} can't be read: {error.strerror}") from None
        trajectory, whole = cls._parse(data, str(path))
        if append:
            try:
                trajectory._file = io.FileIO(path, "r+")
                trajectory._file.truncate(whole)
                trajectory._file.seek(whole)
            except OSError as error:
                raise TrajectoryError(f"{path} can't be continued: {error.strerror}") from None
        return trajectory

    @classmethod
    def parse(cls, data: bytes, where: str = "the trajectory") -> Trajectory:
        """Header and records from a file's bytes; an incomplete last record is left out."""
        return cls._parse(data, where)[0]

    @classmethod
    def _parse(cls, data: bytes, where: str) -> tuple[Trajectory, int]:
        """And how many bytes hold whole steps."""
        header, start = codec.unpack_header(data, where)
        size = codec.record_size(header)
        records: list[StepRecord] = []
        pieces: list[codec.Bits] = []
        unread: tuple[int, ...] | None = ()
        whole = start
        for at in range(start, len(data) - size + 1, size):
            entry = codec.unpack(header, data[at : at + size])
            if entry is None and at + 2 * size > len(data):
                break  # torn: space was reserved, the bytes did not arrive
            if isinstance(entry, codec.Bits) and (entry.step, entry.number) == (len(records), len(pieces)):
                pieces.append(entry)
                unread = codec.unread_of(header, pieces)
            elif isinstance(entry, StepRecord) and entry.step == len(records) and unread is not None:
                records.append(replace(entry, unread=unread))
                pieces, whole = [], at + size
            else:
                raise TrajectoryError(f"{where} is damaged at record {len(records)}: restore the file from a copy")
        return cls(header, records), whole

    def append(self, record: StepRecord) -> None:
        """Add a step; on disk when this returns."""
        if record.step != len(self.records):
            raise TrajectoryError(
                f"step {record.step} can't follow {len(self.records)} records: steps are counted from 0"
            )
        if self._failed:
            raise TrajectoryError(self._failed)
        if self._file is not None:
            before = self.records[-1].unread if self.records else ()
            news = codec.pack_unread(self.header, record) if record.unread != before else b""
            start = self._file.tell()
            try:
                _write(self._file, news + codec.pack(self.header, record))
            except OSError as error:
                self._failed = (
                    f"the trajectory can't be written: {error.strerror}; nothing was applied. Make room, and start the "
                    "run again: it goes on from its last step"
                )
                with suppress(OSError):
                    self._file.truncate(start)
                self.close()
                raise TrajectoryError(self._failed) from None
        self.records.append(record)

    def close(self) -> None:
        """Close the file; the records stay in memory."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Trajectory:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[StepRecord]:
        return iter(self.records)


def _write(file: io.FileIO, data: bytes) -> None:
    """All of the data, on disk. Unbuffered: what could not be written is not written later, in front of something."""
    while data:
        data = data[file.write(data) :]
    os.fsync(file.fileno())
