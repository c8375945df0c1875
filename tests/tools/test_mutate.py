"""Damaged files by the thousand here, by the hundred thousand with the tool: each is refused in one line, or right."""

import random
from collections import Counter
from pathlib import Path

import pytest

from tools import mutate


@pytest.mark.parametrize(("what", "count"), [("logs", 4000), ("recipes", 400)])
@pytest.mark.filterwarnings("ignore:.*of a record that was cut off")
def test_what_is_damaged_is_refused_or_is_what_it_says(what: str, count: int) -> None:
    found = Counter(mutate.SUBJECTS[what](count, random.Random(11)))
    assert [outcome for outcome in found if outcome.startswith("WRONG")] == []
    assert found["refused"] > count / 2
    assert found.total() == count
    assert len(found) > 1


def test_a_log_that_lost_a_step_it_had_on_the_disk_would_be_seen(tmp_path: Path) -> None:
    subject = mutate.subjects(tmp_path)[0]
    whole, shorter = (mutate.Trajectory.parse(subject.data[: len(subject.data) - cut]) for cut in (0, 4 * subject.size))
    assert not subject.is_wrong(subject.data, whole)
    assert subject.is_wrong(subject.data, shorter)
    assert subject.is_wrong(subject.other, whole)
    holed = subject.data[: -2 * subject.size] + bytes(subject.size) + subject.data[-subject.size :]
    before = mutate.Trajectory.parse(subject.data[: -2 * subject.size])
    assert subject.is_wrong(holed, before)  # its last record says that the one before it was there
