"""`MeZO`, a torch optimizer whose step takes two forward passes per direction and no backward pass."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor, nn

from mezo_scale.errors import MezoError, ModelError, ShardingError
from mezo_scale.noise import Noise, direction_seed
from mezo_scale.optim import groups
from mezo_scale.optim.batch import Batch
from mezo_scale.optim.heartbeat import Heartbeat
from mezo_scale.optim.losses import Estimator, Objective, evaluating
from mezo_scale.optim.measured import Measured, fail
from mezo_scale.optim.reads import Reads
from mezo_scale.optim.replay import Progress, apply_all_, describe, manifest, take_up
from mezo_scale.optim.saved import check_positive, check_saved
from mezo_scale.optim.update import Writer
from mezo_scale.perturbation import Branch, View
from mezo_scale.sharding import discover
from mezo_scale.sharding.discovery import check_not_hidden
from mezo_scale.trajectory import StepRecord, Trajectory

PATIENCE_S = 30.0
"""How long a rank that failed waits for the others, who may be waiting for its part of the weights."""


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
        trajectory: path of the run's log. If the file exists and fits the model, its frozen weights, seed and eps, its
            steps are applied first and the run goes on after them (the model must hold the base weights). Written by
            rank 0, which locks it until ``opt.trajectory.close()`` or the process ends; None keeps no log.
        params: torch's parameter groups (dicts with "params" and their own "lr" or "weight_decay"); None: all in one
            group.
        rounding: how 16-bit shards store an update: "nearest", "stochastic", or "master" (a float32 master for bfloat16
            shards, 2 bytes more per element).
        distribution: "normal", or "rademacher" for z of +1 and -1.
        dtype: dtype of perturbed matrices (see `mezo_scale.perturbed`); None: the weights' own.
        paired: whether all branches of a batch run in one forward; None: checked at the first step.
        fingerprints: of what else the run depends on, name -> digest; an existing trajectory's must be the same.
        progress: called with (steps done, steps in all) while an existing trajectory is applied.
        hang_timeout: seconds that a step may wait for a rank that has not entered it or no longer answers, or ten times
            the slowest step before it if that is more; then the processes end, and say which rank it is. None: they
            wait as long as the process group does.

    Raises:
        ValueError: lr, eps, weight_decay or num_directions out of range.
        ModelError, ShardingError: as for `mezo_scale.shards`.
        TrajectoryError: an existing trajectory that is damaged, belongs to another run, or is being written.
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
        fingerprints: Mapping[str, str] | None = None,
        progress: Progress | None = None,
        hang_timeout: float | None = 600.0,
    ) -> None:
        check_positive("lr", lr)
        check_positive("eps", eps)
        if not (math.isfinite(weight_decay) and weight_decay >= 0):
            raise ValueError(f"weight_decay is {weight_decay}: expected a finite number, 0 or above")
        if num_directions < 1:
            raise ValueError(f"num_directions is {num_directions}: expected at least 1")
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed is {seed}: expected 0 to 2**64 - 1")
        noise = Noise(distribution)
        view = View(model, dtype=dtype, noise=noise)
        given = params if params is not None else [{"params": groups.listed(view.layout)}]
        super().__init__(given, {"lr": lr, "weight_decay": weight_decay})
        self.model = model
        self.eps = eps
        self.num_directions = num_directions
        self.seed = seed
        self.step_count = 0
        self.last_record: StepRecord | None = None
        self._dtype, self._paired = dtype, paired
        self._measured: Measured | None = None
        self._heartbeat = Heartbeat(hang_timeout)
        self._estimator = Estimator(model, view, paired=paired)
        for group in self.param_groups:
            groups.check_owned(group["params"], view.layout)
        numbers = groups.numbers(self.param_groups, view.layout, {})
        self._writer = Writer(view.layout, numbers, rounding=rounding, noise=noise)
        self._reads = Reads([shard.name for shard in view.layout.shards])
        self.trajectory = None if trajectory is None else self._open(trajectory, fingerprints, progress)
        if self.last_record is not None:
            self._reads.take_up(self.last_record.unread)
        self._publish()

    @property
    def paired(self) -> bool | None:
        """Whether batches run all branches in one forward; None before the first step has found out."""
        return self._estimator.paired

    def measure(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        batch: Batch | None = None,
        objective: Objective | None = None,
        micro_batch: int | None = None,
    ) -> float:
        """Evaluate this step's branches on some rows and keep the sums: several calls are one larger batch.

        ``step()`` without arguments then applies the step. Every rank measures at least once per step, and as often as
        the others where the model is sharded. Arguments as for `step`.

        Returns:
            The mean loss over these rows of this rank and all branches.

        Raises:
            ValueError: arguments that can't be evaluated. What was measured before is kept.
            MezoError: the model was changed in a way that can't be followed; see `step`.
        """
        with self._heartbeat.inside(self.step_count):
            try:
                return self._measure(closure, batch, objective, micro_batch)
            except Exception as error:
                if self._estimator.view.gathers and not self._estimator.company.is_whole:
                    self._heartbeat.give_up(self.step_count, error)
                raise

    def step(  # type: ignore[override]
        self,
        closure: Callable[[], Any] | None = None,
        *,
        batch: Batch | None = None,
        objective: Objective | None = None,
        micro_batch: int | None = None,
    ) -> float:
        """One step; every rank calls it. Give a closure, or a batch with its objective; or nothing, after `measure`.

        Args:
            closure: returns a scalar or per-row losses; called once per branch, two per direction. Anything may happen
                inside.
            batch: this rank's rows: a mapping of names to tensors and arrays with rows along dim 0, and to lists and
                tuples of one entry per row; it may be nested. Ranks may have different numbers of rows.
            objective: ``fn(model, batch)`` -> losses of the rows it is given, [rows]; all branches run in one forward.
            micro_batch: rows per forward and branch; None: all of them. Bounds activation memory, and costs one gather
                each.

        Returns:
            The mean loss over rows, ranks and branches; 0.0 if nothing was measured.

        - A loss that is not finite on any rank skips the step on all: recorded, nothing written, the next step goes on.
        - The record is on disk before a weight changes; a process killed in between resumes with that step applied
          once.
        - A rank whose last record differs stops the run on all ranks with a `RankError` that names it.
        - An exception on one rank is raised there; the others raise a `RankError` that names it, and the step is taken
          on none. Those who wait for this rank's part of a weight, in the middle of a sharded model's forward, can't be
          given an exception: after half a minute their processes end with a line that names it.
        - A step that waits longer than ``hang_timeout`` for a rank ends the processes that wait, likewise.
        - A model that was wrapped, cast, loaded by assignment or (un)frozen since the last step is looked at again.
          Under a trajectory its tuned weights must keep names, shapes, dtypes and groups, else a TrajectoryError says
          which does not; under rounding "master" their shards too, else a ShardingError.
        - Without arguments and with nothing measured, nothing happens: torch.distributed.checkpoint steps every
          optimizer that way.
        - ``accelerate``'s wrapper passes the closure on only when it synchronises gradients, and drops the calls in
          between: to accumulate, call `measure` on the optimizer itself.
        """
        if closure is not None or batch is not None or objective is not None:
            with self._heartbeat.inside(self.step_count):
                self._measure_or_tell(closure, batch, objective, micro_batch)
        if self._measured is None:
            if any(float(group["lr"]) for group in self.param_groups):  # torch.distributed.checkpoint sets them to 0
                warnings.warn(
                    "step() had nothing to apply: give it a closure or a batch, or measure first", stacklevel=2
                )
            return 0.0
        measured, self._measured = self._measured, None
        if not self._writer.layout.is_current():
            raise ModelError("the model was wrapped, cast or loaded between measuring and writing: measure again")
        read = self._estimator.view.read
        with self._heartbeat.inside(self.step_count):
            record = measured.record(self.step_count, self.param_groups, self.last_record, self._reads, read)
        self._reads.say()
        self._estimator.company.finish()
        if self.trajectory is not None:
            self.trajectory.append(record)
        self._writer.apply_([record])
        self.last_record = record
        self.step_count += 1
        return record.loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """torch's: tune parameters that were unfrozen or added to the model with a learning rate of their own.

        Raises:
            ValueError: they are not trainable parameters of the model, or are in a group already.
            TrajectoryError: a trajectory is kept, and its groups are fixed.
        """
        if not hasattr(self, "_writer"):  # torch's constructor adds the first ones
            super().add_param_group(param_group)
            return
        layout = self._writer.layout if self._writer.layout.is_current() else discover(self.model)
        params = param_group["params"]
        params = [params] if isinstance(params, Tensor) else list(params)
        try:
            groups.check_owned([param[1] if isinstance(param, tuple) else param for param in params], layout)
        except ShardingError as error:
            raise ValueError(str(error)) from None
        super().add_param_group({**param_group, "params": params})
        try:
            self._follow()
        except MezoError:
            self.param_groups.pop()
            raise

    def state_dict(self) -> dict[str, Any]:
        """torch's, where the run stands, and under rounding "master" the low bits of the masters, as each parameter's
        "remainder" (int16). The weights are the model's; a trajectory holds all of it."""
        self._follow()
        self._publish()
        return {**super().state_dict(), "mezo": self._run_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a saved state; the model holds the weights that were saved with it.

        Raises:
            ValueError: it is of another kind of run, or lacks something; then nothing has changed.
        """
        self._follow()
        saved_groups = state_dict["param_groups"]
        found = state_dict.get("mezo", saved_groups[0].get("mezo") if saved_groups else None) or {}
        check_saved(found, self._run_state(), log_is_open=self.trajectory is not None)
        names = groups.members(saved_groups)
        mine = dict(zip(names, groups.members(self.param_groups), strict=False))  # torch refuses another number
        remainders = {
            mine[name]: entry["remainder"]
            for name, entry in state_dict["state"].items()
            if name in mine and "remainder" in entry
        }
        self._writer.check_state(remainders)
        super().load_state_dict({"state": {}, "param_groups": saved_groups})
        self._writer.load_state_(remainders)
        self.step_count, self.seed, self.eps = int(found["step_count"]), int(found["seed"]), float(found["eps"])
        self._measured = None
        self._reads.take_up(found["unread"])
        self._publish()

    def _run_state(self) -> dict[str, Any]:
        return {
            "step_count": self.step_count,
            "seed": self.seed,
            "eps": self.eps,
            "num_directions": self.num_directions,
            "distribution": self._writer.noise.kind,
            "rounding": self._writer.rounding,
            "unread": list(self._reads.unread),
        }

    def _publish(self) -> None:
        """Put what a checkpoint must hold where torch looks: in the groups, the only part of a state that
        torch.distributed.checkpoint keeps besides the parameters' own."""
        for group in self.param_groups:
            group["mezo"] = self._run_state()
        self.state.clear()
        if self._writer.state:
            for param in groups.members(self.param_groups):
                self.state[param] = {"remainder": self._writer.state[param]} if param in self._writer.state else {}

    def _follow(self) -> None:
        """Look at the model again if it is no longer the one that was looked at. Raises before anything changes."""
        if self._writer.layout.is_current():
            return
        if self._measured is not None:
            self._measured = None
            raise ModelError("the model was wrapped, cast or loaded after it was measured: measure again")
        old = self._writer
        view = View(self.model, dtype=self._dtype, noise=old.noise)
        check_not_hidden(old.layout, view.layout)
        numbers = groups.numbers(self.param_groups, view.layout, old.groups)
        writer = Writer(view.layout, numbers, rounding=old.rounding, noise=old.noise)
        if self.trajectory is not None:
            self.trajectory.header.check_manifest(manifest(writer), "the trajectory being written")
        if self.step_count:
            writer.take_over_(old)
        self._writer = writer
        self._estimator = Estimator(self.model, view, paired=self._paired)
        self._reads.names = [shard.name for shard in view.layout.shards]
        groups.fill_(self.param_groups, view.layout, numbers)
        self._publish()

    def _measure(
        self,
        closure: Callable[[], Any] | None,
        batch: Batch | None,
        objective: Objective | None,
        micro_batch: int | None,
    ) -> float:
        if not (
            (closure is not None and batch is None and objective is None)
            or (closure is None and batch is not None and objective is not None)
        ):
            raise ValueError("step and measure take either a closure, or both batch and objective")
        self._follow()
        branches = self._branches() if self._measured is None else self._measured.branches
        with self._estimator.company.counted(), evaluating(self.model):
            if closure is not None:
                with torch.no_grad():
                    sums = self._estimator.of_closure(closure, branches)
            else:
                assert batch is not None
                assert objective is not None
                sums = self._estimator.of_batch(batch, objective, branches, micro_batch)
        self._measured = Measured(branches, sums) if self._measured is None else self._measured + sums
        return sum(sums.sums) / (len(branches) * sums.count)

    def _measure_or_tell(
        self,
        closure: Callable[[], Any] | None,
        batch: Batch | None,
        objective: Objective | None,
        micro_batch: int | None,
    ) -> None:
        """`measure`; if it fails here, the other ranks are told before the error is raised."""
        try:
            self._measure(closure, batch, objective, micro_batch)
        except Exception as error:
            self._measured = None
            patience_s = PATIENCE_S if self._estimator.view.gathers else None
            with suppress(Exception):  # it is the first error that counts
                self._estimator.keep_company(self._branches())
            self._estimator.company.finish()
            if not fail(self.step_count, self.last_record, 2 * self.num_directions, patience_s=patience_s):
                self._heartbeat.give_up(self.step_count, error)
            raise

    def _branches(self) -> list[Branch]:
        seeds = [direction_seed(self.seed, self.step_count, k) for k in range(self.num_directions)]
        return [(seed, scale) for seed in seeds for scale in (self.eps, -self.eps)]

    def _open(
        self, path: str | os.PathLike[str], fingerprints: Mapping[str, str] | None, progress: Progress | None
    ) -> Trajectory:
        """Start a log, or take up the one that is there."""
        kind = (self.num_directions, len(self.param_groups), self.seed, self.eps)
        trajectory = take_up(path, describe(self.model, self._writer, *kind, fingerprints))
        with ExitStack() as undo:
            undo.callback(trajectory.release)
            apply_all_(self._writer, trajectory, len(trajectory), progress)
            undo.pop_all()
        self.step_count = len(trajectory)
        self.last_record = trajectory[-1] if trajectory else None
        return trajectory
