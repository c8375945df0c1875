"""Which rows of a step are in which branches, and in which forward.

Where every group of rows has a direction of its own, groups are cut by position in the step, over all ranks. A rank
then has a few blocks: rows of one group each, for the branches of that group's direction.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mezo_scale.optim.batch import Batch, pick, repeat, rows


class Block(NamedTuple):
    """Rows `start` to `stop` of a rank's batch, all of group `group`; if it does not count, made for company only."""

    group: int
    start: int
    stop: int
    counts: bool = True


Forward = Sequence[Block]


def deal(first: int, counts: Sequence[int], rank: int, group_size: int, micro_batch: int | None) -> list[Forward]:
    """The forwards in which a rank evaluates its rows; every rank has equally many, with equally many blocks in each.

    Args:
        first: position in the step of rank 0's first row.
        counts: rows on each rank, 1 or more.
        rank: whose forwards.
        group_size: rows that share a direction.
        micro_batch: rows per forward and branch; None: all of the rank's.
    """
    most = max(counts) if micro_batch is None else micro_batch
    starts = [first + sum(counts[:number]) for number in range(len(counts))]
    everyone = [_blocks(start, count, group_size, most) for start, count in zip(starts, counts, strict=True)]
    longest = max(block.stop - block.start for blocks in everyone for block in blocks)
    number = max(map(len, everyone))
    mine = everyone[rank] + [everyone[rank][0]._replace(stop=1, counts=False)] * (number - len(everyone[rank]))
    size = number if micro_batch is None else micro_batch // longest
    return [mine[start : start + size] for start in range(0, number, size)]


def _blocks(first: int, count: int, group_size: int, most: int) -> list[Block]:
    """Rows at the positions from `first` on, cut where a group ends, and into at most `most` rows."""
    blocks, start = [], 0
    while start < count:
        group, inside = divmod(first + start, group_size)
        stop = min(start + min(group_size - inside, most), count)
        blocks.append(Block(group, start, stop))
        start = stop
    return blocks


@dataclass(frozen=True, slots=True)
class Piece:
    """What one forward evaluates.

    Attributes:
        batch: with all the rows that are needed, and perhaps others.
        index: per block its rows' numbers, equally many; None: one block of all rows.
        where: per block the positions of its branches among the step's.
        weights: per branch and row, 1 where a loss counts.
        counts: (group, rows that count) of each block.
    """

    batch: Batch
    index: list[list[int]] | None
    where: list[list[int]]
    weights: list[list[float]]
    counts: list[tuple[int, float]]

    @classmethod
    def whole(cls, batch: Batch, branches: int, *, counts: bool = True) -> Piece:
        """All rows in all branches."""
        weights = [[float(counts)] * rows(batch)] * branches
        return cls(batch, None, [list(range(branches))], weights, [(0, float(counts) * rows(batch))])

    @classmethod
    def of_blocks(cls, batch: Batch, blocks: Forward, per_group: int) -> Piece:
        """Each block's rows in the branches of its group; shorter blocks repeat their last row at weight 0.

        Args:
            per_group: branches of one direction.
        """
        size = max(block.stop - block.start for block in blocks)
        index = [[min(row, block.stop - 1) for row in range(block.start, block.start + size)] for block in blocks]
        where = [list(range(block.group * per_group, (block.group + 1) * per_group)) for block in blocks]
        weights = [
            [float(block.counts and row < block.stop) for row in range(block.start, block.start + size)]
            for block in blocks
            for _ in range(per_group)
        ]
        counts = [(block.group, float(block.counts * (block.stop - block.start))) for block in blocks]
        return cls(batch, index, where, weights, counts)

    @property
    def branches(self) -> list[int]:
        """Positions among the step's branches, in the order of the rows."""
        return [branch for block in self.where for branch in block]

    @property
    def rows(self) -> int:
        """Of one branch."""
        return len(self.weights[0])

    def two_branches(self) -> Piece:
        """The first block, in its first two branches at most: what shows how a model divides rows."""
        where = self.where[0][:2]
        index = None if self.index is None else self.index[:1]
        return Piece(self.batch, index, [where], self.weights[: len(where)], self.counts[:1])

    def parts(self) -> Iterator[tuple[Batch, list[int]]]:
        """(rows, positions of the branches that see them), block by block."""
        for number, where in enumerate(self.where):
            yield self.batch if self.index is None else pick(self.batch, self.index[number]), where

    def tall(self) -> Batch:
        """The rows of all branches, one branch after the other."""
        if self.index is None:
            return repeat(self.batch, len(self.where[0]))
        blocks = zip(self.index, self.where, strict=True)
        return pick(self.batch, [row for block, where in blocks for _ in where for row in block])


def check_micro_batch(micro_batch: int | None) -> None:
    """Raise ValueError unless it is None or a number of rows."""
    if micro_batch is not None and micro_batch < 1:
        raise ValueError(f"micro_batch is {micro_batch}: expected at least 1 row")
