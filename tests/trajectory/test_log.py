"""The trajectory's file: what was appended comes back, a torn end is kept beside, a failed write is the last."""

import itertools
import math
import pathlib
import resource
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from mezo_scale.errors import TrajectoryError
from mezo_scale.trajectory import StepRecord, Trajectory
from mezo_scale.trajectory.codec import pack_header
from tests.trajectory.logs import MANY, begin, failing_fsync, header, record, size, written


@contextmanager
def files_end_at(length: int) -> Iterator[None]:
    """As on a disk that fills up."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (length, limits[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_what_was_appended_comes_back(tmp_path: pathlib.Path) -> None:
    records = written(tmp_path / "t")
    again = Trajectory.open(tmp_path / "t")
    assert list(again) == again.records == records
    assert again.header == header()
    assert (len(again), again[1], again[-1], again[1:]) == (3, records[1], records[2], records[1:])
    with pytest.raises(IndexError):
        again[3]


def test_a_skipped_step_comes_back_as_one(tmp_path: pathlib.Path) -> None:
    with Trajectory.create(tmp_path / "t", header()) as trajectory:
        trajectory.append(replace(record(0), loss=math.nan, projected_grads=(math.inf, 1.0)))
        trajectory.append(record(1))
    assert [one.skipped for one in Trajectory.open(tmp_path / "t")] == [True, False]
    assert Trajectory.open(tmp_path / "t")[0].projected_grads == (math.inf, 1.0)


def test_every_run_draws_an_id_of_its_own(tmp_path: pathlib.Path) -> None:
    ids = []
    for name in ("a", "b"):
        Trajectory.create(tmp_path / name, header(run_id=None)).release()
        ids.append(Trajectory.open(tmp_path / name).header.run_id)
    assert len({*ids, None}) == 3


@pytest.mark.filterwarnings("ignore:.*of a record that was cut off")
@pytest.mark.parametrize("closed", [False, True])
def test_every_cut_of_the_file_keeps_the_whole_records(tmp_path: pathlib.Path, closed: bool) -> None:
    records = written(tmp_path / "t", closed=closed)
    data = (tmp_path / "t").read_bytes()
    start, length = begin(header()), size(header())
    assert len(data) == start + (3 + closed) * length
    for end in range(len(data) + 1):
        (tmp_path / "cut").write_bytes(data[:end])
        if end < start:
            with pytest.raises(TrajectoryError, match="not a trajectory|damaged header"):
                Trajectory.open(tmp_path / "cut", append=True)
            continue
        kept = min(3, (end - start) // length)
        with Trajectory.open(tmp_path / "cut", append=True) as trajectory:
            assert trajectory.records == records[:kept]
            trajectory.append(record(kept))
        assert Trajectory.open(tmp_path / "cut").records == [*records[:kept], record(kept)]


@pytest.mark.parametrize(
    "torn", [b"\1", b"\1" + bytes(87), bytes(88), bytes(5)], ids=["short", "filled", "zeros", "few"]
)
def test_a_torn_end_is_named_and_kept_beside_once_something_takes_its_place(
    tmp_path: pathlib.Path, torn: bytes
) -> None:
    records = written(tmp_path / "t")
    whole = (tmp_path / "t").read_bytes()
    assert size(header()) == 88
    (tmp_path / "t").write_bytes(whole + torn)
    with pytest.warns(
        UserWarning, match=rf"ends in {len(torn)} bytes of a record that was cut off.* 3 steps are whole"
    ):
        trajectory = Trajectory.open(tmp_path / "t", append=True)
    assert trajectory.records == records
    assert (tmp_path / "t").read_bytes() == whole + torn  # opening writes nothing
    trajectory.append(record(3))
    trajectory.close()
    assert (tmp_path / "t").read_bytes().startswith(whole)
    assert (tmp_path / "t.torn").read_bytes() == torn
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(Trajectory.open(tmp_path / "t")) == 4


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a trajectory"),
        (b"PK\x03\x04" * 9, "not a trajectory"),
        (pack_header(header())[:-3], "damaged header"),
        (pack_header(header())[:10], "damaged header"),
        (pack_header(header(run_id=None)), "no run_id"),
    ],
)
def test_files_that_are_no_trajectory_are_named(tmp_path: pathlib.Path, data: bytes, message: str) -> None:
    (tmp_path / "t").write_bytes(data)
    with pytest.raises(TrajectoryError, match=message):
        Trajectory.open(tmp_path / "t")


def test_a_file_that_exists_is_never_overwritten(tmp_path: pathlib.Path) -> None:
    written(tmp_path / "t")
    before = (tmp_path / "t").read_bytes()
    with pytest.raises(TrajectoryError, match="exists already"):
        Trajectory.create(tmp_path / "t", header())
    with pytest.raises(TrajectoryError, match="can't be read"):
        Trajectory.open(tmp_path / "nowhere")
    with pytest.raises(TrajectoryError, match="can't be created: No such file"):
        Trajectory.create(tmp_path / "no" / "where", header())
    assert (tmp_path / "t").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["t"]


def test_steps_follow_each_other(tmp_path: pathlib.Path) -> None:
    with Trajectory.create(tmp_path / "t", header()) as trajectory:
        with pytest.raises(TrajectoryError, match="step 1 can't follow 0 records"):
            trajectory.append(record(1))
        with pytest.raises(ValueError, match="the record has 1 decays, expected 1|the record has 1 seeds, expected 2"):
            trajectory.append(StepRecord(0, (1,), (1.0,), (1.0,), (1.0,), 1.0))
        trajectory.append(record(0))
    assert len(Trajectory.open(tmp_path / "t")) == 1


def test_nothing_is_appended_to_a_log_that_was_let_go(tmp_path: pathlib.Path) -> None:
    trajectory = Trajectory.create(tmp_path / "t", header())
    trajectory.append(record(0))
    trajectory.close()
    with pytest.raises(TrajectoryError, match="was closed: open it again"):
        trajectory.append(record(1))


def test_fewer_steps_than_are_known_to_have_been_taken_are_refused(tmp_path: pathlib.Path) -> None:
    written(tmp_path / "t")
    assert len(Trajectory.open(tmp_path / "t", at_least=3)) == 3
    for append in (False, True):
        with pytest.raises(
            TrajectoryError, match="holds 3 steps, but 4 were taken, as the files beside it say: restore the file"
        ):
            Trajectory.open(tmp_path / "t", append=append, at_least=4)


def test_a_closed_log_is_closed_once_and_goes_on(tmp_path: pathlib.Path) -> None:
    written(tmp_path / "t")
    before = (tmp_path / "t").read_bytes()
    Trajectory.open(tmp_path / "t", append=True).close()
    assert (tmp_path / "t").read_bytes() == before
    with Trajectory.open(tmp_path / "t", append=True) as trajectory:
        trajectory.append(record(3))
    assert len((tmp_path / "t").read_bytes()) == len(before) + 2 * size(header())
    assert Trajectory.open(tmp_path / "t").records == [record(step) for step in range(4)]


def test_a_write_that_fails_leaves_the_file_as_it_was_and_is_the_last(tmp_path: pathlib.Path) -> None:
    trajectory = Trajectory.create(tmp_path / "t", header())
    trajectory.append(record(0))
    before = (tmp_path / "t").read_bytes()
    with files_end_at(len(before) + 10), pytest.raises(TrajectoryError, match="can't be written: File too large"):
        trajectory.append(record(1))  # half of a record fits
    assert (tmp_path / "t").read_bytes() == before
    with pytest.raises(TrajectoryError, match="can't be written"):  # there is room again, but what was said stands
        trajectory.append(record(1))
    trajectory.close()
    assert (tmp_path / "t").read_bytes() == before
    with Trajectory.open(tmp_path / "t", append=True) as again:
        again.append(record(1))
    assert len(Trajectory.open(tmp_path / "t")) == 2


def test_a_step_that_is_interrupted_is_the_last_of_its_process(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trajectory = Trajectory.create(tmp_path / "t", header())
    trajectory.append(record(0))

    def interrupt(one: StepRecord) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trajectory.steps, "append", interrupt)
        with pytest.raises(KeyboardInterrupt):
            trajectory.append(record(1))
    with pytest.raises(TrajectoryError, match="interrupted in the middle"):
        trajectory.append(record(1))
    trajectory.close()
    assert Trajectory.open(tmp_path / "t").records == [record(0), record(1)]  # it was written


@pytest.mark.parametrize("how", ["full", "fsync"])
def test_a_header_that_can_t_be_written_leaves_no_file(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    failure = files_end_at(20) if how == "full" else failing_fsync(monkeypatch)
    with failure, pytest.raises(TrajectoryError, match="can't be written"):
        Trajectory.create(tmp_path / "t", header())
    assert list(tmp_path.iterdir()) == []


KILLED = """
import io, os, signal, sys
from mezo_scale.trajectory import Trajectory
from tests.trajectory.logs import header
class Half(io.FileIO):
    def write(self, data):
        if len(data) > 200:
            super().write(bytes(data)[:100])
            os.kill(os.getpid(), signal.SIGKILL)
        return super().write(data)
