"""Which noise: what travels from the optimizer's arguments to the sweeps, and into the header of a trajectory."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from mezo_scale.noise import spec

_STREAMS = {"normal": spec.NORMAL, "rademacher": spec.RADEMACHER}
_ENTRIES = {"signs": spec.RADEMACHER, "normal": spec.NORMAL}
_NAME = re.compile(r"low_rank of rank ([1-9][0-9]*) in (signs|normal)")


@dataclass(frozen=True, slots=True)
class Noise:
    """How z is drawn.

    Attributes:
        kind: "normal"; "rademacher" for z of +1 and -1; or "low_rank" for z = U V^T / sqrt(rank) of matrices, while
            parameters of any other number of dims have a z for each element. The argument that users call
            ``distribution``.
        rank: of "low_rank": columns of U and V. Not given it is 1.
        entries: of "low_rank": whether U, V and the z of all else are "signs" or "normal". Not given they are signs;
            then z of rank 1 is +1 and -1 exactly.

    Raises:
        ValueError: there is no such kind, rank or word, or rank and entries are given of another kind.
    """

    kind: str = "normal"
    rank: int | None = None
    entries: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in (*_STREAMS, "low_rank"):
            raise ValueError(f"distribution is {self.kind!r}: expected 'normal', 'rademacher' or 'low_rank'")
        if self.kind == "low_rank":
            object.__setattr__(self, "rank", 1 if self.rank is None else self.rank)
            object.__setattr__(self, "entries", "signs" if self.entries is None else self.entries)
            if type(self.rank) is not int or self.rank < 1:
                raise ValueError(f"rank is {self.rank!r}: expected a whole number of at least 1")
            if self.entries not in _ENTRIES:
                raise ValueError(f"entries is {self.entries!r}: expected {' or '.join(map(repr, _ENTRIES))}")
        elif (self.rank, self.entries) != (None, None):
            raise ValueError(
                f"rank is {self.rank} and entries {self.entries}, but distribution is {self.kind!r}: only 'low_rank' "
                "has them"
            )

    @classmethod
    def of(cls, distribution: str | Noise) -> Noise:
        """The noise that users name: itself, a kind, or what `name` gave. Raises ValueError."""
        if isinstance(distribution, Noise):
            return distribution
        named = _NAME.fullmatch(distribution)
        return cls(distribution) if named is None else cls("low_rank", int(named[1]), named[2])

    @property
    def name(self) -> str:
        """All of it in words, as a trajectory keeps it; `of` reads it."""
        return self.kind if self.rank is None else f"{self.kind} of rank {self.rank} in {self.entries}"

    @property
    def version(self) -> int:
        """Of the specification, the oldest that has this noise."""
        return 1 if self.rank is None else 2

    @property
    def stream(self) -> int:
        """The specification's number of the stream that a z for each element is read from."""
        return _STREAMS[self.kind] if self.entries is None else _ENTRIES[self.entries]

    def rank_of(self, shape: Sequence[int]) -> int | None:
        """The rank of z of a parameter of that whole shape; None: each element has a z of its own.

        Raises:
            ValueError: a matrix that has no such rank.
        """
        if self.rank is None or len(shape) != 2 or not shape[0] * shape[1]:
            return None
        if self.rank > min(shape):
            raise ValueError(
                f"rank is {self.rank}, but a matrix of {shape[0]} x {shape[1]} has rank {min(shape)} at most: take a "
                f"rank of at most {min(shape)}, or a dense distribution"
            )
        return self.rank


NORMAL, RADEMACHER = Noise("normal"), Noise("rademacher")
