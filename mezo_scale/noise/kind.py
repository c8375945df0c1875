"""Which noise: what travels from the optimizer's arguments to the sweeps, and into the header of a trajectory."""

from __future__ import annotations

from dataclasses import dataclass

from mezo_scale.noise import spec

_STREAMS = {"normal": spec.NORMAL, "rademacher": spec.RADEMACHER}


@dataclass(frozen=True, slots=True)
class Noise:
    """How z is drawn.

    Attributes:
        kind: "normal", or "rademacher" for z of +1 and -1; the argument that users call ``distribution``.

    Raises:
        ValueError: there is no such kind.
    """

    kind: str = "normal"

    def __post_init__(self) -> None:
        if self.kind not in _STREAMS:
            raise ValueError(f"distribution is {self.kind!r}: expected {' or '.join(map(repr, _STREAMS))}")

    @property
    def stream(self) -> int:
        """The specification's number of the stream that z is read from."""
        return _STREAMS[self.kind]


NORMAL, RADEMACHER = Noise("normal"), Noise("rademacher")
