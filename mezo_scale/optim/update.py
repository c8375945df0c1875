"""The only writer of weights: records in, shards changed. Training, resuming and replaying all come through here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from mezo_scale.errors import ShardingError, TrajectoryError
from mezo_scale.noise import NORMAL, Noise, param_id
from mezo_scale.noise.api import part_of
from mezo_scale.noise.parts import Part
from mezo_scale.noise.writing import write_all_
from mezo_scale.sharding import Layout, Shard
from mezo_scale.sharding.state import as_state, copy_, fits
from mezo_scale.trajectory import StepRecord


class Writer:
    """The update of one model's shards, and what 16-bit storage needs besides: the low half of float32 masters.

    Args:
        layout: the model's.
        groups: parameter group of each shard's name; None: all in group 0.
        rounding: "nearest"; "stochastic" (16-bit shards only); or "master": a float32 master for bfloat16 shards, at 16
            bits more per element (float32 shards are their own master).
        noise: how z is drawn.

    Attributes:
        state: per bfloat16 parameter under "master", the low halves of this rank's elements, int16: what a checkpoint
            must hold besides the weights.
    """

    def __init__(
        self,
        layout: Layout,
        groups: dict[str, int] | None = None,
        *,
        rounding: str = "nearest",
        noise: Noise = NORMAL,
    ) -> None:
        if rounding not in ("nearest", "stochastic", "master"):
            raise ValueError(f"rounding is {rounding!r}: expected 'nearest', 'stochastic' or 'master'")
        halves = [shard.name for shard in layout.shards if shard.local.dtype == torch.float16]
        if rounding == "master" and halves:
            raise ValueError(
                f"rounding 'master' splits bfloat16 from float32 bits, but {halves[0]} is float16: load as bfloat16"
            )
        self.layout = layout
        self.groups = groups if groups is not None else {}
        self.rounding = rounding
        self.noise = noise
        self.remainders: dict[str, Tensor] = {}
        self._parts: dict[str, Part] = {}
        self.state: dict[nn.Parameter, Tensor] = {}
        if rounding == "master":
            self._add_remainders()
        self._left = self._versions()

    def _counted(self) -> list[nn.Parameter]:
        """The parameters of which torch counts how often they are written: those that are stored whole."""
        return [] if self.layout.gathers else list(self.layout.parameters.values())

    def _versions(self) -> list[int]:
        return [-1 if param.is_inference() else param._version for param in self._counted()]

    def check_untouched(self) -> None:
        """Raise a TrajectoryError that names the first parameter that something else has written since `apply_`."""
        for name, left, found in zip(self.layout.parameters, self._left, self._versions(), strict=False):
            if left != found:
                raise _other_values(name)

    def check_goes_on(self, other: Writer) -> None:
        """Raise a TrajectoryError that names the first shard whose values are not what another writer left."""
        before = {shard.name: shard for shard in other.layout.shards}
        for shard in self.layout.shards:
            old = before.get(shard.name)
            if old is None or old.paged or shard.paged or not _same_storage(shard, old) or old.local is shard.local:
                continue
            if old.local.device == shard.local.device and not torch.equal(old.local, shard.local):
                raise _other_values(shard.name)

    def _add_remainders(self) -> None:
        """The low halves of the masters, zero: per shard a piece of what is kept for its parameter."""
        halves: dict[nn.Parameter, list[Shard]] = {}
        for shard in self.layout.shards:
            if shard.local.dtype == torch.bfloat16:
                halves.setdefault(self.layout.parameters[shard.name], []).append(shard)
        for param, shards in halves.items():
            sizes = [shard.local.numel() for shard in shards]
            device = "cpu" if shards[0].paged else shards[0].local.device
            stored = torch.zeros(sum(sizes), dtype=torch.int16, device=device)
            self.state[param] = as_state(param, stored)
            self.remainders.update(zip((shard.name for shard in shards), stored.split(sizes), strict=True))

    def low_bits(self) -> list[Shard]:
        """The low halves of the masters as shards, int16, under names of their own; none under another rounding."""
        found = ((shard, self.remainders.get(shard.name)) for shard in self.layout.shards)
        return [low_bits_of(shard, low) for shard, low in found if low is not None]

    def stored(self) -> list[Shard]:
        """All that this rank stores of what is tuned: weights, and the low halves of their masters."""
        return [*self.layout.shards, *self.low_bits()]

    def take_low_bits_(self, values: Mapping[str, Tensor]) -> None:
        """Put saved low halves in place, int16 by shard name. Raises ShardingError: they are of other shards."""
        sizes = {name: low.numel() for name, low in self.remainders.items()}
        if sizes != {name: value.numel() for name, value in values.items()}:
            raise ShardingError(
                f"the low bits that were saved are those of {len(values)} shards, but rounding {self.rounding!r} keeps "
                f"{len(sizes)} here: start from the base model"
            )
        for name, low in self.remainders.items():
            low.copy_(values[name])

    def take_over_(self, other: Writer) -> None:
        """Go on with the masters of a writer of the same model, looked at earlier.

        Raises:
            ShardingError: the model is stored in another way since, so that they no longer belong to these shards.
        """
        before = {shard.name: shard for shard in other.layout.shards}
        for shard in self.layout.shards:
            if shard.name not in other.remainders:
                continue
            if not _same_storage(shard, before[shard.name]):
                raise ShardingError(
                    f"{shard.name} was sharded or cast anew after steps with rounding 'master', whose low bits "
                    "belong to the old shards: wrap and cast the model first, then make the optimizer"
                )
            self.remainders[shard.name].copy_(other.remainders[shard.name])

    def check_state(self, state: dict[nn.Parameter, Tensor]) -> None:
        """Whether saved low bits, by parameter, are all there and fit. Raises ValueError."""
        for name, param in self.layout.parameters.items():
            if param in self.state and param not in state:
                raise ValueError(
                    f"the state holds no remainder of {name}, without which rounding 'master' would go on from other "
                    "weights: give a state that was saved with rounding 'master'"
                )
            if param in self.state and not fits(state[param], self.state[param]):
                raise ValueError(
                    f"the state's remainder of {name} is {_describe(state[param])}, expected "
                    f"{_describe(self.state[param])}: load it into a model that is sharded as the saved one"
                )

    def load_state_(self, state: dict[nn.Parameter, Tensor]) -> None:
        """Put saved low bits, checked before, in place."""
        for param, value in self.state.items():
            copy_(value, state[param])

    def apply_(self, records: Sequence[StepRecord]) -> None:
        """Write the records' steps, one after the other, in one sweep over the shards; then stale copies are dropped.

        Skipped steps write nothing, and no step writes a parameter that it leaves unread. n records in one call give
        the bits of n calls.
        """
        records = [record for record in records if not record.skipped]
        if not records:
            return
        reading: dict[tuple[bool, ...], list[Shard]] = {}
        for number, shard in enumerate(self.layout.shards):
            which = tuple(not record.unread or number not in record.unread for record in records)
            reading.setdefault(which, []).append(shard)
        for which, shards in reading.items():
            written = [record for record, reads in zip(records, which, strict=True) if reads]
            if written:
                self._write_(shards, written)
        self.layout.refresh()
        increment_version(self._counted())  # the sweeps write past torch, and another writer must see that they did
        self._left = self._versions()

    def _write_(self, shards: Sequence[Shard], records: Sequence[StepRecord]) -> None:
        groups = range(len(records[0].decays))
        alphas = [[record.alphas_of(group) for record in records] for group in groups]
        # The first row of decays is of shards that have none.
        decays = [[1.0] * len(records)] + [[record.decays[group] for record in records] for group in groups]
        step = (
            np.array([record.seeds for record in records], dtype=np.uint64),
            np.array(alphas, dtype=np.float32),
            np.array(decays, dtype=np.float32),
        )
        stochastic = self.rounding == "stochastic"
        here = [self._part(shard, shard.local) for shard in shards if shard.paged is None]
        write_all_(here, *step, stochastic=stochastic, noise=self.noise)
        for shard in shards:
            if shard.paged is not None:
                with shard.storage() as local:
                    write_all_([self._part(shard, local)], *step, stochastic=stochastic, noise=self.noise)

    def _part(self, shard: Shard, local: Tensor) -> Part:
        """A shard to be written, checked once for as long as its memory is the same."""
        part = self._parts.get(shard.name)
        if part is None or part.local is not local:
            group = self.groups.get(shard.name, 0)
            part = self._parts[shard.name] = part_of(
                local,
                shard.runs,
                shard.param_id,
                remainder=self.remainders.get(shard.name),
                noise=self.noise,
                shape=shard.shape,
                alphas=group,
                decays=group + 1 if shard.decayed else 0,
            )
        return part


def _other_values(name: str) -> TrajectoryError:
    return TrajectoryError(
        f"{name} has other values than the last step has left (loaded, clipped, averaged, or another optimizer's?), "
        "which the trajectory does not have, so that a replay would give other weights: leave them, or begin a new "
        "trajectory"
    )


def low_bits_of(shard: Shard, low: Tensor) -> Shard:
    """The low half of a shard's master as a shard: the same elements, `low` of them, under a name of its own."""
    name = f"{shard.name}.low_bits"
    return replace(shard, name=name, param_id=param_id(name), local=low, paged=None)


def _same_storage(one: Shard, other: Shard) -> bool:
    same = (one.shape, one.local.dtype, one.local.numel()) == (other.shape, other.local.dtype, other.local.numel())
    return same and np.array_equal(one.runs, other.runs)


def _describe(value: Tensor) -> str:
    return f"{type(value).__name__} {value.dtype}{list(value.shape)}"
