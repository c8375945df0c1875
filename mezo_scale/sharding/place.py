"""Where a module reads a parameter."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from mezo_scale.sharding import schemes
from mezo_scale.sharding.adapter import Adapter, Inner


class Place(NamedTuple):
    """Where a module reads a parameter, under its canonical name."""

    module: nn.Module
    attr: str
    name: str
    param: nn.Parameter  # as the model lists it
    inner: Inner | None  # for one that lies inside another tensor

    @property
    def adapter(self) -> Adapter | None:
        """Who knows how the parameter is stored; None for an inner one, and for a kind that is not known."""
        return None if self.inner is not None else schemes.find(self.param)

    @property
    def identity(self) -> object:
        """The same for all places of a tied weight."""
        return self.param if self.inner is None else self.inner.places[0]

    @property
    def trainable(self) -> bool:
        return self.param.requires_grad if self.inner is None else self.inner.trainable
