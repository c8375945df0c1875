"""The trajectory's file: what was appended comes back, a torn end is dropped, damage is named."""

import itertools
import pathlib
import resource
import signal
from dataclasses import replace

import pytest

from mezo_scale.errors import TrajectoryError
from mezo_scale.trajectory import Header, StepRecord, Trajectory
from mezo_scale.trajectory.codec import pack_header, record_size


def header(**changes: object) -> Header:
    fields = {
        "noise_version": 1,
        "fingerprint": "00ff00ff00ff00ff",
        "manifest": [["a.weight", [3, 2], "float32", 0, True]],
        "num_directions": 2,
        "num_groups": 1,
        "distribution": "normal",
        "rounding": "nearest",
        "seed": 7,
        "eps": 1e-3,
    }
    return Header(**{**fields, **changes})


def record(step: int) -> StepRecord:
    return StepRecord(step, (2**64 - 1 - step, step), (1.5, -0.25), (0.5, -0.125), (1.0,), 0.693 + step)


def written(path: pathlib.Path, steps: int = 3) -> list[StepRecord]:
    trajectory = Trajectory.create(path, header())
    for step in range(steps):
        trajectory.append(record(step))
    trajectory.close()
    return trajectory.records


def test_what_was_appended_comes_back(tmp_path: pathlib.Path) -> None:
    records = written(tmp_path / "t")
    again = Trajectory.open(tmp_path / "t")
    assert again.records == records
    assert again.header == header()


def test_every_cut_of_the_file_keeps_the_whole_records(tmp_path: pathlib.Path) -> None:
    records = written(tmp_path / "t")
    data = (tmp_path / "t").read_bytes()
    start, size = len(pack_header(header())), record_size(header())
    assert len(data) == start + 3 * size
    for length in range(start, len(data)):
        (tmp_path / "cut").write_bytes(data[:length])
        trajectory = Trajectory.open(tmp_path / "cut", append=True)
        kept = (length - start) // size
        assert trajectory.records == records[:kept]
        trajectory.append(record(kept))
        trajectory.close()
        assert Trajectory.open(tmp_path / "cut").records == [*records[:kept], record(kept)]


def test_damage_in_the_middle_is_named_and_nothing_is_changed(tmp_path: pathlib.Path) -> None:
    written(tmp_path / "t")
    data = bytearray((tmp_path / "t").read_bytes())
    data[len(pack_header(header())) + 5] ^= 1
    (tmp_path / "t").write_bytes(data)
    with pytest.raises(TrajectoryError, match="damaged at record 0"):
        Trajectory.open(tmp_path / "t", append=True)
    assert (tmp_path / "t").read_bytes() == data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a trajectory"),
        (b"PK\x03\x04" * 9, "not a trajectory"),
        (pack_header(header())[:-3], "damaged header"),
    ],
)
def test_files_that_are_no_trajectory_are_named(tmp_path: pathlib.Path, data: bytes, message: str) -> None:
    (tmp_path / "t").write_bytes(data)
    with pytest.raises(TrajectoryError, match=message):
        Trajectory.open(tmp_path / "t")


def test_a_file_that_exists_is_never_overwritten(tmp_path: pathlib.Path) -> None:
    written(tmp_path / "t")
    with pytest.raises(TrajectoryError, match="exists already"):
        Trajectory.create(tmp_path / "t", header())
    with pytest.raises(TrajectoryError, match="can't be read"):
        Trajectory.open(tmp_path / "nowhere")


def test_steps_follow_each_other(tmp_path: pathlib.Path) -> None:
    trajectory = Trajectory.create(tmp_path / "t", header())
    with pytest.raises(TrajectoryError, match="step 1 can't follow 0 records"):
        trajectory.append(record(1))


def test_a_write_that_fails_leaves_the_file_as_it_was_and_is_the_last(tmp_path: pathlib.Path) -> None:
    trajectory = Trajectory.create(tmp_path / "t", header())
    trajectory.append(record(0))
    before = (tmp_path / "t").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:  # half of a record fits, as on a disk that fills up
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, limits[1]))
        with pytest.raises(TrajectoryError, match="can't be written: File too large"):
            trajectory.append(record(1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert (tmp_path / "t").read_bytes() == before
    with pytest.raises(TrajectoryError, match="can't be written"):  # there is room again, but what was said stands
        trajectory.append(record(1))
    assert (tmp_path / "t").read_bytes() == before
    again = Trajectory.open(tmp_path / "t", append=True)
    again.append(record(1))
    assert len(Trajectory.open(tmp_path / "t")) == 2


def test_a_header_that_can_t_be_written_leaves_no_file(tmp_path: pathlib.Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20, limits[1]))
        with pytest.raises(TrajectoryError, match="can't be written"):
            Trajectory.create(tmp_path / "t", header())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not (tmp_path / "t").exists()


MANY = header(manifest=[[f"{n}.weight", [1], "float32", 0, True] for n in range(700)])


def test_which_parameters_are_unread_comes_back_with_each_record(tmp_path: pathlib.Path) -> None:
    sets = [(0, 3, 699), (0, 3, 699), (699,), (), (), (5,)]
    records = [replace(record(step), unread=unread) for step, unread in enumerate(sets)]
    trajectory = Trajectory.create(tmp_path / "t", MANY)
    sizes = []
    for one in records:
        trajectory.append(one)
        sizes.append((tmp_path / "t").stat().st_size)
    assert Trajectory.open(tmp_path / "t").records == records
    grown = [after - before for before, after in itertools.pairwise(sizes)]
    assert grown[0] == grown[3] == record_size(MANY)  # nothing changed: a record and no more
    continued = Trajectory.open(tmp_path / "t", append=True)
    continued.append(replace(record(6), unread=(5,)))
    continued.append(replace(record(7), unread=()))
    assert [one.unread for one in Trajectory.open(tmp_path / "t")] == [*sets, (5,), ()]


def test_a_file_cut_at_any_byte_of_such_an_entry_loses_that_step_alone(tmp_path: pathlib.Path) -> None:
    trajectory = Trajectory.create(tmp_path / "t", MANY)
    trajectory.append(record(0))
    whole = (tmp_path / "t").stat().st_size
    trajectory.append(replace(record(1), unread=(7, 600)))
    data = (tmp_path / "t").read_bytes()
    for length in range(whole, len(data)):
        (tmp_path / "cut").write_bytes(data[:length])
        with Trajectory.open(tmp_path / "cut", append=True) as cut:
            assert len(cut) == 1
            cut.append(replace(record(1), unread=(2,)))
        assert Trajectory.open(tmp_path / "cut").records[1].unread == (2,)
    for at in range(whole, len(data) - 2 * record_size(MANY), 7):  # the last records have their own rule
        damaged = bytearray(data)
        damaged[at] ^= 1
        with pytest.raises(TrajectoryError, match="damaged at record 1"):
            Trajectory.parse(bytes(damaged))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noise_version": 2}, "noise version 1, this is version 2"),
        ({"fingerprint": "0" * 16}, "other weights"),
        ({"manifest": [["b.weight", [3, 2], "float32", 0, True]]}, r"it has a.weight .* the model has b.weight"),
        ({"manifest": []}, "it has 1 trainable parameters, the model has 0"),
        ({"rounding": "master"}, "rounding = nearest, this run has master"),
    ],
)
def test_what_differs_is_said(change: dict[str, object], message: str) -> None:
    with pytest.raises(TrajectoryError, match=message):
        header().check_same(header(**change), "run.mezo")
