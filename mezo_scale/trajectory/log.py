"""The log of a run: records appended to a file, each on disk before its step is applied."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mezo_scale.errors import TrajectoryError
from mezo_scale.trajectory import codec
from mezo_scale.trajectory.record import Header, StepRecord


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
        file.write(codec.pack_header(header))
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
        header, start = codec.unpack_header(data, where)
        size = codec.record_size(header)
        body = data[start:]
        records = []
        for number in range(len(body) // size):
            record = codec.unpack(header, body[number * size : (number + 1) * size])
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
                self._file.write(codec.pack(self.header, record))
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
        whole = len(codec.pack_header(self.header)) + len(self.records) * codec.record_size(self.header)
        return len(data) - whole


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
