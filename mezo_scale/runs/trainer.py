"""One session of a run, from the model to the report: what goes on around the method, which is in the optimizer."""

import gc
import json
import time
from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch

from mezo_scale import models
from mezo_scale.collectives import broadcast_bytes
from mezo_scale.distributed import preflight
from mezo_scale.distributed.signals import Interrupted, watch
from mezo_scale.distributed.world import World
from mezo_scale.models import save
from mezo_scale.models.fingerprints import of_config, of_processor
from mezo_scale.models.tuning import sizes
from mezo_scale.noise import direction_seed
from mezo_scale.optim import eps
from mezo_scale.optim.mezo import MeZO
from mezo_scale.perturbation.weights import check_rank
from mezo_scale.recipe import Recipe
from mezo_scale.runs import snapshots
from mezo_scale.runs.beginning import keep_adapter, own_log, take_up_adapter_
from mezo_scale.runs.card import add_card
from mezo_scale.runs.console import Screen, StepProgress
from mezo_scale.runs.directory import RunDirectory
from mezo_scale.runs.evaluate import evaluate, replay_if_begun
from mezo_scale.runs.first_eps import eps_of
from mezo_scale.runs.fitness import check_model
from mezo_scale.runs.inputs import inputs_of
from mezo_scale.runs.learning import estimator_of, noise_of, order_of, rate_of
from mezo_scale.runs.memory import CHECKPOINT, EVALUATION, INFERENCE, STEPS, PhaseMemory
from mezo_scale.runs.metrics import Metrics, filling
from mezo_scale.runs.next_commands import commands, train_command
from mezo_scale.runs.on_dev import OnDev
from mezo_scale.runs.rehearsal import rehearse
from mezo_scale.runs.report import as_table, results_table, write_report
from mezo_scale.runs.skipping import Skips, count_skipped
from mezo_scale.runs.splits import EncodedSplits
from mezo_scale.sharding import shards
from mezo_scale.sharding.frozen import frozen_parameters
from mezo_scale.sharding.replicas import compare
from mezo_scale.tasks import Kind, Score, objective_of
from mezo_scale.tasks.encoding import Batch, to_device
from mezo_scale.tasks.kinds.kind import Within
from mezo_scale.tasks.order import Order, share

_WRITING = 2**31  # numbers from here on are no directions: the seeds of what the rows of a step sample


