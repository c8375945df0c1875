"""Group commit: an append waits for the disk only at its bound, what the disk did not take is said, no thread stays."""

import errno
import gc
import os
import pathlib
import subprocess
import sys
import threading
import time
import types
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from mezo_scale.errors import TrajectoryError
from mezo_scale.trajectory import Header, Trajectory, codec, sync
from tests.trajectory.logs import MANY, begin, header, record, size

LAGGING = header(unsynced=16)
pytestmark = pytest.mark.filterwarnings("ignore:.*of a record that was cut off")


class Disk:
    """An fsync that returns when it may, and then fails if it is to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.free, self.reached, self.code = threading.Event(), threading.Event(), 0
        self.free.set()
        self._fsync = os.fsync
        monkeypatch.setattr(os, "fsync", self)

    def __call__(self, number: int) -> None:
        self.reached.set()
        assert self.free.wait(30)
        if self.code:
            raise OSError(self.code, os.strerror(self.code))
        self._fsync(number)

    def hold(self) -> None:
        self.free.clear()
        self.reached.clear()

    def fail(self, code: int = errno.EIO) -> None:
        self.code = code
        self.free.set()


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    found = Disk(monkeypatch)
    yield found
    found.code = 0
    found.free.set()
    gc.collect()
    assert threads() == []


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "mezo log"]


def held(disk: Disk, path: pathlib.Path, on_disk: int, written: int, head: Header = LAGGING) -> Trajectory:
    """A log of which some steps are on the disk, and some more are written."""
    log = Trajectory.create(path, head)
    for step in range(on_disk):
        log.append(record(step))
    log.sync()
    disk.hold()
    for step in range(on_disk, written):
        log.append(record(step))
    return log


def said(data: bytes, head: Header) -> list[int]:
    """What the records of a file say was on the disk."""
    found: list[int] = np.frombuffer(data, codec.slot(head), offset=begin(head))["synced"].tolist()
    return found


def in_thread(call: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread


def test_an_append_waits_for_no_disk_and_what_it_wrote_can_be_read(disk: Disk, tmp_path: pathlib.Path) -> None:
    log = held(disk, tmp_path / "t", 4, 20)
    assert (log.synced, len(log)) == (4, 20)
    assert Trajectory.open(tmp_path / "t").records == log.records
    disk.free.set()
    log.sync()
    assert log.synced == 20
    log.close()
    assert Trajectory.open(tmp_path / "t").records == log.records


@pytest.mark.parametrize(("head", "most"), [(LAGGING, 16), (header(), 1)], ids=["new", "of before"])
def test_at_the_bound_an_append_waits(disk: Disk, tmp_path: pathlib.Path, head: Header, most: int) -> None:
    log = held(disk, tmp_path / "t", 0, most, head)
    appending = in_thread(lambda: log.append(record(most)))
    appending.join(0.2)
    assert appending.is_alive()
    assert len(Trajectory.open(tmp_path / "t")) == most
    disk.free.set()
    appending.join(30)
    assert len(log) == most + 1
    log.release()


def test_an_append_waits_for_one_of_more_than_a_second_before(
    disk: Disk, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = types.SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(sync, "time", clock)
    log = held(disk, tmp_path / "t", 0, 2)
    clock.now = 1.5
    appending = in_thread(lambda: log.append(record(2)))
    appending.join(0.2)
    assert appending.is_alive()
    disk.free.set()
    appending.join(30)
    assert len(log) == 3
    log.release()


def test_a_record_says_how_much_was_on_the_disk(disk: Disk, tmp_path: pathlib.Path) -> None:
    log = held(disk, tmp_path / "t", 2, 5)
    data = (tmp_path / "t").read_bytes()
    assert said(data, LAGGING)[2:] == [2, 2, 2]
    disk.free.set()
    log.close()
    assert said((tmp_path / "t").read_bytes(), LAGGING)[-1] == 5  # what closes it is written when all is on the disk


TOLD: dict[str, Callable[[Trajectory], object]] = {
    "append": lambda log: log.append(record(len(log))),
    "sync": Trajectory.sync,
    "close": Trajectory.close,
    "release": Trajectory.release,
}


@pytest.mark.parametrize("who", TOLD)
def test_an_fsync_that_fails_is_said_by_what_comes_next_and_nothing_is_written_after_it(
    disk: Disk, tmp_path: pathlib.Path, who: str
) -> None:
    log = held(disk, tmp_path / "t", 3, 6)
    on_disk = begin(LAGGING) + 3 * size(LAGGING)
    (thread,) = threads()
    disk.fail()
    thread.join(30)
    disk.code = 0  # the disk is well again, but what it lost it has lost
    with pytest.raises(TrajectoryError, match="can't be written: Input/output error; no further step was applied"):
        TOLD[who](log)
    for again in ("append", "sync"):
        with pytest.raises(TrajectoryError, match="can't be written: Input/output error"):
            TOLD[again](log)
    log.close()
    assert log.synced == 0
    assert (tmp_path / "t").stat().st_size == on_disk
    with Trajectory.open(tmp_path / "t", append=True) as again_open:
        assert again_open.records == [record(0), record(1), record(2)]
        again_open.append(record(3))
    assert len(Trajectory.open(tmp_path / "t")) == 4


def test_a_log_that_nobody_let_go_comes_to_the_disk_or_says_so(disk: Disk, tmp_path: pathlib.Path) -> None:
    log = held(disk, tmp_path / "t", 1, 3)
    disk.free.set()
    del log
    gc.collect()
    assert threads() == []
    logs = [held(disk, tmp_path / "u", 1, 3)]
    disk.fail()
    with pytest.warns(UserWarning, match="u lost its last steps, for they could not be written: .*Input/output error"):
        logs.clear()
    disk.code = 0
    assert [len(Trajectory.open(tmp_path / name)) for name in "tu"] == [3, 1]


ENDS = """
import os, sys, time
from mezo_scale.trajectory import Trajectory
from tests.trajectory.logs import header, record
log = Trajectory.create(sys.argv[1], header(unsynced=16))
fsync = os.fsync
def slow(number):
    time.sleep(0.3)
    fsync(number)
    os.write(1, b"synced")