io.FileIO = Half
Trajectory.create(sys.argv[1], header())
"""


def test_a_process_killed_in_the_middle_of_the_header_leaves_what_can_start_again(tmp_path: pathlib.Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "t"], check=False)
    assert done.returncode == -signal.SIGKILL
    assert {path.name for path in tmp_path.iterdir()} == {"t.partial", "t.lock"}
    assert len(written(tmp_path / "t")) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["t"]


def test_which_parameters_are_unread_comes_back_with_each_record(tmp_path: pathlib.Path) -> None:
    sets = [(0, 3, 699), (0, 3, 699), (699,), (), (), (5,)]
    records = [record(step, unread) for step, unread in enumerate(sets)]
    trajectory = Trajectory.create(tmp_path / "t", MANY)
    sizes = []
    for one in records:
        trajectory.append(one)
        sizes.append((tmp_path / "t").stat().st_size)
    assert trajectory.records == Trajectory.open(tmp_path / "t").records == records
    trajectory.release()
    grown = [after - before for before, after in itertools.pairwise(sizes)]
    assert grown[0] == grown[3] == size(MANY)  # nothing changed: a record and no more
    with Trajectory.open(tmp_path / "t", append=True) as continued:
        continued.append(record(6, (5,)))
        continued.append(record(7))
    assert [one.unread for one in Trajectory.open(tmp_path / "t")] == [*sets, (5,), ()]


@pytest.mark.filterwarnings("ignore:.*of a record that was cut off")
def test_a_file_cut_at_any_byte_of_such_an_entry_loses_that_step_alone(tmp_path: pathlib.Path) -> None:
    trajectory = Trajectory.create(tmp_path / "t", MANY)
    trajectory.append(record(0))
    whole = (tmp_path / "t").stat().st_size
    trajectory.append(record(1, (7, 600)))
    trajectory.release()
    data = (tmp_path / "t").read_bytes()
    for length in range(whole, len(data)):
        (tmp_path / "cut").write_bytes(data[:length])
        with Trajectory.open(tmp_path / "cut", append=True) as cut:
            assert len(cut) == 1
            cut.append(record(1, (2,)))
        assert Trajectory.open(tmp_path / "cut")[1].unread == (2,)
    for at in range(whole, len(data), 7):
        damaged = bytearray(data)
        damaged[at] ^= 1
        with pytest.raises(TrajectoryError, match="damaged at record"):
            Trajectory.parse(bytes(damaged))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noise_version": 2}, "noise version 1, this is version 2"),
        ({"fingerprint": "0" * 16}, "other weights"),
        ({"manifest": [["b.weight", [3, 2], "float32", 0, True]]}, r"it has a.weight .* the model has b.weight"),
        ({"manifest": []}, "it has 1 trainable parameters, the model has 0"),
        ({"rounding": "master"}, "rounding = nearest, this run has master"),
        ({"fingerprints": {"data": "12", "more": "1"}}, "other data .data has fingerprint 11, this run's 12.: give"),
        ({"fingerprints": {"data": "12", "config": "2"}}, "other config and data .config has .* 2; data has .* 12.:"),
    ],
)
def test_what_differs_is_said(change: dict[str, object], message: str) -> None:
    with pytest.raises(TrajectoryError, match=message):
        header(fingerprints={"data": "11", "config": "1"}).check_same(header(**change), "run.mezo")


def test_two_runs_of_the_same_settings_fit_each_other() -> None:
    header(run_id="1" * 32, fingerprints={"data": "11"}).check_same(header(run_id=None), "run.mezo")


def test_the_chain_value_behind_a_step_is_the_same_while_writing_and_when_read_and_of_one_run_alone(
    tmp_path: pathlib.Path,
) -> None:
    log = Trajectory.create(tmp_path / "one", replace(MANY, run_id=None))
    for step in range(4):
        log.append(record(step, unread=(step,)))
    log.close()
    found = [log.chain(steps) for steps in (1, 2, 3, 4)]
    assert found == [Trajectory.open(tmp_path / "one").chain(steps) for steps in (1, 2, 3, 4)]
    assert None not in found
    assert len(set(found)) == 4
    other = Trajectory.create(tmp_path / "other", replace(MANY, run_id=None))
    other.append(record(0, unread=(0,)))
    assert other.chain(1) != found[0]
    Trajectory.open(tmp_path / "one").export(tmp_path / "export")
    assert Trajectory.open(tmp_path / "export").chain(1) is None
