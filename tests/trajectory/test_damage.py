"""What was on the disk is never dropped in silence: a log opens whole, or without a torn end, or is refused."""

import pathlib
import random

import pytest

from mezo_scale.errors import TrajectoryError
from mezo_scale.trajectory import Header, StepRecord, Trajectory
from tests.trajectory.logs import MANY, begin, header, record, size, with_run_id, written, written_in_version_1
from tools.mutate import mutated

pytestmark = pytest.mark.filterwarnings("ignore:.*of a record that was cut off")
STEPS = 30


def accepted(data: bytes) -> list[StepRecord] | None:
    try:
        return Trajectory.parse(data).records
    except TrajectoryError:
        return None


@pytest.mark.parametrize("closed", [True, False])
@pytest.mark.parametrize(
    "head", [header(), header(unsynced=16), MANY], ids=["every", "every, of one that lags", "some, of one with bitmaps"]
)
def test_every_flipped_bit_is_refused(tmp_path: pathlib.Path, closed: bool, head: Header) -> None:
    written(tmp_path / "t", STEPS, head, closed=closed)
    data = bytearray((tmp_path / "t").read_bytes())
    wrong = []
    for bit in range(0, 8 * len(data), 1 if head == header() else 41):
        data[bit // 8] ^= 1 << bit % 8
        if accepted(bytes(data)) is not None:
            wrong.append(bit)
        data[bit // 8] ^= 1 << bit % 8
    assert wrong == []


def test_a_whole_last_record_with_a_wrong_checksum_is_no_torn_one(tmp_path: pathlib.Path) -> None:
    written(tmp_path / "t", 4, closed=False)
    data = bytearray((tmp_path / "t").read_bytes())
    data[-20] ^= 1
    (tmp_path / "t").write_bytes(data)
    for append in (False, True):
        with pytest.raises(TrajectoryError, match=r"damaged at record 3 .byte \d+ of \d+., which no crash leaves"):
            Trajectory.open(tmp_path / "t", append=append)
    assert (tmp_path / "t").read_bytes() == data


def test_a_damaged_record_before_a_torn_one_is_damage(tmp_path: pathlib.Path) -> None:
    written(tmp_path / "t", 4, closed=False)
    data = bytearray((tmp_path / "t").read_bytes())
    data[-20] ^= 1
    for behind in (1, 50, size(header()) - 1):
        assert accepted(bytes(data) + b"\1" * behind) is None


def test_every_cut_gives_a_prefix_and_zeros_behind_it_change_nothing(tmp_path: pathlib.Path) -> None:
    records = written(tmp_path / "t", STEPS)
    data, start, length = (tmp_path / "t").read_bytes(), begin(header()), size(header())
    for end in range(start, len(data)):
        whole, part = divmod(end - start, length)
        assert accepted(data[:end]) == records[:whole]
        if part <= length - 4:  # the file system had reserved the rest of the record
            assert accepted(data[:end] + bytes(length - part)) == records[:whole]
    assert accepted(data + bytes(2 * length + 1)) is None  # more than any append takes


def pieces(data: bytes, start: int, length: int) -> list[bytes]:
    return [data[at : at + length] for at in range(start, len(data), length)]


def test_records_that_are_left_out_or_swapped_or_repeated_are_refused(tmp_path: pathlib.Path) -> None:
    written(tmp_path / "t", STEPS)
    data = (tmp_path / "t").read_bytes()
    head, parts = data[: begin(header())], pieces(data, begin(header()), size(header()))
    last = len(parts) - 1
    for one in range(last):
        assert accepted(head + b"".join(parts[:one] + parts[one + 1 :])) is None
        assert accepted(head + b"".join([*parts[:one], parts[one], *parts[one:]])) is None
        for other in range(one):
            swapped = list(parts)
            swapped[one], swapped[other] = swapped[other], swapped[one]
            assert accepted(head + b"".join(swapped)) is None
    assert accepted(head + b"".join([*parts, parts[last]])) is None


def test_a_record_of_another_run_of_the_same_model_and_seed_is_refused(tmp_path: pathlib.Path) -> None:
    written(tmp_path / "one", 12)
    written(tmp_path / "other", 12, with_run_id(header(), "f" * 32))
    start, length = begin(header()), size(header())
    one, other = (tmp_path / "one").read_bytes(), (tmp_path / "other").read_bytes()
    assert len(one) == len(other)
    for at in range(start, len(one), length):
        assert accepted(one[:at] + other[at : at + length] + one[at + length :]) is None
        assert accepted(one[:at] + other[at:]) is None
    assert accepted(one[:start] + other[start:]) is None


def test_ten_thousand_mutations_are_refused_or_leave_a_prefix(tmp_path: pathlib.Path) -> None:
    records = written(tmp_path / "t", STEPS)
    data, chance = (tmp_path / "t").read_bytes(), random.Random(0)
    start, length = begin(header()), size(header())
    shorter = 0
    for _ in range(10_000):
        changed = mutated(data, chance)
        found = accepted(changed)
        if found is None:
            continue
        assert found == records[: len(found)]
        kept = start + length * len(found)
        assert changed[:kept] == data[:kept]
        # All that is missing is the end of the file, or zeros: nothing that says of itself that it was on the disk.
        assert len(changed.rstrip(b"\0")) - kept < 2 * length + 1
        shorter += len(found) < STEPS
    assert shorter > 100


def test_the_last_record_of_version_1_is_not_dropped_either(tmp_path: pathlib.Path) -> None:
    records = [record(step, (0, 3) if step == 2 else ()) for step in range(6)]
    written_in_version_1(tmp_path / "t", records, MANY)
    data = bytearray((tmp_path / "t").read_bytes())
    assert accepted(bytes(data)) == records
    for at in range(len(data) - 400, len(data)):
        data[at] ^= 4
        assert accepted(bytes(data)) is None
        data[at] ^= 4
        found = accepted(bytes(data[:at]))
        assert found == records[: len(found or ())]
