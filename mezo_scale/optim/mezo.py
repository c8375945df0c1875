"""`MeZO`, a torch optimizer whose step takes two forward passes per direction and no backward pass."""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import nn

from mezo_scale import collectives, noise
from mezo_scale.errors import RankError, ShardingError
from mezo_scale.optim.batch import Batch
from mezo_scale.optim.losses import Estimator, Objective, Sums
from mezo_scale.optim.replay import Progress, apply_all_, describe
from mezo_scale.optim.replay import load as load_trajectory
from mezo_scale.optim.update import Writer
from mezo_scale.perturbation import View
from mezo_scale.trajectory import StepRecord, Trajectory


class MeZO(torch.optim.Optimizer):
    """Memory-efficient zeroth-order SGD (Malladi et al., 2023, arXiv 2305.17333), on a model sharded in any known way.

    Args:
        model: plain, or sharded by the user; recognised, never wrapped or copied. Its parameters with ``requires_grad``
            are tuned.
        lr, weight_decay: per parameter group, free for learning-rate schedulers. Decay is decoupled, and skips biases
            and the weights of normalisation modules.
        eps: scale of the perturbation.
        num_directions: directions averaged per step (n-SPSA); each costs two forwards of the batch.
        seed: of the run; direction k of step t has a seed that follows from (seed, t, k).
        trajectory: path of the run's log. If the file exists and fits the model, its steps are applied first and the
            run goes on after them (the model must hold the base weights). Written by rank 0; None keeps no log.
        params: torch's parameter groups (dicts with "params" and their own "lr" or "weight_decay"); None: all in one
            group.
        rounding: how 16-bit shards store an update: "nearest", "stochastic", or "master" (a float32 master for bfloat16
            shards, 2 bytes more per element).
        distribution: "normal", or "rademacher" for z of +1 and -1.
        dtype: dtype of perturbed matrices (see `mezo_scale.perturbed`); None: the weights' own.
        paired: whether all branches of a batch run in one forward; None: checked at the first step.
        progress: called with (steps done, steps in all) while an existing trajectory is applied.

    Raises:
        ValueError: lr, eps, weight_decay or num_directions out of range.
        ModelError, ShardingError: as for `mezo_scale.shards`.
        TrajectoryError: an existing trajectory that is damaged or belongs to another run.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-6,
        eps: float = 1e-3,
        weight_decay: float = 0.0,
        num_directions: int = 1,
        seed: int = 0,
        trajectory: str | os.PathLike[str] | None = None,
        *,
        params: Iterable[dict[str, Any]] | None = None,
        rounding: str = "nearest",
        distribution: str = "normal",
        dtype: torch.dtype | None = None,
        paired: bool | None = None,
        progress: Progress | None = None,
    ) -> None:
        _check_positive("lr", lr)
        _check_positive("eps", eps)
        if not (math.isfinite(weight_decay) and weight_decay >= 0):
            raise ValueError(f"weight_decay is {weight_decay}: expected a finite number, 0 or above")
        if num_directions < 1:
            raise ValueError(f"num_directions is {num_directions}: expected at least 1")
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed is {seed}: expected 0 to 2**64 - 1")
        view = View(model, dtype=dtype, distribution=distribution)
        groups = params if params is not None else [{"params": [p for p in model.parameters() if p.requires_grad]}]
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})
        self.model = model
        self.eps = eps
        self.num_directions = num_directions
        self.seed = seed
        self.step_count = 0
        self.last_record: StepRecord | None = None
        self._estimator = Estimator(model, view, paired=paired)
        self._writer = Writer(view.layout, self._group_numbers(view), rounding=rounding, distribution=distribution)
        self._trajectory = None if trajectory is None else self._open(trajectory, progress)

    @property
    def paired(self) -> bool | None:
        """Whether batches run all branches in one forward; None before the first step has found out."""
        return self._estimator.paired

    def step(  # type: ignore[override]
        self,
        closure: Callable[[], Any] | None = None,
        *,
        batch: Batch | None = None,
        objective: Objective | None = None,
        micro_batch: int | None = None,
    ) -> float:
        """One step; every rank calls it. Give a closure, or a batch with its objective.

        Args:
            closure: returns a scalar or per-row losses; called once per branch, two per direction. Anything may happen
                inside.
            batch: this rank's rows: a mapping whose tensors have them along dim 0. Ranks may have different numbers of
                rows.
            objective: ``fn(model, batch)`` -> losses of the rows it is given, [rows]; all branches run in one forward.
            micro_batch: rows per forward and branch; None: all of them. Bounds activation memory, and costs one gather
                each.

        Returns:
            The mean loss over rows, ranks and branches.

        - A loss that is not finite on any rank skips the step on all: recorded, nothing written, the next step goes on.
        - The record is on disk before a weight changes; a process killed in between resumes with that step applied
          once.
        - A rank whose last record differs stops the run on all ranks with a `RankError` that names it.
        - A rank that dies leaves the others waiting in the next collective until the process group's timeout.
        """
        training = [module for module in self.model.modules() if module.training]
        for module in training:
            module.training = False  # dropout would make the two signs differ by chance
        try:
            seeds = tuple(noise.direction_seed(self.seed, self.step_count, k) for k in range(self.num_directions))
            branches = [(seed, scale) for seed in seeds for scale in (self.eps, -self.eps)]
            if closure is not None and batch is None and objective is None:
                with torch.no_grad():
                    sums = self._estimator.of_closure(closure, branches)
            elif closure is None and batch is not None and objective is not None:
                sums = self._estimator.of_batch(batch, objective, branches, micro_batch)
            else:
                raise ValueError("step takes either a closure, or both batch and objective")
        finally:
            for module in training:
                module.training = True
        record = self._record(seeds, self._mean_losses(sums))
        if self._trajectory is not None:
            self._trajectory.append(record)
        self._writer.apply_([record])
        self.last_record = record
        self.step_count += 1
        return record.loss

    def state_dict(self) -> dict[str, Any]:
        """torch's, and where the run stands. The weights are the model's; a trajectory holds both."""
        return {**super().state_dict(), "mezo": {"step_count": self.step_count, "seed": self.seed, "eps": self.eps}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        mezo = state_dict["mezo"]
        self.step_count, self.seed, self.eps = int(mezo["step_count"]), int(mezo["seed"]), float(mezo["eps"])

    def _mean_losses(self, sums: Sums) -> list[float]:
        """Mean loss per branch over all ranks' rows: the step's one all-reduce."""
        digest = _digest(self.last_record)
        *total, count, digests, squares = collectives.sum_scalars([*sums.sums, sums.count, digest, digest**2])
        if squares * collectives.world_size() != digests**2:  # equality in Cauchy-Schwarz: all digests are the same
            self._name_odd_ranks(digest)
        return [value / count for value in total]

    def _name_odd_ranks(self, digest: int) -> None:
        everyone = collectives.gather_integers(digest)
        usual = max(set(everyone), key=everyone.count)
        odd = ", ".join(str(rank) for rank, other in enumerate(everyone) if other != usual)
        raise RankError(
            f"rank {odd} recorded another step {self.step_count - 1} than the other ranks: give all ranks the same "
            "seed, eps, learning rate and schedule"
        )

    def _record(self, seeds: tuple[int, ...], losses: list[float]) -> StepRecord:
        grads = tuple((plus - minus) / (2 * self.eps) for plus, minus in zip(losses[::2], losses[1::2], strict=True))
        loss = sum(losses) / len(losses)
        finite = all(math.isfinite(value) for value in (loss, *grads))
        alphas, decays = [], []
        for group in self.param_groups:
            lr = float(group["lr"])
            alphas += [float(np.float32(-lr * grad / len(grads))) if finite else 0.0 for grad in grads]
            decays.append(float(np.float32(1.0 - lr * group["weight_decay"])) if finite else 1.0)
        return StepRecord(self.step_count, seeds, grads, tuple(alphas), tuple(decays), loss)

    def _group_numbers(self, view: View) -> dict[str, int]:
        """Parameter group of each parameter's canonical name."""
        if len(self.param_groups) == 1:
            return {}
        names = {id(site.module._parameters.get(site.attr)): site.name for site in view.layout.sites}
        numbers = {}
        for number, group in enumerate(self.param_groups):
            for param in group["params"]:
                if id(param) not in names:
                    raise ShardingError(
                        "a parameter group holds a parameter that is not one of the model's own trainable ones "
                        "(FSDP1 flattens them unless use_orig_params=True): build the groups from the sharded "
                        "model's parameters"
                    )
                numbers[names[id(param)]] = number
        missing = [shard.name for shard in view.layout.shards if shard.name not in numbers]
        if missing:
            raise ShardingError(f"{missing[0]} is trainable but in no parameter group: add it, or freeze it")
        return numbers

    def _open(self, path: str | os.PathLike[str], progress: Progress | None) -> Trajectory:
        """Start a log, or take up the one that is there."""
        header = describe(self._writer, self.num_directions, len(self.param_groups), self.seed, self.eps)
        exists = collectives.max_integer(int(collectives.rank() == 0 and os.path.exists(path)))
        if not exists:
            return Trajectory.create(path, header) if collectives.rank() == 0 else Trajectory(header, [])
        trajectory = load_trajectory(path)
        trajectory.header.check_same(header, str(path))
        if trajectory.header.seed != self.seed:
            self.seed = trajectory.header.seed  # a run goes on with the seed it began with
        apply_all_(self._writer, trajectory, len(trajectory), progress)
        self.step_count = len(trajectory)
        self.last_record = trajectory.records[-1] if trajectory.records else None
        return Trajectory.open(path, append=True) if collectives.rank() == 0 else trajectory


def _check_positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} is {value}: expected a finite number above 0")


def _digest(record: StepRecord | None) -> int:
    """16 bits of a record, so that its square is exact in the float64 all-reduce."""
    return zlib.crc32(repr(record).encode()) & 0xFFFF
