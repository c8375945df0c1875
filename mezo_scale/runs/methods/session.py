"""A run of a baseline, from the model to the report."""

import gc
import time
from contextlib import ExitStack
from typing import Any

from mezo_scale import models
from mezo_scale.collectives import max_integer
from mezo_scale.distributed.world import World
from mezo_scale.errors import RecipeError
from mezo_scale.models import save
from mezo_scale.models.tuning import sizes
from mezo_scale.recipe import Recipe, differences, takes_steps
from mezo_scale.runs.card import add_card
from mezo_scale.runs.console import Screen
from mezo_scale.runs.directory import RunDirectory
from mezo_scale.runs.fitness import check_model
from mezo_scale.runs.inputs import differing, inputs_now, inputs_of
from mezo_scale.runs.memory import CHECKPOINT, EVALUATION, PhaseMemory
from mezo_scale.runs.methods import adamw, icl, linear_probe
from mezo_scale.runs.methods.setting import Fit, Outcome, Setting
from mezo_scale.runs.metrics import Metrics
from mezo_scale.runs.report import RESULTS, as_table, results_table, write_results
from mezo_scale.runs.splits import EncodedSplits
from mezo_scale.tasks import Kind
from mezo_scale.trajectory.lock import Lock

_PLANS = {"adamw": adamw.plan, "icl": icl.plan, "linear_probe": linear_probe.plan}


def plan(recipe: Recipe, world: World, run: RunDirectory, kind: Kind[Any, Any], splits: EncodedSplits) -> Fit:
    """Checks all that can be checked without the model, and writes nothing.

    Raises:
        RecipeError: the recipe asks for what its method has not, or the run directory holds something else.
    """
    if recipe.output.checkpoint == "best":
        raise RecipeError(
            f"output.checkpoint is best, but method.name is {recipe.method.name}, which keeps no log to rebuild a step "
            "from: take true, which saves the last step's weights"
        )
    if world.rank == 0:
        _check_directory(recipe, run)
    make = _PLANS.get(recipe.method.name)
    return make(recipe, world, kind, splits) if make else lambda setting: Outcome({})


def carry_out(
    recipe: Recipe, world: World, run: RunDirectory, kind: Kind[Any, Any], splits: EncodedSplits, fit: Fit
) -> None:
    """Evaluates the model as it is, carries out the method, writes the report. A finished run stays as it is; one that
    was stopped begins again. Every rank calls it.

    Raises:
        RecipeError: it was finished on other data or weights.
        TrajectoryError: another process carries it out.
    """
    screen, memory = Screen(world), PhaseMemory(world.device)
    with world.raise_on_all():
        finished = world.rank == 0 and is_finished(recipe, run)
        if finished and (others := differing(run.read_inputs(), inputs_now(recipe))):
            raise RecipeError(
                f"{run.path} has a result on other {others} than there are now: give another output.dir, or put back "
                "what it was made with"
            )
    if max_integer(int(finished)):
        screen.say(f"{run.path} has its result already: {run.report}")
        return
    loaded = models.load(recipe, world)
    check_model(loaded, kind, splits.test, recipe)
    with ExitStack() as until_done:
        with world.raise_on_all():
            if world.rank == 0:
                run.create()
                until_done.callback(Lock(run.metrics).release)
        if world.rank == 0:
            if run.metrics.exists():
                screen.say(
                    f"{run.path} was stopped, and {recipe.method.name} keeps nothing to go on from: it begins again"
                )
            for path in (run.evaluation, run.report):  # of the run that was there before
                path.unlink(missing_ok=True)
            run.describe(recipe, world, inputs_of(recipe, kind, splits.examples, loaded.processor))
        metrics = Metrics(run, world, -1, recipe, None)
        setting = Setting(recipe, world, kind, splits, loaded, screen, memory, metrics)
        try:
            results = _zero_shot(setting)
            outcome = fit(setting)
        finally:
            metrics.close()
        results |= {RESULTS[recipe.method.name]: outcome.result} if outcome.result else {}
        results |= outcome.beside
        _finish(setting, run, results, outcome.about)


def is_finished(recipe: Recipe, run: RunDirectory) -> bool:
    """Whether a directory has the result of this recipe, whatever its method."""
    result = run.read_evaluation().get(RESULTS[recipe.method.name])
    if not isinstance(result, dict) or not run.report.is_file():
        return False
    return not takes_steps(recipe.method.name) or run.has_ended(recipe.train)


def _zero_shot(setting: Setting) -> dict[str, Any]:
    start, splits = time.perf_counter(), setting.splits
    score = setting.evaluate(splits.test, "zero-shot")
    if setting.recipe.method.name == "zero_shot":
        values = {f"test_{name}": metric.value for name, metric in score.metrics.items()}
        seconds, memory_gib = time.perf_counter() - start, setting.memory.most_gib(EVALUATION)
        setting.metrics.log(1, **values, seconds=seconds, memory_gib=memory_gib)
    setting.screen.say(f"zero-shot {score.main} on test: {score}")
    baselines = setting.kind.baselines(splits.train, splits.test)
    return {"zero_shot": score.as_dict(), **{name: found.as_dict() for name, found in baselines.items()}}


def _finish(setting: Setting, run: RunDirectory, results: dict[str, Any], about: list[str]) -> None:
    recipe, loaded, memory = setting.recipe, setting.loaded, setting.memory
    if takes_steps(recipe.method.name):
        tuned, frozen = sizes(loaded.model)
        about = [*about, f"Tuned ({recipe.tune.what}): {tuned:,} parameters; frozen: {frozen:,}."]
        if recipe.output.checkpoint:
            gc.collect()
            with memory.phase(CHECKPOINT):
                save.write(
                    loaded.model,
                    loaded.processor,
                    run.checkpoint,
                    seal=lambda folder: add_card(folder, recipe, run, results, " ".join(about)),
                )
    used = memory.all_gib()
    if setting.world.rank == 0:
        title = f"{recipe.task.name} with {recipe.model.name}"
        method = f"{recipe.method.name.replace('_', ' ')}; {loaded.strategy.layout}."
        write_results(run, title, " ".join([method, *about]), run.add_evaluation(**results), used)
    setting.screen.show(as_table(results_table(results), title=f"{recipe.task.name}: {recipe.model.name}"))
    setting.screen.say(f"report: {run.report}")


def _check_directory(recipe: Recipe, run: RunDirectory) -> None:
    """Raises RecipeError if the directory holds anything but this run, or nothing."""
    if run.path.exists() and not run.path.is_dir():
        raise RecipeError(f"output.dir: {run.path} is a file, expected a folder or nothing")
    if run.recipe.is_file() and (run.evaluation.exists() or run.metrics.exists() or run.trajectory.exists()):
        if changed := differences(run.recorded(), recipe):
            raise RecipeError(
                f"{run.path} holds a run with {'; '.join(changed)}: give another output.dir, or the same values"
            )
        return
    run.check_unclaimed()
