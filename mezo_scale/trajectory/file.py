"""A log's file: where records are added to its end, and brought to the disk."""

from __future__ import annotations

import io
import os
import warnings
import weakref
from contextlib import suppress
from pathlib import Path

from mezo_scale.trajectory import codec
from mezo_scale.trajectory.lock import Lock
from mezo_scale.trajectory.steps import Contents
from mezo_scale.trajectory.sync import Mark, Syncer


class LogFile:
    """The end of a file that is appended to, and the lock on it. Methods raise OSError.

    Args:
        begun: the bytes of its whole appends.
        found: what it holds.
    """

    def __init__(self, path: str | os.PathLike[str], lock: Lock, begun: bytes, found: Contents) -> None:
        self.closed, self.chain = found.closed, 0
        self._path, self._lock = Path(path), lock
        self._torn = found.size - len(begun)
        self._chain = codec.Chain(begun)
        self._written = Mark(found.records, len(found.steps), len(begun))
        self._file = io.FileIO(path, "r+")
        os.fsync(self._file.fileno())  # what was read may be in the system's memory alone, if its writer was killed
        self._file.seek(self._written.end)
        self._syncer = Syncer(self._file, self._written, found.header.unsynced)
        self._abandoned = weakref.finalize(self, _end_abandoned, self._syncer, os.fspath(path))

    @property
    def synced(self) -> Mark:
        return self._syncer.synced

    @property
    def process(self) -> int:
        return self._syncer.process

    def await_room(self) -> None:
        """Returns when one more append may follow those that are not on the disk yet."""
        self._syncer.await_room()

    def await_all(self) -> None:
        """Returns when all is on the disk."""
        self._syncer.await_all()

    def append(self, bodies: list[bytes], steps: int) -> None:
        """Seals records and writes them, in one write. After an error what arrived is taken away again."""
        self._make_ready()
        data = b"".join(body + self._chain.seal(body) for body in bodies)
        records, taken, end = self._written
        try:
            write(self._file, data)
        except OSError:
            with suppress(OSError):
                self._file.truncate(end)
            raise
        self._written = Mark(records + len(bodies), taken + steps, end + len(data))
        self._syncer.wrote(self._written)
        self.chain = codec.chain_of(data)

    def _make_ready(self) -> None:
        """Before the first append a torn end is kept beside."""
        if not self._torn:
            return
        with io.FileIO(f"{self._path}.torn", "a") as beside:
            write(beside, self._file.read(self._torn))
            os.fsync(beside.fileno())
        self._file.truncate(self._written.end)
        self._file.seek(self._written.end)
        os.fsync(self._file.fileno())
        self._torn = 0

    def release(self) -> Exception | None:
        """Waits for the disk, and lets go. Returns what kept something from the disk."""
        self._abandoned.detach()
        try:
            return self._syncer.end() if self.process == os.getpid() else None
        finally:
            self._file.close()
            if self.process == os.getpid():
                self._lock.release()


def _end_abandoned(syncer: Syncer, path: str) -> None:
    """For a file that nobody let go, when the program ends or has no more use of it: there is nobody to raise to."""
    if syncer.process == os.getpid() and (error := syncer.end()) is not None:
        warnings.warn(f"{path} lost its last steps, for they could not be written: {error}", stacklevel=1)


def place(path: str | os.PathLike[str], data: bytes) -> None:
    """A new file that is seen whole or not at all, and on disk when this returns. Raises OSError."""
    beside = Path(f"{os.fspath(path)}.partial")
    try:
        with io.FileIO(beside, "w") as file:
            write(file, data)
            os.fsync(file.fileno())
        beside.rename(path)
    except OSError:
        with suppress(OSError):
            beside.unlink()
        raise
    folder = os.open(Path(path).parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write(file: io.FileIO, data: bytes) -> None:
    """All of the data. Unbuffered: what could not be written is not written later, in front of something."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]
