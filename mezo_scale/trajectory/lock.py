"""One writer per trajectory: a lock that the system lets go of when the process ends, however it ends."""

from __future__ import annotations

import errno
import fcntl
import io
import os
import socket
import warnings
from contextlib import suppress

from mezo_scale.errors import TrajectoryError

_NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}


class Lock:
    """Held from construction until `release`, in this process alone: a second one in it is refused like any other.

    It is a `flock` on a file of its own, ``<path>.lock``, which names host and process and goes away with the lock. Of
    a process that was killed the file stays, and locks nothing. NFS passes the lock on to other hosts; where a file
    system has none, a warning says so.

    Raises:
        TrajectoryError: another holds it; host and process are named.
        OSError: the file can't be made.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._name = f"{os.path.realpath(path)}.lock"  # a link is the same file by another name
        self._file = self._locked(path)
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())

    def release(self) -> None:
        """Let go; once more does nothing."""
        if not self._file.closed:
            with suppress(OSError):
                os.unlink(self._name)
            self._file.close()

    def _locked(self, path: str | os.PathLike[str]) -> io.FileIO:
        while True:
            file = io.FileIO(os.open(self._name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644), "r+")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                with file:
                    holder = file.read(300).decode(errors="replace") or "another process"
                raise TrajectoryError(
                    f"{os.fspath(path)} is being written by {holder}: let it finish, or end it first"
                ) from None
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    file.close()
                    raise
                warnings.warn(
                    f"{os.fspath(path)} can't be locked on this file system ({error.strerror}): make sure that no "
                    "other process writes it",
                    stacklevel=5,
                )
            # Its last holder may have unlinked the file between the two calls: then the lock guards nothing.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), os.stat(self._name)):
                    return file
            file.close()
