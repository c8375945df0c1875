"""Which trainable parameters anything has read so far, on any rank: the others are neither perturbed nor updated."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Sequence

from mezo_scale import collectives


class Reads:
    """The ranks' common knowledge of what was read. It only grows: an expert that no row has met yet may be met later.

    Attributes:
        names: of the trainable parameters, in the order of the trajectory's manifest.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self._known: set[str] = set()
        self._said = False

    @property
    def unread(self) -> tuple[int, ...]:
        """Positions of the parameters that nothing has read."""
        return tuple(number for number, name in enumerate(self.names) if name not in self._known)

    def take_up(self, unread: Iterable[int]) -> None:
        """Go on where a run was left: with these parameters unread, and the others read."""
        left = set(unread)
        self._known = {name for number, name in enumerate(self.names) if number not in left}

    def news(self, read: Collection[str]) -> int:
        """How many of the names read on this rank are not known to all."""
        return sum(name not in self._known for name in read)

    def agree(self, read: Collection[str]) -> None:
        """Add what any rank has read. Every rank calls it."""
        counts = collectives.sum_integers([int(name in read) for name in self.names])
        self._known |= {name for name, count in zip(self.names, counts, strict=True) if count}

    def say(self) -> None:
        """Name what is unread, after the first step."""
        left = [self.names[number] for number in self.unread]
        if left and not self._said:
            shown = ", ".join(left[:3]) + (", ..." if len(left) > 3 else "")
            warnings.warn(
                f"{len(left)} trainable parameters are read by nothing in this step ({shown}): they are neither "
                "perturbed nor updated until something reads them; if nothing ever does, freeze them",
                stacklevel=4,
            )
        self._said = True
