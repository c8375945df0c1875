"""Perturbed weights, made where they are wanted: in scratch for the time that a module runs, or to be kept."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from mezo_scale import noise
from mezo_scale.errors import ModelError
from mezo_scale.noise import Noise
from mezo_scale.noise.api import Perturbed
from mezo_scale.noise.parts import Branches
from mezo_scale.perturbation import local
from mezo_scale.perturbation.reading import written
from mezo_scale.perturbation.scratch import Scratch, Slot
from mezo_scale.perturbation.substitute import is_half
from mezo_scale.sharding import Shard, Site
from mezo_scale.sharding.shard import is_normalisation

Branch = tuple[int, float]
"""(seed, scale): the weights are theta + scale * z(seed)."""


class Place:
    """Where a weight lies and where its branches are put: looked at once, and used for as long as it stays so.

    Attributes:
        slot: the memory of the branches.
        fill: fill(weight, branches).
    """

    __slots__ = ("_is", "fill", "slot")

    def __init__(self, weight: Tensor, perturbed: Perturbed, slot: Slot) -> None:
        self.slot = slot
        self._is = _lies(weight)
        if self._is is not None:
            self.fill = perturbed.filling(weight, slot.whole)
        else:
            self.fill = lambda weight, branches: perturbed.view(weight.detach().contiguous(), branches, slot.whole)

    def is_for(self, weight: Tensor, slot: Slot) -> bool:
        """Whether all lies as it did."""
        return slot is self.slot and self._is is not None and self._is == _lies(weight)


def _lies(weight: Tensor) -> tuple[object, ...] | None:
    """Where a weight's numbers are; None: it has no memory, or is not contiguous there."""
    if isinstance(weight, FakeTensor) or not weight.is_contiguous():
        return None
    return weight.data_ptr(), weight.shape, weight.dtype, weight.device


class Weights:
    """Makes theta + scale * z(seed) of single parameters.

    Attributes:
        dtype: of perturbed matrices; None: the weights' own.
        noise: how z is drawn.
        scratch: memory that is used again from module to module.
    """

    def __init__(self, dtype: torch.dtype | None, noise: Noise, scratch: Scratch) -> None:
        self.dtype = dtype
        self.noise = noise
        self.scratch = scratch

    def perturb(self, site: Site, branches: Branches, *, keep: bool = False, wide: bool = False) -> list[Tensor]:
        """The site's weight in each branch; branches with one seed share one generation of z.

        Args:
            branches: at most two, where memory counts.
            keep: in memory of its own, not in scratch; as it is where autograd records, whose backward comes later.
            wide: in float32, whatever it is stored in.
        """
        with torch._C.DisableTorchFunction():
            weight, place = self._made(site, branches, keep=keep, wide=wide)
            parts = place.slot.parts
            return parts if not isinstance(weight, DTensor) else [local.like(part, weight) for part in parts]

    def together(self, site: Site, branches: Branches, *, wide: bool = False) -> Tensor:
        """As `perturb`, in one tensor [branches, ...], with a count of its own of what writes it. Of no DTensor."""
        with torch._C.DisableTorchFunction():
            return self._made(site, branches, wide=wide)[1].slot.whole.data

    def _made(self, site: Site, branches: Branches, *, keep: bool = False, wide: bool) -> tuple[Tensor, Place]:
        weight = stored(site)
        held = local.local_of(weight)
        dtype = self.dtype_of(held, wide=wide)
        shape = (len(branches), *held.shape)
        if keep or torch.is_grad_enabled():
            with torch.inference_mode(False):  # there tensors do not count what is written to them
                place = self._place(site, weight, Slot(torch.empty(shape, dtype=dtype, device=held.device)))
        else:
            slot = self.scratch.take(shape, dtype, held.device)
            known = self.scratch.notes.get((site, len(branches)))
            place = known if known is not None and known.is_for(held, slot) else self._place(site, weight, slot)
            if place is not known and self.scratch.holds(slot.whole):
                self.scratch.notes[site, len(branches)] = place
        place.fill(held, branches)
        return weight, place

    def _place(self, site: Site, weight: Tensor, slot: Slot) -> Place:
        held = local.local_of(weight).detach()
        runs, shape = local.runs_held(weight), tuple(weight.shape)
        perturbed = Perturbed.of(held.contiguous(), site.param_id, runs=runs, noise=self.noise, shape=shape)
        return Place(held, perturbed, slot)

    def rows(self, site: Site, branch: Branch, ids: Tensor) -> Tensor:
        """Rows of a perturbed table: only those that are looked up are made."""
        with torch._C.DisableTorchFunction():
            table = stored(site).detach()
            flat = ids.reshape(1, -1).long()
            out = torch.empty(1, flat.shape[1], *table.shape[1:], dtype=self.dtype_of(table), device=table.device)
            noise.rows(table, site.param_id, [branch], flat, out, noise=self.noise)
            return out.view(*ids.shape, *table.shape[1:])

    def dtype_of(self, weight: Tensor, *, wide: bool = False) -> torch.dtype:
        """What a weight is perturbed in. wide: in float32, whatever it is stored in."""
        if wide:
            return torch.float32
        return self.dtype if self.dtype is not None and weight.dim() > 1 else weight.dtype

    def outlive(self, result: Any) -> Any:
        """A module may return its parameter (a prompt, a token): copied, for the scratch is reused."""
        if isinstance(result, Tensor):
            return result.clone() if not isinstance(result, DTensor) and self.scratch.holds(result) else result
        leaves, spec = tree_flatten(result)
        return tree_unflatten([self.outlive(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)


def check_rank(noise: Noise, shards: Iterable[Shard]) -> None:
    """Raise a ModelError that names the first matrix whose smaller side is below the noise's rank."""
    for shard in shards:
        try:
            noise.rank_of(shard.shape)
        except ValueError as error:
            raise ModelError(f"{shard.name}: {error}") from None


def check_unwritten(site: Site, made: Tensor) -> None:
    """Raise a ViewError if something has written to a perturbed weight since it was made, through whatever view."""
    if local.local_of(made)._version:
        raise written(site.name)


def stored(site: Site) -> Tensor:
    """The parameter that is at a site now: gathered, while its module runs. FSDP1 keeps it as an ordinary attribute."""
    param = site.module._parameters.get(site.attr)
    return param if param is not None else site.module.__dict__[site.attr]


def is_wide(module: nn.Module) -> bool:
    """Whether a module's perturbed weights are float32 whatever they are stored in.

    Normalisation weights lie near 1, where bfloat16 numbers are 0.004 to 0.008 apart: in 16 bits a perturbation of
    0.001 hardly moves them (docs/decisions/0005). Statistics that a module keeps in 16 bits tie it to 16 bits.
    """
    return is_normalisation(module) and not any(map(is_half, module.buffers(recurse=False)))


def is_lookup(module: nn.Module) -> bool:
    """Whether a module is a table, whose rows are perturbed as they are looked up."""
    if not isinstance(module, nn.Embedding) or module.max_norm is not None:
        return False
    return not isinstance(module._parameters.get("weight"), DTensor | FakeTensor | None)
