"""The only writer of weights: records in, shards changed. Training, resuming and replaying all come through here."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from mezo_scale import noise
from mezo_scale.sharding import Layout, Shard
from mezo_scale.trajectory import StepRecord


class Writer:
    """The update of one model's shards, and what 16-bit storage needs besides: the low half of float32 masters.

    Args:
        layout: the model's.
        groups: parameter group of each shard's name; None: all in group 0.
        rounding: "nearest"; "stochastic" (16-bit shards only); or "master": a float32 master for bfloat16 shards, at 16
            bits more per element (float32 shards are their own master).
        distribution: "normal" or "rademacher".
    """

    def __init__(
        self,
        layout: Layout,
        groups: dict[str, int] | None = None,
        *,
        rounding: str = "nearest",
        distribution: str = "normal",
    ) -> None:
        if rounding not in ("nearest", "stochastic", "master"):
            raise ValueError(f"rounding is {rounding!r}: expected 'nearest', 'stochastic' or 'master'")
        if distribution not in ("normal", "rademacher"):
            raise ValueError(f"distribution is {distribution!r}: expected 'normal' or 'rademacher'")
        halves = [shard.name for shard in layout.shards if shard.local.dtype == torch.float16]
        if rounding == "master" and halves:
            raise ValueError(
                f"rounding 'master' splits bfloat16 from float32 bits, but {halves[0]} is float16: load as bfloat16"
            )
        self.layout = layout
        self.groups = groups if groups is not None else {}
        self.rounding = rounding
        self.distribution = distribution
        self.remainders = {
            shard.name: torch.zeros(
                shard.local.shape, dtype=torch.int16, device="cpu" if shard.paged else shard.local.device
            )
            for shard in layout.shards
            if rounding == "master" and shard.local.dtype == torch.bfloat16
        }

    def apply_(self, records: Sequence[StepRecord]) -> None:
        """Write the records' steps, one after the other, in one sweep over the shards; then stale copies are dropped.

        Skipped steps write nothing. n records in one call give the bits of n calls.
        """
        records = [record for record in records if not record.skipped]
        if not records:
            return
        for shard in self.layout.shards:
            self._write_(shard, records)
        self.layout.refresh()

    def _write_(self, shard: Shard, records: Sequence[StepRecord]) -> None:
        group = self.groups.get(shard.name, 0)
        decays = [record.decays[group] if shard.decayed else 1.0 for record in records]
        with shard.storage() as local:
            noise.write_(
                local,
                shard.runs,
                shard.param_id,
                np.array([record.seeds for record in records], dtype=np.uint64),
                np.array([record.alphas_of(group) for record in records], dtype=np.float32),
                np.array(decays, dtype=np.float32),
                remainder=self.remainders.get(shard.name),
                rounding="stochastic"
                if self.rounding == "stochastic" and shard.local.dtype != torch.float32
                else "nearest",
                distribution=self.distribution,
            )
