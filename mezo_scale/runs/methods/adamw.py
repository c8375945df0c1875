"""Fine-tuning by backpropagation with AdamW: the same rows in the same order, and the same loss per row, as MeZO.

It keeps no checkpoint on the way: a run that was stopped begins again.
"""

import math
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from mezo_scale import collectives
from mezo_scale.distributed.world import World
from mezo_scale.errors import ModelError, NotFiniteError, RecipeError
from mezo_scale.recipe import Recipe
from mezo_scale.runs.console import StepProgress
from mezo_scale.runs.evaluate import evaluate
from mezo_scale.runs.learning import order_of, rate_of
from mezo_scale.runs.memory import EVALUATION, INFERENCE, STEPS
from mezo_scale.runs.methods.setting import Fit, Outcome, Setting
from mezo_scale.runs.on_dev import OnDev
from mezo_scale.runs.splits import EncodedSplits
from mezo_scale.sharding.shard import is_decayed
from mezo_scale.tasks import Kind, Score, objective_of
from mezo_scale.tasks.encoding import Batch, to_device
from mezo_scale.tasks.kinds.kind import Within
from mezo_scale.tasks.order import Order, share


def plan(recipe: Recipe, world: World, kind: Kind[Any, Any], splits: EncodedSplits) -> Fit:
    """Raises RecipeError for layouts, types, objectives and schedules that it has not."""
    sharding, name = recipe.sharding, objective_of(recipe, kind)
    if sharding.strategy not in ("single", "fsdp2") or (sharding.strategy == "single" and world.size > 1):
        raise RecipeError(
            f"method.name is adamw, but sharding.strategy is {sharding.strategy} on {world.size} process(es): take "
            "single on one, or fsdp2"
        )
    if sharding.cpu_offload:
        raise RecipeError("method.name is adamw, which does not offload: leave sharding.cpu_offload out")
    if recipe.model.dtype == "float16":
        raise RecipeError(
            "method.name is adamw, but model.dtype is float16, whose gradients underflow: take float32 or bfloat16"
        )
    if hasattr(kind.objectives[name], "smooth"):
        raise RecipeError(
            f"method.name is adamw, but train.objective is {name}, which jumps and has no gradient: take "
            f"{next(iter(kind.objectives))}"
        )
    rate_of(recipe)
    return partial(_fit, order=order_of(recipe, kind, splits.train))


