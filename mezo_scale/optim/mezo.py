"""`MeZO`, a torch optimizer whose step takes two forward passes per direction and no backward pass."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from mezo_scale.errors import MezoError, ModelError
from mezo_scale.noise import Noise
from mezo_scale.optim import estimators, exchange, groups, rules, saved
from mezo_scale.optim.batch import Batch
from mezo_scale.optim.heartbeat import Heartbeat
from mezo_scale.optim.losses import Evaluator, Objective, Work
from mezo_scale.optim.measurement import Measurement, check_rows
from mezo_scale.optim.opening import take_up_
from mezo_scale.optim.reads import Reads
from mezo_scale.optim.replay import Progress, Start, describe, manifest
from mezo_scale.optim.rules import Measured
from mezo_scale.optim.signal import Signal
from mezo_scale.optim.update import Writer
from mezo_scale.perturbation import View
from mezo_scale.sharding import Shard, discover
from mezo_scale.sharding.discovery import check_not_hidden
from mezo_scale.sharding.frozen import frozen_parameters
from mezo_scale.sharding.replicas import compare
from mezo_scale.trajectory import StepRecord, Trajectory

PATIENCE_S = 30.0  # that a rank which failed waits for the others, who may be waiting for its part of the weights


class MeZO(torch.optim.Optimizer):
    """Memory-efficient zeroth-order SGD (Malladi et al., 2023, arXiv 2305.17333), on a model sharded in any known way.

    Args:
        model: plain, or sharded by the user; recognised, never wrapped or copied. Its parameters with ``requires_grad``
            are tuned.
        lr, weight_decay: per parameter group, free for learning-rate schedulers. Decay is decoupled, and skips biases
            and the weights of normalisation modules.
        eps: scale of the perturbation.
        num_directions: directions averaged per step (n-SPSA), two forwards of the batch each; `estimator` has its own.
        seed: of the run; direction k of step t has a seed that follows from (seed, t, k).
        trajectory: path of the run's log. If the file exists and fits the model, its frozen weights, seed and eps, its
            steps are applied first and the run goes on after them (the model must hold the base weights). Written by
            rank 0, which locks it until ``opt.trajectory.close()`` or the process ends; None keeps no log.
        params: torch's parameter groups (dicts with "params" and their own "lr" or "weight_decay"); None: all in one
            group.
        rounding: how 16-bit shards store an update: "nearest", "stochastic", or "master" (a float32 master for bfloat16
            shards, 2 bytes more per element).
        distribution: "normal", "rademacher" (z of +1 and -1) or "low_rank", or a `mezo_scale.noise.Noise`.
        dtype: dtype of perturbed matrices (see `mezo_scale.perturbed`); None: the weights' own.
        paired: whether all branches of a batch run in one forward; None: checked at the first step.
        fingerprints: of what else the run depends on, name -> digest; an existing trajectory's must be the same.
        estimator: where a step evaluates the loss, and what losses say (`mezo_scale.estimators`); None: `Spsa`.
        rule: how updates follow from what was measured (see `mezo_scale.rules`); None: `Sgd`.
        progress: called with (steps done, steps in all) while an existing trajectory is applied.
        hang_timeout: seconds that a step may wait for a rank that has not entered it or no longer answers, or ten times
            the slowest step before it if that is more; then the processes end, and say which rank it is. None: they
            wait as long as the process group does.
        start: where in an existing trajectory the model's weights stand; None: they are the base weights.

    Raises:
        ValueError: a number or a word that is none of these; num_directions besides an estimator with another number.
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
        distribution: str | Noise = "normal",
        dtype: torch.dtype | None = None,
        paired: bool | None = None,
        fingerprints: Mapping[str, str] | None = None,
        estimator: estimators.Estimator | None = None,
        rule: rules.Rule | None = None,
        progress: Progress | None = None,
        hang_timeout: float | None = 600.0,
        start: Start | None = None,
    ) -> None:
        saved.check_options(lr, eps, weight_decay, seed)
        self._estimator = estimators.chosen(estimator, num_directions)
        self._rule = rules.Sgd() if rule is None else rule
        check_rows(self._estimator, model, logged=trajectory is not None)
        view = View(model, dtype=dtype, noise=Noise.of(distribution))
        params = [{"params": groups.listed(view.layout)}] if params is None else params
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.model, self.eps, self.seed, self.step_count = model, eps, seed, 0
        self.last_record: StepRecord | None = None
        self.last_signal: Signal | None = None
        self._dtype, self._paired = dtype, paired
        self._under_way: Measurement | None = None
        self._past: list[Measured] = []
        self._heartbeat = Heartbeat(hang_timeout)
        self._evaluator = Evaluator(model, view, paired=paired)
        groups.check_owned(groups.members(self.param_groups), view.layout)
        numbers = groups.numbers(self.param_groups, view.layout, {})
        self._writer = Writer(view.layout, numbers, rounding=rounding, noise=view.weights.noise)
        self._reads = Reads([shard.name for shard in view.layout.shards])
        self.trajectory: Trajectory | None = None
        if trajectory is not None:
            kind = (self.num_directions * self._rule.window, len(self.param_groups), seed, eps, fingerprints)
            header = describe(model, self._writer, *kind, self._estimator.name, rules.described(self._rule))
            self.trajectory = take_up_(trajectory, header, self._writer, progress, start)
            self.step_count = len(self.trajectory)
        if self.trajectory:
            self.last_record = self.trajectory[-1]
            self._reads.take_up(self.last_record.unread)
            self._past = rules.past(self.last_record, self._rule, self.num_directions)
        self._publish()

    @property
    def num_directions(self) -> int:
        """Directions per step; 0 where the first step's rows decide it and it was not taken yet."""
        return self._estimator.num_directions

    @property
    def paired(self) -> bool | None:
        """Whether batches run all branches in one forward; None before the first step has found out."""
        return self._evaluator.paired

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
        the others where the model is sharded. Arguments as for `step`. Returns the mean loss over these rows of this
        rank and all branches.

        Raises:
            ValueError: arguments that can't be evaluated. What was measured before is kept.
            MezoError: the model was changed in a way that can't be followed; see `step`.
        """
        with self._heartbeat.inside(self.step_count):
            try:
                return self._measure(Work(closure, batch, objective, micro_batch))
            except Exception as error:
                if self._evaluator.view.gathers and not self._evaluator.company.is_whole:
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
            micro_batch: rows per forward and branch, a gather each, to bound activation memory; None: all of them.

        Returns:
            The mean loss over rows, ranks and branches; 0.0 if nothing was measured.

        - A loss that is not finite on any rank skips the step on all: recorded, nothing written, the next step goes on.
        - The record is written before a weight changes, so a killed process resumes with that step applied once. It is
          on the disk soon after: ``opt.trajectory.sync()`` waits for that.
        - A rank whose last record differs stops the run on all ranks with a `RankError` that names it.
        - An exception on one rank is raised there; the others raise a `RankError` that names it, and the step is taken
          on none. Those who wait for this rank's part of a weight, in the middle of a sharded model's forward, can't be
          given an exception: after half a minute their processes end with a line that names it.
        - A step that waits longer than ``hang_timeout`` for a rank ends the processes that wait, likewise.
        - A model that was wrapped, cast or (un)frozen since the last step is looked at again. Under a trajectory its
          tuned weights must keep names, shapes, dtypes, groups and values, else a TrajectoryError says which does not;
          under rounding "master" their shards too, else a ShardingError.
        - ``accelerate``'s wrapper passes the closure on only when it synchronises gradients, and drops the calls in
          between: to accumulate, call `measure` on the optimizer itself.
        """
        work = Work(closure, batch, objective, micro_batch)
        if not work.is_nothing():
            with self._heartbeat.inside(self.step_count):
                self._measure_or_tell(work)
        if self._under_way is None or self._under_way.sums is None:
            if any(float(group["lr"]) for group in self.param_groups):  # torch.distributed.checkpoint sets them to 0
                warnings.warn("step() had nothing to apply: give a closure or a batch, or measure first", stacklevel=2)
            return 0.0
        under_way, self._under_way = self._under_way, None
        if not self._writer.layout.is_current():
            raise ModelError("the model was wrapped, cast or loaded between measuring and writing: measure again")
        record = self._record(under_way)
        self._reads.say()
        self._evaluator.company.finish()
        if self.trajectory is not None:
            self.trajectory.append(record)
        self._writer.apply_([record])
        self.last_record = record
        self._past = rules.past(record, self._rule, self.num_directions)
        self.step_count += 1
        return record.loss

    def check_ranks(self) -> None:
        """Raise a RankError that names a rank whose last record or copy of a weight is another; all ranks call it."""
        with self._heartbeat.inside(self.step_count):
            exchange.compare(self.step_count, self.last_record)
            compare(self._writer.stored(), frozen_parameters(self.model), self.step_count)

    def low_bits(self) -> list[Shard]:
        """Under rounding "master" what a checkpoint must hold besides the weights, as int16 shards; else none."""
        return self._writer.low_bits()

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
        super().add_param_group({**param_group, "params": groups.added(param_group["params"], layout)})
        try:
            self._follow()
        except MezoError:
            self.param_groups.pop()
            raise

    def state_dict(self) -> dict[str, Any]:
        """torch's, where the run stands, and under rounding "master" the masters' low bits, each parameter's
        "remainder" (int16). The weights are the model's; a trajectory holds all of it, on disk when this returns."""
        self._follow()
        self._publish()
        if self.trajectory is not None:
            self.trajectory.sync()
        return {**super().state_dict(), "mezo": self._run_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a saved state; the model holds the weights that were saved with it.

        Raises:
            ValueError: it is of another kind of run, or lacks something; then nothing has changed.
        """
        self._follow()
        found = saved.run_state(state_dict, self._run_state(), log_is_open=self.trajectory is not None)
        remainders = saved.remainders(state_dict, self.param_groups)
        self._writer.check_state(remainders)
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        self._writer.load_state_(remainders)
        self.step_count, self.seed, self.eps = int(found["step_count"]), int(found["seed"]), float(found["eps"])
        self._under_way, self._estimator = None, estimators.settled(self._estimator, int(found["num_directions"]))
        self._past = [Measured(tuple(seeds), tuple(grads)) for seeds, grads in found["past"]]
        self._reads.take_up(found["unread"])
        self._publish()

    def _run_state(self) -> dict[str, Any]:
        return {
            "step_count": self.step_count,
            "seed": self.seed,
            "eps": self.eps,
            "estimator": self._estimator.name,
            "num_directions": self.num_directions,
            "rule": rules.described(self._rule),
            "past": [[list(measured.seeds), list(measured.projected_grads)] for measured in self._past],
            "distribution": self._writer.noise.name,
            "rounding": self._writer.rounding,
            "unread": list(self._reads.unread),
        }

    def _publish(self) -> None:
        saved.publish_(self, self._run_state(), self._writer.state)

    def _follow(self) -> None:
        """Look at the model again if it is no longer the one that was looked at. Raises before anything changes."""
        saved.check_still(self.eps, self.seed, self.param_groups)
        if self._writer.layout.is_current():
            groups.check_unedited(self.param_groups, self._writer.layout, self._writer.groups)
            if self.trajectory is not None:
                self._writer.check_untouched()
            return
        under_way, self._under_way = self._under_way, None
        if under_way is not None and under_way.sums is not None:
            raise ModelError("the model was wrapped, cast or loaded after it was measured: measure again")
        check_rows(self._estimator, self.model, logged=self.trajectory is not None)
        old = self._writer
        view = View(self.model, dtype=self._dtype, noise=old.noise)
        check_not_hidden(old.layout, view.layout)
        numbers = groups.numbers(self.param_groups, view.layout, old.groups)
        writer = Writer(view.layout, numbers, rounding=old.rounding, noise=old.noise)
        if self.trajectory is not None:
            self.trajectory.header.check_manifest(manifest(writer), "the trajectory being written")
            writer.check_goes_on(old)
        if self.step_count:
            writer.take_over_(old)
        self._writer = writer
        self._evaluator = Evaluator(self.model, view, paired=self._paired)
        self._reads.names = [shard.name for shard in view.layout.shards]
        groups.fill_(self.param_groups, view.layout, numbers)
        self._publish()

    def _measure(self, work: Work) -> float:
        self._follow()
        self._under_way = self._under_way or self._begun()
        return self._under_way.add(self._evaluator, work)

    def _measure_or_tell(self, work: Work) -> None:
        """`measure`; if it fails here, the other ranks are told before the error is raised."""
        try:
            self._measure(work)
        except Exception as error:
            numbers = (self._under_way or self._begun()).numbers
            self._under_way = None
            patience_s = PATIENCE_S if self._evaluator.view.gathers else None
            with suppress(Exception):  # it is the first error that counts
                self._evaluator.keep_company()
            self._evaluator.company.finish()
            if not exchange.fail(self.step_count, self.last_record, numbers, patience_s=patience_s):
                self._heartbeat.give_up(self.step_count, error)
            raise

    def _begun(self) -> Measurement:
        """This step with nothing measured."""
        return Measurement(self._estimator, self.seed, self.step_count, self.eps)

    def _record(self, under_way: Measurement) -> StepRecord:
        """What the step does, the same on all ranks."""
        step, read = self.step_count, self._evaluator.view.read
        with self._heartbeat.inside(step):
            losses, grads, self.last_signal = under_way.finish(self.last_record, self._reads, read)
        self._estimator = estimators.settled(self._estimator, len(under_way.seeds))
        window = [Measured(under_way.seeds, tuple(grads)), *self._past]
        return rules.record(step, self._rule, window, self.param_groups, sum(losses) / len(losses), self._reads.unread)
