"""The compact form: what a replay needs in as few bytes as it takes; and files of version 1."""

import json
import lzma
import math
import pathlib
import re
import struct
from dataclasses import replace
from hashlib import blake2b

import numpy as np
import pytest

from mezo_scale.errors import TrajectoryError
from mezo_scale.noise import direction_seed
from mezo_scale.trajectory import Header, StepRecord, Trajectory, export
from mezo_scale.trajectory.codec import pack_header
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


def with_digest(body: bytes) -> bytes:
    return body + blake2b(body, digest_size=16).digest()


def with_about(about: object, columns: bytes = b"") -> bytes:
    """An export whose digest is right, whatever it holds."""
    text = about if isinstance(about, bytes) else json.dumps(about).encode()
    packed = lzma.compress(columns, format=lzma.FORMAT_RAW, filters=export._FILTERS)
    return with_digest(pack_header(ONE, export.MAGIC) + struct.pack("<I", len(text)) + text + packed)


EMPTY = {"steps": 0, "seeds": False, "unread": []}


@pytest.mark.parametrize(
    "data",
    [
        with_digest(pack_header(ONE, export.MAGIC)),
        with_digest(pack_header(ONE, export.MAGIC) + struct.pack("<I", 2) + b"{}no LZMA"),
        with_about(b"{"),
        with_about(b"\xff"),
        with_about(b"[" * 100_000),
        with_about([]),
        with_about({"steps": 0}),
        with_about(EMPTY | {"more": 1}),
        with_about(EMPTY | {"steps": -1}),
        with_about(EMPTY | {"steps": True}),
        with_about(EMPTY | {"steps": 1}),
        with_about(EMPTY | {"steps": 10**12}),
        with_about(EMPTY | {"steps": 10**30}),
        with_about(EMPTY | {"seeds": 1}),
        with_about(EMPTY | {"unread": 1}),
        with_about(EMPTY | {"unread": [[0, [0]]]}),
        with_about({"steps": 1, "seeds": False, "unread": [[0, [5]]]}, bytes(9)),
        with_about({"steps": 1, "seeds": False, "unread": [[0, 1]]}, bytes(9)),
        with_about({"steps": 1, "seeds": False, "unread": [0]}, bytes(9)),
        with_about(EMPTY, bytes(1)),
        with_about(EMPTY, bytes(2**26)),
    ],
)
def test_an_export_that_holds_what_none_can_is_refused_though_its_digest_is_right(data: bytes) -> None:
    with pytest.raises(
        TrajectoryError, match="the trajectory is no export that can be read, though .*: restore the file"
    ):
        Trajectory.parse(data)


def test_what_these_exports_are_made_like_is_one() -> None:
    assert len(Trajectory.parse(with_about(EMPTY))) == 0
    (found,) = Trajectory.parse(with_about({"steps": 1, "seeds": False, "unread": [[0, [0]]]}, bytes(9)))
    assert (found.unread, found.skipped) == ((0,), False)


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
    wrong = {"seed": -1, "eps": "1", "run_id": "x", "manifest": [1], "fingerprint": 3, "frozen": 3}
    wrong |= {"fingerprints": ["a"]}
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=re.escape(name)):
            header(**{name: value})
    good = ["a.weight", [3, 2], "float32", 0, True]
    for manifest in ({}, "abcde", [good[:4]], *([[*good[:at], None, *good[at + 1 :]]] for at in range(5))):
        with pytest.raises(ValueError, match="the manifest"):
            header(manifest=manifest)


def test_what_an_export_is_made_of_is_read_from_the_file(tmp_path: pathlib.Path) -> None:
    records = written(tmp_path / "t", 30, MANY)
    Trajectory.open(tmp_path / "t").export(tmp_path / "out")
    assert replayed(Trajectory.open(tmp_path / "out").records) == replayed(records)