def optimizer_of(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """torch's AdamW on what is tuned; as under MeZO, biases and the weights of normalisation are not decayed.

    Raises:
        ModelError: nothing is tuned.
    """
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    seen: set[nn.Parameter] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and parameter not in seen:
                groups[is_decayed(module, name)].append(parameter)
                seen.add(parameter)
    if not seen:
        raise ModelError("the model has no parameter that is tuned: check tune.what")
    return torch.optim.AdamW(
        [
            {"params": groups[True], "weight_decay": weight_decay},
            {"params": groups[False], "weight_decay": 0.0},
        ],
        lr=lr,
        foreach=False,  # sharded and whole parameters may stand side by side
    )


class Gradients:
    """The gradient of the mean loss over a step's rows."""

    def __init__(self, setting: Setting) -> None:
        self._setting, self._section = setting, setting.recipe.train
        name = objective_of(setting.recipe, setting.kind)
        self._objective = Within(setting.loaded.compute, setting.kind.objectives[name])

    def add_(self, rows: Sequence[int]) -> float:
        """Adds it to the parameters' `grad`, and returns the mean loss; every rank calls it.

        Ranks call the model equally often: one without rows left runs one again, which counts nothing.
        """
        total, model = 0.0, self._setting.loaded.model
        axes = self._setting.loaded.strategy.axes
        for batch, counts in self._batches(rows):
            losses = self._objective(model, batch)
            # FSDP2 takes the mean over ranks.
            weight = axes.rows_size / len(rows) if counts else 0.0
            (losses.sum() * weight).backward()
            total += float(losses.detach().double().sum()) if counts else 0.0
        if collectives.is_distributed():
            for parameter in model.parameters():  # an adapter is whole on every rank
                if parameter.grad is not None and not isinstance(parameter, DTensor):
                    dist.all_reduce(parameter.grad)
                    parameter.grad /= axes.rows_size
        return collectives.sum_scalars([total])[0] / len(rows)

    def infer(self, rows: Sequence[int]) -> None:
        """One forward pass of this rank's first rows, for its memory."""
        with torch.no_grad():
            self._objective(self._setting.loaded.model, next(self._batches(rows))[0])

    def _batches(self, rows: Sequence[int]) -> Iterator[tuple[Batch, bool]]:
        """This rank's rows, a micro-batch at a time, and whether they count."""
        setting, axes = self._setting, self._setting.loaded.strategy.axes
        mine = share(rows, axes.rows_rank(collectives.rank()), axes.rows_size)  # type: ignore[arg-type]
        most = math.ceil(len(rows) / axes.rows_size)
        size = self._section.micro_batch or most
        for start in range(0, most, size):
            part = mine[start : start + size]
            chosen = [setting.splits.train[row] for row in (part if len(part) else mine[:1])]
            batch = setting.kind.collate(chosen, self._section.objective)
            yield to_device(batch, setting.loaded.device), bool(len(part))


def _fit(setting: Setting, order: Order) -> Outcome:
    recipe, screen = setting.recipe, setting.screen
    options, steps, warmup = recipe.optimizer, recipe.train.steps, recipe.method.warmup
    optimizer = optimizer_of(setting.loaded.model, options.lr, options.weight_decay)
    rate = rate_of(recipe)
    gradients = Gradients(setting)
    with setting.memory.phase(INFERENCE):
        gradients.infer(order.step(0))  # type: ignore[arg-type]
    on_dev, done = OnDev(setting.kind, recipe.train.patience), 0
    with screen.steps(0, steps, recipe.train.log_every) as progress, setting.memory.phase(STEPS):
        for step in range(steps):
            lr, start = rate(step), time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = lr
            loss = gradients.add_(order.step(step))  # type: ignore[arg-type]
            if not math.isfinite(loss):
                raise NotFiniteError(
                    f"the loss of step {step + 1} is {loss}, so there is nothing to learn from: take a smaller "
                    "optimizer.lr"
                )
            optimizer.step()
            optimizer.zero_grad()
            seconds = time.perf_counter() - start
            setting.metrics.log(step + 1, loss=loss, lr=lr, seconds=seconds)
            progress.advance(done := step + 1, loss, 0)
            if recipe.train.eval_every and done % recipe.train.eval_every == 0:
                on_dev.add(done, _evaluate_dev(setting, done, progress))
            if on_dev.says_stop:
                break
        memory_gib = setting.memory.most_gib(STEPS)
    setting.metrics.log(done, memory_gib=memory_gib)
    tuned = setting.evaluate(setting.splits.test, "tuned")
    about = f"AdamW, {done} steps of {recipe.train.batch_size} examples, lr {options.lr:g}, {options.schedule}"
    about += f", {warmup} steps of warmup" if warmup else ""
    return Outcome({**tuned.as_dict(), "step": done}, [f"{about}, seed {options.seed}."], on_dev.told(done, steps))


def _evaluate_dev(setting: Setting, step: int, progress: StepProgress) -> Score:
    memory_gib = setting.memory.most_gib(STEPS)
    with setting.memory.phase(EVALUATION):
        dev = evaluate(setting.loaded, setting.kind, setting.splits.dev, setting.recipe.train.eval_batch)
    values = {f"dev_{name}": metric.value for name, metric in dev.metrics.items()}
    setting.metrics.log(step, **values, dev_not_finite=dev.not_finite, memory_gib=memory_gib)
    progress.note(f"step {step}: {dev.main} on dev {dev}")
    return dev
