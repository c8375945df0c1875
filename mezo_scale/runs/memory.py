"""How much memory each phase of a run took, on the rank that took most."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mezo_scale.collectives import max_integer
from mezo_scale.distributed.memory import PeakMemory

LOADING, EVALUATION, INFERENCE, STEPS, CHECKPOINT = (
    "loading",
    "evaluation",
    "inference alone",
    "training steps",
    "checkpoint",
)
MEANING = {
    LOADING: "up to the first forward pass",
    EVALUATION: "of the dev and test splits, train.eval_batch examples at a time",
    INFERENCE: "one forward pass with the weights as they are, on the rows of the first training step",
    STEPS: "all passes of every step, and the writing of the weights",
    CHECKPOINT: "rank 0 gathers one parameter at a time",
}


class PhaseMemory:
    """Peak memory by phase: every moment of a session belongs to one, the innermost that is open.

    What is measured is `PeakMemory`'s: torch's allocator on CUDA; on a CPU the resident memory of the process, with the
    interpreter, the libraries and what the allocator keeps.
    """

    def __init__(self, device: torch.device) -> None:
        self._memory = PeakMemory(device)
        self._most: dict[str, int] = {}
        self._phase = LOADING

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What is used inside belongs to this phase, and not to the one around it."""
        outer = self._phase
        self._turn_to(name)
        try:
            yield
        finally:
            self._turn_to(outer)

    def most_gib(self, name: str) -> float:
        """The most of any rank so far, GiB; 0 for a phase that there was none of. Every rank calls it."""
        if name == self._phase:
            self._take_in()
        return max_integer(self._most.get(name, 0)) / 2**30

    def all_gib(self) -> dict[str, float]:
        """`most_gib` of every phase that there was. Every rank calls it."""
        return {name: gib for name in MEANING if (gib := self.most_gib(name))}

    def _turn_to(self, name: str) -> None:
        self._take_in()
        self._memory.reset()
        self._phase = name

    def _take_in(self) -> None:
        self._most[self._phase] = max(self._most.get(self._phase, 0), self._memory.peak())