os.fsync = slow
log.append(record(0))
os.write(1, b"ends ")
"""


def test_a_program_that_ends_waits_for_the_disk(tmp_path: pathlib.Path) -> None:
    done = subprocess.run([sys.executable, "-c", ENDS, tmp_path / "t"], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("ends synced", "")


def test_a_fork_of_the_writer_writes_nothing_and_lets_nothing_go(disk: Disk, tmp_path: pathlib.Path) -> None:
    log = held(disk, tmp_path / "t", 1, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a process with threads that is forked
        child = os.fork()
    if child == 0:
        code = 1
        try:
            log.append(record(2))
        except TrajectoryError as error:
            log.release()
            code = 0 if "of which this one is a fork: append there" in str(error) else 2
        finally:
            os._exit(code)
    deadline = time.monotonic() + 20
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.01)
    if ended == (0, 0):
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert ended == (child, 0)
    assert (tmp_path / "t.lock").exists()
    disk.free.set()
    log.append(record(2))
    log.close()
    assert len(Trajectory.open(tmp_path / "t")) == 3


def test_what_is_opened_to_go_on_is_on_the_disk(disk: Disk, tmp_path: pathlib.Path) -> None:
    """A session that was killed leaves steps that only the system's memory has."""
    with Trajectory.create(tmp_path / "t", LAGGING) as log:
        for step in range(3):
            log.append(record(step))
    disk.hold()
    opened: list[Trajectory] = []
    opening = in_thread(lambda: opened.append(Trajectory.open(tmp_path / "t", append=True)))
    assert disk.reached.wait(30)
    assert opened == []
    disk.free.set()
    opening.join(30)
    assert opened[0].synced == 3
    opened.pop().release()


