"""The log of a run: records appended to a file, each written before its step is applied, and soon on the disk."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import overload

import numpy as np

from mezo_scale.errors import TrajectoryError
from mezo_scale.trajectory import codec, export, version1
from mezo_scale.trajectory.file import LogFile, place
from mezo_scale.trajectory.lock import Lock
from mezo_scale.trajectory.record import Header, StepRecord
from mezo_scale.trajectory.steps import Contents, Steps

_READERS = {codec.MAGIC: codec.read, version1.MAGIC: version1.read, export.MAGIC: export.read}
_CLOSED = "the trajectory was closed: open it again to go on"


class Trajectory(Sequence[StepRecord]):
    """The records of a run, in the order of its steps: in memory, and in a file if this rank keeps one.

    - ``create`` refuses to overwrite a file. ``open`` reads one and checks every byte; with ``append=True`` it goes on.
    - Whoever appends holds a lock until ``close`` or ``release``: there is one writer, in this process and in all.
    - ``append`` returns after the record is written: no kill loses it. A thread brings it to the disk (fsync). An
      append waits while `header.unsynced` steps, or one from more than a second before, are not there yet: a power
      loss takes no more than these. ``sync`` waits for all of them.
    - A failed write (disk full, a failed fsync) raises, at once or from the next call, and is the last that this object
      tries. What is not on the disk for certain is taken away.
    - An end that a crash has torn is left out with a warning. Opening writes nothing; the first append moves the torn
      bytes into ``<path>.torn`` before it takes their place.
    """

    def __init__(self, header: Header, steps: Steps | None = None) -> None:
        self.header = header
        self.steps = steps if steps is not None else Steps(np.zeros(0, codec.slot(header)))
        self._file: LogFile | None = None
        self._failed = ""

    @classmethod
    def create(cls, path: str | os.PathLike[str], header: Header) -> Trajectory:
        """A new file with no records. Draws the header's `run_id` if it has none.

        Raises:
            TrajectoryError: the file exists, another process is about to make it, or it can't be written.
        """
        header = header if header.run_id is not None else replace(header, run_id=os.urandom(16).hex())
        trajectory, begun = cls(header), codec.pack_header(header)
        with ExitStack() as undo:
            lock = _lock(path, "created", undo)
            if os.path.lexists(path):
                raise TrajectoryError(f"{path} exists already: continue it, or choose another folder")
            try:
                place(path, begun)
                trajectory._file = LogFile(
                    path, lock, begun, Contents(header, trajectory.steps, len(begun), len(begun), closed=True)
                )
            except OSError as error:
                raise TrajectoryError(f"{path} can't be written: {error.strerror}") from None
            undo.pop_all()
        return trajectory

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, append: bool = False, at_least: int = 0) -> Trajectory:
        """An existing file, read whole and checked.

        Args:
            append: go on with it, as its only writer.
            at_least: steps that are known to have been taken: with fewer the file has lost some.

        Raises:
            TrajectoryError: it can't be read, is damaged or too short, or another process writes it; to append to: it
                is of version 1, or an export.
        """
        with ExitStack() as undo:
            lock = _lock(path, "continued", undo) if append else None
            data = _read_bytes(path)
            contents = _contents(data, str(path))
            trajectory = cls(contents.header, contents.steps)
            if len(trajectory) < at_least:
                raise TrajectoryError(
                    f"{path} holds {len(trajectory)} steps, but {at_least} were taken, as the files beside it "
                    "say: restore the file from a copy"
                )
            if lock is not None:
                if contents.final:
                    raise TrajectoryError(f"{path} {contents.final}")
                try:
                    trajectory._file = LogFile(path, lock, data[: contents.whole], contents)
                except OSError as error:
                    raise TrajectoryError(f"{path} can't be continued: {error.strerror}") from None
            undo.pop_all()
        return trajectory

    @classmethod
    def parse(cls, data: bytes, where: str = "the trajectory") -> Trajectory:
        """Header and records from a file's bytes. Raises TrajectoryError."""
        contents = _contents(data, where)
        return cls(contents.header, contents.steps)

    @property
    def synced(self) -> int:
        """Steps that are on the disk for certain; 0 where this object keeps no file, or no longer."""
        return self._file.synced.steps if self._file is not None else 0

    def append(self, record: StepRecord) -> None:
        """Add a step: written when this returns, and on its way to the disk.

        Raises:
            TrajectoryError: it is not the next one, or can't be written, or one before it did not come to the disk;
                then nothing has changed.
            ValueError: its numbers of directions and groups are not the header's.
        """
        if record.step != len(self):
            raise TrajectoryError(f"step {record.step} can't follow {len(self)} records: steps are counted from 0")
        if self._failed:
            raise TrajectoryError(self._failed)
        if self._file is not None:
            with self._writing() as file:
                file.await_room()
            bodies = codec.pack_step(self.header, record, self.steps.unread_at(len(self)), file.synced.records)
            self._failed = "the trajectory was interrupted in the middle of a record: start the run again"
            with self._writing():
                file.append(bodies, steps=1)
            file.closed = False
        self.steps.append(record)
        if self._file is not None:
            self.steps.rows["chain"][-1] = self._file.chain
        self._failed = ""

    def sync(self) -> None:
        """Return when all steps are on the disk: to be called before anything is written elsewhere that speaks of them.

        Raises:
            TrajectoryError: they did not come there.
        """
        if self._failed not in ("", _CLOSED):
            raise TrajectoryError(self._failed)
        if self._file is not None:
            with self._writing() as file:
                file.await_all()

    def chain(self, steps: int) -> str | None:
        """The chain value behind the first so many steps (one or more), 16 hexadecimal digits: it stands for all that
        the file held then. None where there is none: in other formats, and of steps that another rank wrote down."""
        if "chain" not in (self.steps.rows.dtype.names or ()):
            return None
        value = int(self.steps.rows["chain"][steps - 1])
        return f"{value:016x}" if value else None

    def export(self, path: str | os.PathLike[str]) -> int:
        """Write the compact form, from which a replay gives the same bits; `open` reads it. Returns its bytes.

        Raises:
            TrajectoryError: the file exists, or can't be written.
        """
        data = export.pack(self.header, self.steps)
        try:
            if os.path.lexists(path):
                raise TrajectoryError(f"{path} exists already: give the name of a file that does not")
            place(path, data)
        except OSError as error:
            raise TrajectoryError(f"{path} can't be written: {error.strerror}") from None
        return len(data)

    def close(self) -> None:
        """Put a record behind the last step that says that nothing was left to write, and let the file go.

        Records stay in memory. Raises TrajectoryError if the record can't be written or one before it did not come to
        the disk; the file is let go all the same.
        """
        try:
            if self._file is not None and not self._file.closed and not self._failed:
                self.sync()
                with self._writing() as file:
                    file.append(codec.pack_close(self.header, len(self), file.synced.records), steps=0)
        finally:
            self.release()

    def release(self) -> None:
        """Let the file go as it is; once more does nothing. Nothing can be appended any more, to the memory either.

        Raises:
            TrajectoryError: a step did not come to the disk; the file is let go all the same.
        """
        self._failed = self._failed or _CLOSED
        error = self._let_go()
        if error is not None:
            raise self._failure(error) from None

    def _let_go(self) -> Exception | None:
        file, self._file = self._file, None
        return file.release() if file is not None else None

    @contextmanager
    def _writing(self) -> Iterator[LogFile]:
        """The file. What it raises is the last: it is let go, and said again by whatever is tried later."""
        file = self._file
        assert file is not None
        if file.process != os.getpid():
            raise TrajectoryError(
                f"the trajectory is written by process {file.process}, of which this one is a fork: append there"
            )
        try:
            yield file
        except OSError as error:
            self._let_go()
            raise self._failure(error) from None

    def _failure(self, error: Exception) -> TrajectoryError:
        why = error.strerror if isinstance(error, OSError) else error
        self._failed = (
            f"the trajectory can't be written: {why}; no further step was applied. Make room, and start the run again: "
            "it goes on from its last step"
        )
        return TrajectoryError(self._failed)

    def __enter__(self) -> Trajectory:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self.steps)

    @overload
    def __getitem__(self, index: int) -> StepRecord: ...

    @overload
    def __getitem__(self, index: slice) -> list[StepRecord]: ...

    def __getitem__(self, index: int | slice) -> StepRecord | list[StepRecord]:
        return self.steps[index]

    @property
    def records(self) -> list[StepRecord]:
        """All of them as objects, about half a kilobyte each."""
        return self.steps[:]


def _lock(path: str | os.PathLike[str], what: str, undo: ExitStack) -> Lock:
    try:
        lock = Lock(path)
    except OSError as error:
        raise TrajectoryError(f"{path} can't be {what}: {error.strerror}") from None
    undo.callback(lock.release)
    return lock


def _read_bytes(path: str | os.PathLike[str]) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise TrajectoryError(f"{path} can't be read: {error.strerror}") from None


def _contents(data: bytes, where: str) -> Contents:
    """What a file of any version holds. Raises TrajectoryError."""
    reader = _READERS.get(data[:8])
    if reader is None:
        raise TrajectoryError(f"{where} is not a trajectory: it does not begin with {codec.MAGIC.decode()}")
    contents = reader(data, where)
    if contents.size > contents.whole:
        warnings.warn(
            f"{where} ends in {contents.size - contents.whole} bytes of a record that was cut off: they are left out, "
            f"and {len(contents.steps)} steps are whole",
            stacklevel=4,
        )
    return contents