class Trainer:
    """One session of a run: from the base model to the end of the recipe's steps."""

    def __init__(
        self, recipe: Recipe, world: World, run: RunDirectory, kind: Kind[Any, Any], splits: EncodedSplits
    ) -> None:
        self.recipe, self.world, self.run, self.kind, self.splits = recipe, world, run, kind, splits
        self.screen = Screen(world)
        self.memory = PhaseMemory(world.device)
        if world.ranks:
            self.screen.show(preflight.table(world.ranks))
        self.loaded, self.start = snapshots.load(recipe, world, run, self.screen)
        model, begun = self.loaded.model, self.start.step if self.start else 0
        take_up_adapter_(model, run)
        held = shards(model)
        check_rank(noise_of(recipe), held)
        compare(held, frozen_parameters(model), begun)
        self.rate = rate_of(recipe)
        self.objective = Within(self.loaded.compute, kind.objectives[objective_of(recipe, kind)])
        check_model(self.loaded, kind, splits.test, recipe)
        stored = sum(shard.local.numel() for shard in held)
        self.screen.say(
            f"{recipe.model.name}: {stored:,} parameters on each of {world.size} rank(s), "
            f"{self.loaded.strategy.layout}, {world.device.type}"
        )
        tuned, frozen = sizes(self.loaded.model)
        self.tuned = f"Tuned ({recipe.tune.what}): {tuned:,} parameters; frozen: {frozen:,}"
        if frozen:
            self.screen.say(self.tuned)

    def rehearse(self, done: int) -> None:
        """All that goes before the first step; nothing is written. `done` steps are in the trajectory already."""
        if done:
            self.screen.say(f"{self.run.path} holds {done} steps of {self.recipe.train.steps} already")
        task = self.kind, self.splits, self.objective, self._micro_batch(done)
        rehearse(self.recipe, self.world, self.loaded, *task, self.screen, self.memory)

    def go(self, done: int) -> None:
        """Trains, evaluates, reports. `done` steps are in the trajectory already."""
        # What rank 0 finds decides: the others may not see its directory.
        results = json.loads(broadcast_bytes(json.dumps(self.run.read_evaluation()).encode()))
        if "zero_shot" not in results:
            zero_shot = self._evaluate(self.splits.test, "zero-shot")
            results["zero_shot"] = zero_shot.as_dict()
            for name, baseline in self.kind.baselines(self.splits.train, self.splits.test).items():
                results[name] = baseline.as_dict()
            self.screen.say(f"zero-shot {zero_shot.main} on test: {zero_shot}")
        self.dev = OnDev.of_run(self.kind, self.recipe.train.patience, self.run, done)
        if done:
            begun, where = (self.start.step, f"snapshot step-{self.start.step}, ") if self.start else (0, "")
            left = 0 if self.dev.says_stop else self.recipe.train.steps - done
            self.screen.say(f"continuing {self.run.path}: {where}{done - begun} steps are replayed, {left} are left")
        optimizer = self._optimizer()
        with own_log(optimizer, done):  # no other process writes this directory until the report is there
            self._tune(optimizer, results)
            last = optimizer.step_count
            del optimizer
            self._grade(results, last)
            self._finish(results)

    def _grade(self, results: dict[str, Any], last: int) -> None:
        """What the run came to after its last step, or after the one that the recipe keeps, added to the results."""
        best = self.dev.best
        if best is None and self.recipe.output.checkpoint == "best":
            self.screen.say(
                "output.checkpoint is best, but no step has a value on dev: the last one is graded and kept"
            )
        step = best[0] if best is not None and self.recipe.output.checkpoint == "best" else last
        if step != last:
            self._rebuild(step)
        if results.get("tuned", {}).get("step") != step:
            tuned = self._evaluate(self.splits.test, "tuned")
            skipped = count_skipped(self.run.trajectory, step) if self.world.rank == 0 else 0
            results["tuned"] = {**tuned.as_dict(), "step": step, "skipped": skipped}
        results |= self.dev.told(last, self.recipe.train.steps)

    def _rebuild(self, step: int) -> None:
        """Puts the weights after an earlier step in the place of the last ones, from the base model and the log."""
        del self.loaded
        self.start = None
        gc.collect()
        self.loaded, start = snapshots.load(self.recipe, self.world, self.run, self.screen, step)
        take_up_adapter_(self.loaded.model, self.run)
        replay_if_begun(self.loaded.model, self.run.trajectory, step, self.screen, start)

    def _finish(self, results: dict[str, Any]) -> None:
        """The checkpoint, the report, and what the screen shows of them."""
        if self.recipe.output.checkpoint:
            gc.collect()  # the optimizer's scratch and the last step's batch make room for what rank 0 gathers
            with self.memory.phase(CHECKPOINT):
                save.write(
                    self.loaded.model,
                    self.loaded.processor,
                    self.run.checkpoint,
                    seal=lambda folder: add_card(folder, self.recipe, self.run, results, self._about(results)),
                )
        memory = self.memory.all_gib()
        next_ = commands(self.recipe, self.run, self.world, results)
        if self.world.rank == 0:
            write_report(
                self.run,
                self.recipe,
                self.loaded.strategy.layout,
                self.tuned,
                self.eps,
                self.run.add_evaluation(**results),
                memory,
                next_,
            )
        self.screen.show(as_table(results_table(results), title=f"{self.recipe.task.name}: {self.recipe.model.name}"))
        if STEPS in memory:
            peak, alone = memory[STEPS], memory[INFERENCE]
            self.screen.say(f"peak memory per rank {peak:.2f} GiB; inference alone {alone:.2f} GiB (same batch)")
        self.screen.say(f"report and plot: {self.run.report} {self.run.plot}")
        for what, command in next_.items():
            self.screen.say(f"{what}: {command}")

    def _about(self, results: dict[str, Any]) -> str:
        train, options = self.recipe.train, self.recipe.optimizer
        return (
            f"{self.tuned}; in {results['tuned']['step']:,} steps of {train.batch_size} examples by MeZO, which takes "
            f"forward passes only (lr {options.lr:g}, eps {self.eps:g}, seed {options.seed})."
        )

    def _tune(self, optimizer: MeZO, results: dict[str, Any]) -> None:
        """The steps that are left. Those of a run that has ended in order are none."""
        done = optimizer.step_count
        if self.world.rank == 0:
            inputs = inputs_of(self.recipe, self.kind, self.splits.examples, self.loaded.processor)
            self.run.describe(self.recipe, self.world, inputs)
            snapshots.tidy(self.run)
            self.run.add_evaluation(**results)
        is_over = done == self.recipe.train.steps or self.dev.says_stop
        if not is_over or "tuned" not in results or results.get("ended", results["tuned"])["step"] != done:
            self._train(optimizer)

    def _optimizer(self) -> MeZO:
        options = self.recipe.optimizer
        if self.world.rank == 0:
            self.run.create()
        keep_adapter(self.loaded.model, self.loaded.processor, self.run)
        batch = partial(self._batch, 0)
        self.eps = eps_of(self.recipe, self.run, self.world, self.loaded, self.objective, batch, self.screen)
        with self.screen.counting("replaying", "steps") as progress:
            return MeZO(
                self.loaded.model,
                lr=options.lr,
                eps=self.eps,
                weight_decay=options.weight_decay,
                estimator=estimator_of(self.recipe),
                seed=options.seed,
                rounding=options.rounding,
                distribution=noise_of(self.recipe),
                trajectory=self.run.trajectory,
                dtype=self.loaded.scratch_dtype,
                fingerprints=self._fingerprints(),
                progress=progress,
                hang_timeout=self.recipe.train.hang_timeout,
                start=self.start,
            )

    def _fingerprints(self) -> dict[str, str]:
        """Of what decides the losses besides the weights: a run does not go on with another."""
        return {
            "data": f"{self.splits.digest() % 2**64:016x}",
            "config": of_config(models.checkpoints.find(self.recipe.model.name)),
            **of_processor(self.loaded.processor),
            **({} if self.kind.reward is None else {"objective": self.kind.reward.digest}),
        }

    def _train(self, optimizer: MeZO) -> None:
        """The steps that are left, up to the last one or to the end of the run's patience."""
        recipe, total = self.recipe, self.recipe.train.steps
        log = optimizer.trajectory
        assert log is not None, "a run keeps a log"
        skips = Skips(recipe.train.max_skipped, count_skipped(self.run.trajectory) if self.world.rank == 0 else 0)
        metrics = Metrics(self.run, self.world, optimizer.step_count, recipe, log)
        try:
            with (
                self.screen.steps(optimizer.step_count, total, recipe.train.log_every) as progress,
                watch(self.world.store) as interruption,
                self.memory.phase(STEPS),
            ):
                self._infer(optimizer.step_count)
                self._check_eps(optimizer)
                if not self.dev.has(optimizer.step_count):  # a session was killed in the midst of it
                    self._look_at_dev(optimizer.step_count, metrics, progress)
                while optimizer.step_count < total and not self.dev.says_stop:
                    self._step(optimizer, metrics, progress, skips)
                    self._look_at_dev(optimizer.step_count, metrics, progress)
                    self._keep(optimizer, progress)
                    if number := interruption.after(optimizer.step_count):
                        log.sync()
                        self._stop(optimizer.step_count, number)
                optimizer.check_ranks()
                log.sync()  # what is written from here on speaks of all steps
        finally:
            metrics.close()

    def _stop(self, step: int, number: int) -> None:
        """Ends the session after a signal; the file in the run directory says that the run is not over."""
        interrupted = Interrupted(number)
        if self.world.rank == 0:
            self.run.mark_interrupted(step, interrupted.signal)
        command = train_command(self.run, self.world)
        self.screen.say(f"stopped by {interrupted.signal} after step {step}; to go on from there: {command}")
        raise interrupted

    def _infer(self, step: int) -> None:
        """One forward pass with the weights as they are, on a step's rows: what its memory is compared with."""
        batch = self._micro_batch(step)
        with self.memory.phase(INFERENCE), torch.no_grad():
            self.objective(self.loaded.model, batch)

    def _check_eps(self, optimizer: MeZO) -> None:
        """A line about eps, before the first step. Of an objective that jumps there is nothing to say."""
        recipe = self.recipe
        if recipe.optimizer.check_eps and optimizer.step_count == 0 and not hasattr(self.objective, "smooth"):
            batch = self._batch(0)
            self.screen.say(str(eps.check(optimizer, batch, self.objective, recipe.train.micro_batch)))

    def _step(self, optimizer: MeZO, metrics: Metrics, progress: StepProgress, skips: Skips) -> None:
        recipe, step = self.recipe, optimizer.step_count
        lr = self.rate(step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        start = time.perf_counter()
        batch = self._collated(step)
        moved = to_device(batch, self.loaded.device)
        loss = optimizer.step(batch=moved, objective=self.objective, micro_batch=recipe.train.micro_batch)
        seconds = time.perf_counter() - start
        record = optimizer.last_record
        assert record is not None, "a step was just taken"
        grads = list(record.projected_grads)
        values = {"projected_grads": grads, "lr": lr, "seconds": seconds, **filling(batch, seconds)}
        metrics.log_step(step + 1, optimizer.last_signal, loss=loss, **values, skipped=record.skipped)
        skips.count(record)
        progress.advance(step + 1, loss, skips.total)

    def _look_at_dev(self, done: int, metrics: Metrics, progress: StepProgress) -> None:
        """Evaluates the model on dev after so many steps, if it is time."""
        section = self.recipe.train
        if not section.eval_every or not done or done % section.eval_every:
            return
        memory_gib = self.memory.most_gib(STEPS)
        with self.memory.phase(EVALUATION):
            dev = evaluate(self.loaded, self.kind, self.splits.dev, section.eval_batch)
        self.dev.add(done, dev)
        values = {f"dev_{name}": metric.value for name, metric in dev.metrics.items()}
        metrics.log(done, **values, dev_not_finite=dev.not_finite, memory_gib=memory_gib)
        if section.patience is not None:
            metrics.sync()  # before the steps that follow are on the disk
        progress.note(f"step {done}: {dev.main} on dev {dev}")
        if self.dev.says_stop and done < section.steps:
            progress.note(f"step {done}: no better on dev for {self.dev.waited} evaluation(s): the run ends here")

    def _keep(self, optimizer: MeZO, progress: StepProgress) -> None:
        """After a step: compares the weights among the ranks and saves a snapshot of them, if it is time."""
        section, step = self.recipe.train, optimizer.step_count
        compares, saves = (every and step % every == 0 for every in (section.check_every, section.snapshot_every))
        saves = saves and snapshots.are_wanted(self.loaded.model)
        if compares or saves:
            optimizer.check_ranks()
        if saves:
            with self.memory.phase(CHECKPOINT):
                progress.note(snapshots.write(optimizer, self.loaded, self.run, section.keep_snapshots))

    @cached_property
    def order(self) -> Order:
        """Which examples make up which step."""
        return order_of(self.recipe, self.kind, self.splits.train)

    def _batch(self, step: int) -> Batch:
        """This rank's rows of a step, on its device."""
        return to_device(self._collated(step), self.loaded.device)

    def _collated(self, step: int) -> Batch:
        axes = self.loaded.strategy.axes
        rows = self.order.step(step)
        mine = share(np.arange(len(rows)), axes.rows_rank(self.world.rank), axes.rows_size)
        batch = self.kind.collate([self.splits.train[row] for row in rows[mine]], self.recipe.train.objective)
        if self.recipe.task.temperature:
            # By a row's place in the step: so it does not matter which rank has it.
            seed = self.recipe.optimizer.seed
            batch["seeds"] = [direction_seed(seed, step, _WRITING + int(place)) for place in mine]
        return batch

    def _micro_batch(self, step: int) -> Batch:
        """The first of this rank's rows of a step, as many as run at once."""
        rows = self.recipe.train.micro_batch
        return {name: leaf[:rows] for name, leaf in self._batch(step).items()}

    def _evaluate(self, rows: Sequence[Any], what: str) -> Score:
        with self.screen.counting(f"evaluating ({what})") as progress, self.memory.phase(EVALUATION):
            return evaluate(self.loaded, self.kind, rows, self.recipe.train.eval_batch, progress)
