"""The steps of a run in memory: one row of an array each, made into a `StepRecord` where somebody looks at it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from mezo_scale.errors import TrajectoryError
from mezo_scale.trajectory.record import Header, StepRecord

Rows = npt.NDArray[Any]
"""A structured array with the fields of `payload`, and whatever a file's records have besides."""


def payload(header: Header) -> list[tuple[str, str] | tuple[str, str, tuple[int]]]:
    """The fields of a step: NumPy's (name, dtype, shape), little-endian and without padding."""
    k, g = header.num_directions, header.num_groups
    return [
        ("loss", "<f8"),
        ("seeds", "<u8", (k,)),
        ("grads", "<f8", (k,)),
        ("alphas", "<f4", (g * k,)),
        ("decays", "<f4", (g,)),
    ]


def fill(row: Any, record: StepRecord) -> None:
    """Put a record into a row (an array of one element). Raises ValueError if it has other numbers of directions."""
    row["loss"] = record.loss
    names = (("seeds", record.seeds), ("grads", record.projected_grads), ("alphas", record.alphas))
    for name, values in (*names, ("decays", record.decays)):
        if len(values) != row.dtype[name].shape[0]:
            raise ValueError(f"the record has {len(values)} {name}, expected {row.dtype[name].shape[0]}")
        row[name] = values


class Steps(Sequence[StepRecord]):
    """Records in the order of their steps, from 0.

    Args:
        rows: one per step.
        unread: where the set of unread parameters changes, (first step, positions), in order.
    """

    def __init__(self, rows: Rows, unread: list[tuple[int, tuple[int, ...]]] | None = None) -> None:
        self._rows, self._count = rows, len(rows)
        self.unread = unread if unread is not None else []

    @property
    def rows(self) -> Rows:
        """The steps' numbers, column by column: do not write to them."""
        return self._rows[: self._count]

    def unread_at(self, step: int) -> tuple[int, ...]:
        """Positions of the parameters that nothing had read by then; of the last change before a step yet to come."""
        number = bisect_right(self.unread, step, key=lambda change: change[0])
        return self.unread[number - 1][1] if number else ()

    def append(self, record: StepRecord) -> None:
        """Add the next step."""
        if self._count == len(self._rows) or not self._rows.flags.writeable:
            grown = np.zeros(max(64, self._count + self._count // 4), dtype=self._rows.dtype)
            grown[: self._count] = self._rows[: self._count]
            self._rows = grown
        fill(self._rows[self._count : self._count + 1], record)
        if record.unread != self.unread_at(self._count):
            self.unread.append((self._count, record.unread))
        self._count += 1

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> StepRecord: ...

    @overload
    def __getitem__(self, index: slice) -> list[StepRecord]: ...

    def __getitem__(self, index: int | slice) -> StepRecord | list[StepRecord]:
        if isinstance(index, slice):
            return [self._record(step) for step in range(*index.indices(self._count))]
        return self._record(range(self._count)[index])

    def _record(self, step: int) -> StepRecord:
        row = self._rows[step]
        seeds, grads, alphas, decays = (tuple(row[name].tolist()) for name in ("seeds", "grads", "alphas", "decays"))
        return StepRecord(step, seeds, grads, alphas, decays, float(row["loss"]), self.unread_at(step))


@dataclass(frozen=True, slots=True)
class Contents:
    """What a trajectory's file holds.

    Attributes:
        header: what it belongs to.
        steps: all whole ones.
        whole: bytes up to the end of the last whole append.
        size: bytes of the file: what lies between the two is a torn end.
        records: in the file up to there, of all kinds; 0 where the format is not appended to.
        closed: whether the writer left in order after the last step.
        final: why nothing can be appended, for a message; empty if something can.
    """

    header: Header
    steps: Steps
    whole: int
    size: int
    records: int = 0
    closed: bool = False
    final: str = ""


def unread_bits(header: Header, unread: tuple[int, ...]) -> bytes:
    """A bitmap of the manifest's parameters: bit k is set if k is unread."""
    bits = np.zeros(len(header.manifest), dtype=bool)
    bits[list(unread)] = True
    return np.packbits(bits, bitorder="little").tobytes()


def unread_positions(header: Header, bits: bytes) -> tuple[int, ...]:
    """Back from a bitmap, which may be followed by padding."""
    every = np.unpackbits(np.frombuffer(bits, dtype=np.uint8), bitorder="little")[: len(header.manifest)]
    return tuple(np.flatnonzero(every).tolist())


def check_end(data: bytes, whole: int, bad: int, number: int, size: int, longest: int, where: str) -> None:
    """Whether what follows the last whole append is what is left of those that were not on the disk yet.

    That is a beginning of their bytes, followed by nothing, or by zeros up to the file's end where the file system had
    reserved the space. A record whose checksum is there but wrong was on the disk, and is damage; so is what lies
    further from the end than appends may that are not on the disk.

    Args:
        whole: where the last whole append ends.
        bad: where the first record begins that is cut or wrong; its `number`, for the message.
        size, longest: bytes of a record, and how many records may be missing at most.

    Raises:
        TrajectoryError: it is damage, for nothing is known to be whole from there on.
    """
    rest = data[bad:]
    cut = len(rest) < size or len(rest.rstrip(b"\0")) <= size - 4
    if len(data) - whole > longest * size or not cut:
        raise TrajectoryError(
            f"{where} is damaged at record {number} (byte {bad} of {len(data)}), which no crash leaves like that: "
            "restore the file from a copy"
        )
