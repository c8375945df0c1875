"""The compact form: what a replay needs in as few bytes as it takes; and files of version 1."""

import math
import pathlib
import re
from dataclasses import replace

import numpy as np
import pytest

from mezo_scale.errors import TrajectoryError
from mezo_scale.noise import direction_seed
from mezo_scale.trajectory import Header, StepRecord, Trajectory
from tests.trajectory.logs import MANY, header, record, written, written_in_version_1

ONE = header(num_directions=1)


def one_direction(steps: int) -> Trajectory:
    """As a run of one direction leaves them: seeds follow from the run's, the learning rate falls."""
    trajectory, rng = Trajectory(ONE), np.random.default_rng(0)
    for step in range(steps):
        grad = float(rng.normal() * 3)
        alpha = float(np.float32(-1e-6 * (1 - step / steps) * grad))
        seeds = (direction_seed(ONE.seed, step, 0),)
        trajectory.append(StepRecord(step, seeds, (grad,), (alpha,), (1.0,), 0.7))
    return trajectory


def replayed(records: list[StepRecord]) -> list[tuple[object, ...]]:
    """What a replay looks at."""
    return [(one.step, one.seeds, one.alphas, one.decays, one.unread, one.skipped) for one in records]


def test_twenty_thousand_steps_take_less_than_a_tenth_of_a_megabyte(tmp_path: pathlib.Path) -> None:
    trajectory = one_direction(20_000)
    size = trajectory.export(tmp_path / "out")
    assert size == (tmp_path / "out").stat().st_size < 100_000
    again = Trajectory.open(tmp_path / "out")
    assert again.header == ONE
    assert replayed(again.records) == replayed(trajectory.records)


def test_skips_unread_parameters_and_seeds_of_any_origin_come_back(tmp_path: pathlib.Path) -> None:
    records = [record(step, ((0, 3), (3,), ())[step % 3]) for step in range(12)]
    records[4] = replace(records[4], loss=math.nan, projected_grads=(math.nan, 1.0), alphas=(0.0, 0.0))
    with Trajectory.create(tmp_path / "t", MANY) as trajectory:
        for one in records:
            trajectory.append(one)
        trajectory.export(tmp_path / "out")
    again = Trajectory.open(tmp_path / "out")
    assert replayed(again.records) == replayed(records)
    assert {one.loss for one in again if not one.skipped} == {0.0}
    Trajectory(MANY).export(tmp_path / "empty")
    assert len(Trajectory.open(tmp_path / "empty")) == 0


def test_an_export_is_refused_where_a_bit_or_a_byte_of_it_is_wrong(tmp_path: pathlib.Path) -> None:
    one_direction(30).export(tmp_path / "out")
    data = bytearray((tmp_path / "out").read_bytes())
    for bit in range(8 * len(data)):
        data[bit // 8] ^= 1 << bit % 8
        with pytest.raises(TrajectoryError, match="damaged|not a trajectory"):
            Trajectory.parse(bytes(data))
        data[bit // 8] ^= 1 << bit % 8
    for end in range(len(data)):
        with pytest.raises(TrajectoryError, match="damaged|not a trajectory"):
            Trajectory.parse(bytes(data[:end]))


def test_an_export_takes_the_place_of_nothing_and_is_not_continued(tmp_path: pathlib.Path) -> None:
    trajectory = one_direction(3)
    trajectory.export(tmp_path / "out")
    with pytest.raises(TrajectoryError, match="exists already"):
        trajectory.export(tmp_path / "out")
    with pytest.raises(TrajectoryError, match="is an export, which holds what a replay needs"):
        Trajectory.open(tmp_path / "out", append=True)


def old_header(head: Header) -> Header:
    return replace(head, run_id=None)


def test_a_log_of_version_1_is_read_and_exported_but_not_continued(tmp_path: pathlib.Path) -> None:
    records = [record(step, ((0, 3), (0, 3), (699,))[step % 3]) for step in range(7)]
    records[5] = replace(records[5], loss=math.inf)
    written_in_version_1(tmp_path / "old", records, MANY)
    old = Trajectory.open(tmp_path / "old")
    assert old.records == records
    assert old.header == old_header(MANY)
    old.export(tmp_path / "out")
    assert replayed(Trajectory.open(tmp_path / "out").records) == replayed(records)
    before = (tmp_path / "old").read_bytes()
    with pytest.raises(TrajectoryError, match="is of version 1, .*: finish the run with the release that began it"):
        Trajectory.open(tmp_path / "old", append=True)
    assert (tmp_path / "old").read_bytes() == before


def test_headers_of_numbers_that_no_run_has_are_refused() -> None:
    for change in ({"num_directions": -1}, {"num_directions": 1.5}, {"num_directions": 10**12}, {"num_groups": None}):
        with pytest.raises(ValueError, match="num_directions and num_groups are"):
            header(**change)
    for name, value in {"seed": -1, "eps": "1", "run_id": "x", "manifest": [1], "fingerprint": 3}.items():
        with pytest.raises(ValueError, match=re.escape(name)):
            header(**{name: value})


def test_what_an_export_is_made_of_is_read_from_the_file(tmp_path: pathlib.Path) -> None:
    records = written(tmp_path / "t", 30, MANY)
    Trajectory.open(tmp_path / "t").export(tmp_path / "out")
    assert replayed(Trajectory.open(tmp_path / "out").records) == replayed(records)
