"""The trajectory's file: what was appended comes back, a torn end is dropped, damage is named."""

import pathlib

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


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trajectory = Trajectory.create(tmp_path / "t", header())
    trajectory.append(record(0))
    before = (tmp_path / "t").read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(TrajectoryError, match="No space left"):
        trajectory.append(record(1))
    monkeypatch.undo()
    assert (tmp_path / "t").read_bytes() == before
    assert len(trajectory) == 1
    trajectory.append(record(1))
    assert len(Trajectory.open(tmp_path / "t")) == 2


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
