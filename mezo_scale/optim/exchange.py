"""What ranks tell each other in a step: losses, and what they have to know of each other.

All of it takes one all-reduce. Besides the losses it carries whether the ranks' last records agree, whether any of them
has read a parameter for the first time, and whether any of them has failed. The last step of a run has none after it
that would carry its record: `compare` takes an exchange of its own.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection

from mezo_scale import collectives
from mezo_scale.errors import RankError, ViewError
from mezo_scale.optim.losses import Sums
from mezo_scale.optim.reads import Reads
from mezo_scale.trajectory import StepRecord


def add_up(
    step: int,
    last: StepRecord | None,
    mine: Sums,
    reads: Reads,
    read: Collection[str],
    group_size: int | None = None,
) -> Sums:
    """The sums over all ranks, the same on each of them. Every rank must call it, or `fail`.

    Args:
        last: the record before; the ranks compare it.
        mine: this rank's losses.
        group_size: rows that every group must have; None: any number.
        reads: what the ranks know to be read; `read` of this rank is added.

    Raises:
        RankError: a rank's ``last`` record is another one, or a rank has failed; it is named. Or rows are missing.
        ViewError: no rank has read any of the parameters.
    """
    values, news = _exchange(step, last, mine.values, reads.news(read))
    totals = Sums.parse(values, len(mine.sums))
    if news:
        reads.agree(read)
    if len(reads.unread) == len(reads.names):
        raise ViewError(
            "the losses were computed without reading any of the model's trainable parameters: evaluate the model "
            "that the optimizer was made with"
        )
    if group_size is not None and any(count != group_size for count in totals.counts):
        raise RankError(
            f"step {step} lacks rows of a rank that failed in measure() (a group has {min(totals.counts):g} rows, "
            f"expected {group_size}): measure the step's rows again, on all ranks"
        )
    return totals


def count_rows(step: int, rows: int | None) -> list[int]:
    """How many rows each rank has. Every rank must call it.

    Args:
        rows: of this rank; None: it has met an error, which it raises itself.

    Raises:
        RankError: on the other ranks, naming those with an error.
    """
    counts = collectives.gather_integers(-1 if rows is None else rows)
    failed = [rank for rank, count in enumerate(counts) if count < 0]
    if failed and rows is not None:
        raise _failure(step, failed)
    return counts


def fail(step: int, last: StepRecord | None, numbers: int, *, patience_s: float | None) -> bool:
    """Tell the other ranks that this one has no losses for the step: they raise a `RankError` instead of waiting.

    Where they are in the middle of gathering weights with this rank, they can't be told that way.

    Args:
        numbers: how many values the others would give.
        patience_s: how long to wait for them; None: as long as the process group does.

    Returns:
        Whether they know.
    """
    if not collectives.is_distributed():
        return True
    try:
        _exchange(step, last, [0.0] * numbers, 0, failed=True, patience_s=patience_s)
    except RankError:
        return True
    except Exception:  # torch's own, of many kinds: the others did not come
        return False
    return True


def compare(step: int, last: StepRecord | None) -> None:
    """Compare the record before `step` among the ranks, where no step follows. Every rank must call it.

    Raises:
        RankError: a rank's record is another one; it is named.
    """
    _check_same(collectives.gather_integers(_checksum(last)), step - 1)


def _exchange(
    step: int,
    last: StepRecord | None,
    sums: list[float],
    news: int,
    *,
    failed: bool = False,
    patience_s: float | None = None,
) -> tuple[list[float], bool]:
    """The sums over all ranks, and whether any rank has news. Raises RankError as `add_up` does."""
    digest = _digest(last)
    mine = [*sums, digest, digest**2, float(news), float(failed)]
    *totals, digests, squares, newer, failures = collectives.sum_scalars(mine, timeout_s=patience_s)
    if failures:
        ranks = [rank for rank, other in enumerate(collectives.gather_integers(int(failed))) if other]
        raise _failure(step, ranks)
    # Equality in Cauchy-Schwarz: all digests are the same. In whole numbers, for any number of ranks.
    if int(squares) * collectives.world_size() != int(digests) ** 2:
        _check_same(collectives.gather_integers(digest), step - 1)
    return totals, newer > 0


def _failure(step: int, ranks: list[int]) -> RankError:
    return RankError(
        f"rank {', '.join(map(str, ranks))} failed while it evaluated step {step}, and says why itself: the step was "
        "taken on no rank"
    )


def _check_same(everyone: list[int], step: int) -> None:
    usual = max(dict.fromkeys(everyone), key=everyone.count)  # of two ranks the first is taken to be right
    if all(digest == usual for digest in everyone):
        return
    odd = ", ".join(str(rank) for rank, other in enumerate(everyone) if other != usual)
    raise RankError(
        f"rank {odd} recorded another step {step} than the other ranks: give all ranks the same seed, eps, learning "
        "rate and schedule"
    )


def _digest(record: StepRecord | None) -> int:
    """16 bits of a record, so that the sum of their squares is exact in float64, for up to two million ranks."""
    return _checksum(record) & 0xFFFF


def _checksum(record: StepRecord | None) -> int:
    return zlib.crc32(repr(record).encode())
