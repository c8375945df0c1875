"""In-context learning: examples of the train split, with their answers, before each prompt."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial, reduce
from operator import add
from typing import Any

from mezo_scale import tasks
from mezo_scale.distributed.world import World
from mezo_scale.errors import RecipeError
from mezo_scale.recipe import Recipe
from mezo_scale.recipe.method import DEMONSTRATIONS
from mezo_scale.runs.memory import EVALUATION
from mezo_scale.runs.methods.setting import Fit, Outcome, Setting
from mezo_scale.runs.splits import EncodedSplits
from mezo_scale.tasks import Example, Kind, Question, Score
from mezo_scale.tasks.example import Cloze
from mezo_scale.tasks.order import permutation
from mezo_scale.tasks.score import ByClass, interval_key, wilson

SEPARATOR = "\n\n"  # between demonstrations, as the paper has it for all of its tasks
_DRAWS = 2**61  # where the streams of permutations begin that demonstrations are drawn by


def plan(recipe: Recipe, world: World, kind: Kind[Any, Any], splits: EncodedSplits) -> Fit:
    """Poses the test split after the demonstrations of every draw.

    Raises:
        RecipeError: too few examples, examples that can't be one text, or no demonstration fits before any prompt.
    """
    found = tasks.load(recipe.task)
    both = found.train[0], found.test[0]
    if not all(isinstance(example, Example | Question) and not isinstance(example, Cloze) for example in both):
        raise RecipeError(
            f"method.name is icl, but the examples of task.name={recipe.task.name} are no prompts that can follow one "
            "another: take another method or task"
        )
    asked, there = recipe.method.demonstrations, len(found.train)
    if asked is not None and asked > there:
        raise RecipeError(f"method.demonstrations is {asked}, but the train split has {there}: ask for at most {there}")
    count = min(asked or DEMONSTRATIONS, there)
    drawn = []
    for draw in range(recipe.method.draws):
        chosen = permutation(recipe.optimizer.seed, _DRAWS + draw, there)[:count]
        drawn.append([_posed(kind, example, [found.train[n] for n in chosen]) for example in found.test])
    kept = [number for rows in drawn for _, number in rows]
    if not any(kept):
        raise RecipeError(
            f"task.max_length is {recipe.task.max_length}, which leaves no room for one demonstration before any "
            "prompt: ask for more, or take method.name=zero_shot"
        )
    return partial(_fit, drawn=[[row for row, _ in rows] for rows in drawn], count=count, kept=kept)


def demonstrated(example: Any, demonstrations: Sequence[Any]) -> Any:
    """The example with others, each with its first right answer, before its prompt, and its neutral prompt."""
    texts = [demonstration.prompt + _answer(demonstration) for demonstration in demonstrations]
    changed = replace(example, prompt=SEPARATOR.join([*texts, example.prompt]))
    if getattr(example, "neutral", None) is None:
        return changed
    return replace(changed, neutral=SEPARATOR.join([*texts, example.neutral]))


def _answer(example: Example | Question) -> str:
    return example.answers[0] if isinstance(example, Question) else example.candidates[example.label]


def _posed(kind: Any, example: Any, demonstrations: Sequence[Any]) -> tuple[Any, int]:
    """The example's row after as many of the demonstrations as fit, the last ones, and how many those are."""

    def row(count: int) -> Any:
        """The row with so many of them; None if it does not fit."""
        posed = kind.encode(demonstrated(example, demonstrations[len(demonstrations) - count :]))
        return None if kind.is_cut(posed) else posed

    fits, least, most = row(len(demonstrations)), 0, len(demonstrations)
    if fits is not None:
        return fits, most
    while most - least > 1:
        middle = (least + most) // 2
        attempt = row(middle)
        if attempt is None:
            most = middle
        else:
            fits, least = attempt, middle
    return (kind.encode(example) if fits is None else fits), least


def _fit(setting: Setting, drawn: Sequence[Sequence[Any]], count: int, kept: Sequence[int]) -> Outcome:
    fewer, all_of = sum(number < count for number in kept), len(kept)
    about = [f"{count} demonstrations before each prompt, drawn from the train split."]
    if fewer:
        about.append(
            f"{fewer:,} of {all_of:,} prompts hold fewer, {statistics.mean(kept):.1f} on average: "
            f"task.max_length is {setting.recipe.task.max_length}, and whole demonstrations were left out."
        )
    setting.screen.say(" ".join(about))
    scores = []
    for number, rows in enumerate(drawn, 1):
        start = time.perf_counter()
        score = setting.evaluate(rows, f"icl, draw {number} of {len(drawn)}")
        seconds = time.perf_counter() - start
        values = {f"test_{name}": metric.value for name, metric in score.metrics.items()}
        setting.metrics.log(number, **values, seconds=seconds, memory_gib=setting.memory.most_gib(EVALUATION))
        setting.screen.say(f"draw {number}: {score.main} on test: {score}")
        scores.append(score)
    result = mean_of(scores)
    if "deviation" in result:
        about.append(
            f"The result is the mean of {len(drawn)} draws, of standard deviation {result['deviation']:.4f}; its "
            "interval is that of the test examples alone."
        )
    return Outcome(result, about)


def _mean(values: Sequence[float | None]) -> float | None:
    """None if one of them is."""
    known = [value for value in values if value is not None]
    return statistics.mean(known) if len(known) == len(values) else None


def mean_of(scores: Sequence[Score]) -> dict[str, Any]:
    """The mean of several scores of the same rows, as `Score.as_dict` has one; of two or more also `draws`, the main
    metric of each, and `deviation`, the standard deviation of those."""
    if len(scores) == 1:
        return scores[0].as_dict()
    pooled, rows = reduce(add, scores), scores[0].count
    result = pooled.as_dict() | {"count": rows, "not_finite": max(score.not_finite for score in scores)}
    for name, metric in pooled.metrics.items():
        key, each = interval_key(name, pooled.main), [score.metrics[name] for score in scores]
        if isinstance(metric, ByClass):  # no mean over rows, so that of all draws' rows is not that of their values
            result[name] = _mean([one.value for one in each])
            if key in result:
                result[key] = [_mean([one.low for one in each]), _mean([one.high for one in each])]
        elif key in result:  # the same examples again make it no surer
            result[key] = list(wilson(result[name] * rows, rows))
    values = [score.metrics[score.main].value for score in scores]
    known = [value for value in values if value is not None]
    result["draws"] = values
    return result | ({"deviation": statistics.stdev(known)} if len(known) == len(values) else {})