# -- after a power loss -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zeros", [False, True], ids=["cut", "with zeros"])
def test_every_end_above_what_was_on_the_disk_is_gone_on_from(disk: Disk, tmp_path: pathlib.Path, zeros: bool) -> None:
    log = held(disk, tmp_path / "t", 3, 19)
    data, records = (tmp_path / "t").read_bytes(), log.records
    length, start, path = size(LAGGING), begin(LAGGING), tmp_path / "cut"
    disk.free.set()
    log.release()
    for end in range(start, len(data)):
        whole, part = divmod(end - start, length)
        cut = data[:end] + (bytes(len(data) - end) if zeros else b"")
        if zeros and part > length - 4:
            continue  # a record that has some of its checksum was written whole
        assert Trajectory.parse(cut).records == records[:whole]
        if whole < 3:
            path.write_bytes(cut)
            with pytest.raises(TrajectoryError, match=f"holds {whole} steps, but 3 were taken, as the files beside it"):
                Trajectory.open(path, at_least=3)
        elif end % 97 == 0:
            path.write_bytes(cut)
            with Trajectory.open(path, append=True, at_least=3) as again:
                again.append(record(whole))
            assert Trajectory.open(path).records == [*records[:whole], record(whole)]


def test_more_than_may_be_missing_is_damage_without_a_file_beside_it(tmp_path: pathlib.Path) -> None:
    with Trajectory.create(tmp_path / "t", LAGGING) as log:
        for step in range(60):
            log.append(record(step))
    data, length = (tmp_path / "t").read_bytes(), size(LAGGING)
    missing = 16 * 2  # each of them with a bitmap, for all that zeros say
    for kept in range(40, 60 * length, 40):
        cut = data[: begin(LAGGING) + kept].ljust(len(data), b"\0")
        whole, part = divmod(kept, length)
        if 61 - whole <= missing and part <= length - 4:
            assert len(Trajectory.parse(cut)) == whole
        else:
            at = f"record {whole} .byte {begin(LAGGING) + whole * length} of {len(data)}."
            with pytest.raises(TrajectoryError, match=f"damaged at {at}, which no crash leaves like that"):
                Trajectory.parse(cut)


def test_a_torn_end_with_bitmaps_is_taken_as_well(disk: Disk, tmp_path: pathlib.Path) -> None:
    head = header(unsynced=16, manifest=MANY.manifest)
    log = Trajectory.create(tmp_path / "t", head)
    disk.hold()
    for step in range(16):
        log.append(record(step, (step,)))
    data, records = (tmp_path / "t").read_bytes(), log.records
    disk.free.set()
    log.release()
    assert len(data) == begin(head) + 16 * 3 * size(head)
    for end in range(begin(head), len(data), 31):
        whole, part = divmod(end - begin(head), 3 * size(head))
        assert Trajectory.parse(data[:end]).records == records[:whole]
        if part % size(head) <= size(head) - 4:
            assert Trajectory.parse(data[:end] + bytes(len(data) - end)).records == records[:whole]


def test_a_flipped_bit_is_damage_however_little_was_on_the_disk(disk: Disk, tmp_path: pathlib.Path) -> None:
    log = held(disk, tmp_path / "t", 2, 12)
    data = bytearray((tmp_path / "t").read_bytes())
    disk.free.set()
    log.release()
    for at in range(begin(LAGGING), len(data)):
        data[at] ^= 1 << at % 8
        with pytest.raises(TrajectoryError, match="damaged at record"):
            Trajectory.parse(bytes(data))
        data[at] ^= 1 << at % 8


@pytest.mark.parametrize(
    ("there", "right"), [(0, False), (48, False), (51, True), (52, False), (57, True), (60, False)]
)
def test_a_record_that_says_what_no_writer_says_is_damage(there: int, right: bool) -> None:
    """20 appends of three records each, two of which may lag behind; the last one says how many are on the disk."""
    head = header(unsynced=3, manifest=MANY.manifest)
    data, before = codec.pack_header(head), ()
    chain = codec.Chain(data)
    for step in range(20):
        for body in codec.pack_step(head, record(step, (step,)), before, there if step == 19 else 3 * max(0, step - 2)):
            data += body + chain.seal(body)
        before = (step,)
    if there in (51, 57):
        assert len(Trajectory.parse(data)) == 20
    else:
        with pytest.raises(TrajectoryError, match="damaged at record 57: restore"):
            Trajectory.parse(data)
