"""A rank that fails in its own code keeps gathering with the others, who wait for its part of every weight.

All ranks call a sharded model equally often in a step. So one whose objective raised can make the calls that are left,
with the arguments of an earlier one, and then tell the others; without it they would wait until the process group's
timeout. A call that failed halfway can't be made good: then the others' `Heartbeat` ends them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from mezo_scale.perturbation import View


class Company:
    """The calls of one model in the step under way, and how many the step before took."""

    def __init__(self, model: nn.Module, view: View) -> None:
        self._model, self._view = model, view
        self._usual = 0
        self._begun = self._done = 0
        self._arguments: tuple[tuple[Any, ...], dict[str, Any]] | None = None

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Inside, calls count."""
        hooks = (
            self._model.register_forward_pre_hook(self._begin, with_kwargs=True),
            self._model.register_forward_hook(self._end),
        )
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def finish(self) -> None:
        """The step is over."""
        self._usual, self._begun, self._done = self._done, 0, 0

    def forget(self) -> None:
        """The calls so far were a check's: no other step makes them."""
        self._begun = self._done = 0

    @property
    def is_whole(self) -> bool:
        """Whether no call failed halfway."""
        return self._begun == self._done

    def left(self) -> int:
        """Calls that the others still make in this step, as far as one can tell; 0 if this rank can't make them."""
        return max(0, self._usual - self._done) if self.is_whole and self._arguments is not None else 0

    def call(self) -> None:
        """One of them."""
        assert self._arguments is not None
        args, kwargs = self._arguments
        self._model(*args, **kwargs)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._view.is_pairing:
            self._begun += 1
            self._arguments = args, kwargs

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        self._done += int(not self._view.is_pairing)
