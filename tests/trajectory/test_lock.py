"""A trajectory has one writer."""

import errno
import fcntl
import os
import pathlib
import signal
import socket
import subprocess
import sys

import pytest

from mezo_scale.errors import TrajectoryError
from mezo_scale.trajectory import Trajectory
from tests.trajectory.logs import header, record, written

HOLD = """
import sys
from mezo_scale.trajectory import Trajectory
trajectory = Trajectory.open(sys.argv[1], append=True)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_second_writer_in_the_process_is_refused_and_readers_are_not(tmp_path: pathlib.Path) -> None:
    written(tmp_path / "t")
    with Trajectory.open(tmp_path / "t", append=True) as first:
        message = f"being written by process {os.getpid()} on {socket.gethostname()}: let it finish, or end it first"
        with pytest.raises(TrajectoryError, match=message):
            Trajectory.open(tmp_path / "t", append=True)
        with pytest.raises(TrajectoryError, match=message):
            Trajectory.create(tmp_path / "t", header())
        first.append(record(3))
        assert len(Trajectory.open(tmp_path / "t")) == 4
    with Trajectory.open(tmp_path / "t", append=True) as second:
        second.append(record(4))
    assert len(Trajectory.open(tmp_path / "t")) == 5
    assert [path.name for path in tmp_path.iterdir()] == ["t"]


def test_another_process_is_refused_until_the_writer_is_dead(tmp_path: pathlib.Path) -> None:
    written(tmp_path / "t")
    command = [sys.executable, "-c", HOLD, tmp_path / "t"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(TrajectoryError, match=f"process {holder.pid} on {socket.gethostname()}"):
            Trajectory.open(tmp_path / "t", append=True)
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert (tmp_path / "t.lock").exists()
    with Trajectory.open(tmp_path / "t", append=True) as trajectory:
        trajectory.append(record(3))
    assert len(Trajectory.open(tmp_path / "t")) == 4


def test_what_is_refused_lets_the_lock_go(tmp_path: pathlib.Path) -> None:
    (tmp_path / "t").write_bytes(b"something else")
    for _ in range(2):
        with pytest.raises(TrajectoryError, match="not a trajectory"):
            Trajectory.open(tmp_path / "t", append=True)
    with pytest.raises(TrajectoryError, match="exists already"):
        Trajectory.create(tmp_path / "t", header())
    assert [path.name for path in tmp_path.iterdir()] == ["t"]


def test_a_file_system_without_locks_is_named(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(file: object, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", none)
    with pytest.warns(UserWarning, match="can't be locked on this file system .Function not implemented."):
        trajectory = Trajectory.create(tmp_path / "t", header())
    trajectory.append(record(0))
    trajectory.close()
    assert len(Trajectory.open(tmp_path / "t")) == 1
