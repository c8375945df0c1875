"""Linear probing: multinomial logistic regression on the last hidden state of the prompt's last token, or of its mask.

The model stays as it is: every prompt is run once. The regression is solved on every rank by torch's L-BFGS in float64,
on features of mean 0 and variance 1 over the train split; the penalty is scikit-learn's, C times the summed
cross-entropy plus half the squared weights, the intercept free.
"""

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mezo_scale import collectives
from mezo_scale.distributed.world import World
from mezo_scale.errors import NotFiniteError, RecipeError, SharedError
from mezo_scale.recipe import Recipe
from mezo_scale.runs.memory import EVALUATION
from mezo_scale.runs.methods.setting import Fit, Outcome, Setting
from mezo_scale.runs.splits import EncodedSplits
from mezo_scale.tasks import Kind, Score
from mezo_scale.tasks.encoding import pad_left, to_device
from mezo_scale.tasks.kinds.candidates import Choice
from mezo_scale.tasks.kinds.cloze import EncodedCloze
from mezo_scale.tasks.kinds.encoded import Encoded
from mezo_scale.tasks.logits import forward

_ITERATIONS = 500


def plan(recipe: Recipe, world: World, kind: Kind[Any, Any], splits: EncodedSplits) -> Fit:
    """Raises RecipeError unless all rows choose among the same answers, which are the classes, and nothing is
    calibrated."""
    if recipe.task.calibrate:
        raise RecipeError(
            "task.calibrate is true, but method.name is linear_probe, which looks at no log-probability: leave it out"
        )
    rows = (*splits.train, *splits.dev, *splits.test)
    answers = {row.example.candidates if isinstance(row, Encoded) and row.example else None for row in rows}
    if len(answers) > 1 or None in answers:
        raise RecipeError(
            f"method.name is linear_probe, but the rows of task.name={recipe.task.name} do not all choose among the "
            "same answers, which are its classes: take another method or task"
        )
    (classes,) = answers
    assert classes is not None
    return partial(_fit, classes=len(classes))


def regress(features: Tensor, labels: Tensor, classes: int, strength: float) -> tuple[Tensor, Tensor]:
    """Weights [width, classes] and intercepts [classes], float64, of the penalised logistic regression.

    Args:
        features: float64 [rows, width].
        labels: int64 [rows].
        strength: C, the inverse strength of the penalty.
    """
    weights = torch.zeros(features.shape[1], classes, dtype=torch.float64, requires_grad=True)
    intercepts = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weights, intercepts],
        max_iter=_ITERATIONS,
        tolerance_grad=1e-8,
        tolerance_change=1e-13,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        solver.zero_grad()
        fit = F.cross_entropy(features @ weights + intercepts, labels, reduction="sum")
        whole: Tensor = (strength * fit + weights.square().sum() / 2) / (strength * len(labels))
        whole.backward()
        return whole

    with torch.enable_grad():
        solver.step(loss)
    return weights.detach(), intercepts.detach()


def last_hidden(setting: Setting, rows: Sequence[Encoded]) -> Tensor:
    """The last hidden state where each prompt is answered, float64 [rows, width], on every rank; every rank calls it.

    That is at its last token, or at its mask.

    Raises:
        SharedError: the model does not give its hidden states.
    """
    loaded, size = setting.loaded, setting.recipe.train.eval_batch
    axes = loaded.strategy.axes
    order = np.argsort([len(row.prompt) for row in rows], kind="stable")
    per_round = size * axes.rows_size
    found: Tensor | None = None
    for start in range(0, len(order), per_round):
        mine = order[start : start + per_round][axes.rows_rank(collectives.rank()) :: axes.rows_size]
        some = [rows[n] for n in (mine if len(mine) else order[:1])]
        with torch.no_grad(), loaded.compute():
            states = _hidden_states(setting, some)
        if states is None:
            raise SharedError(
                f"model.name: {setting.recipe.model.name} does not give its hidden states, which linear_probe needs: "
                "take another model or method"
            )
        last = states.double().cpu()
        found = torch.zeros(len(rows), last.shape[1], dtype=torch.float64) if found is None else found
        found[torch.from_numpy(mine.copy())] = last[: len(mine)]
    assert found is not None, "splits have rows"
    if collectives.is_distributed():  # each rank has its own rows, and zeros elsewhere
        found = found.to(collectives.device())
        dist.all_reduce(found)
    return found.cpu()


def _hidden_states(setting: Setting, rows: Sequence[Encoded]) -> Tensor | None:
    """The last hidden state where each row is answered, [rows, width]; None if the model gives none."""
    loaded = setting.loaded
    if isinstance(rows[0], EncodedCloze):
        batch = to_device(setting.kind.collate(rows, "candidates"), loaded.device)
        states = loaded.model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True
        ).hidden_states
        return states[-1][torch.arange(len(rows)), batch["mask_at"]] if states else None
    prompts = [row.prompt for row in rows]
    ids, mask = pad_left(prompts, loaded.processor.pad_token_id, setting.recipe.task.max_length)
    ids, mask = ids.to(loaded.device), mask.to(loaded.device)
    states = forward(loaded.model, ids, mask, 1, use_cache=False, output_hidden_states=True).hidden_states
    return states[-1][:, -1] if states else None


def _fit(setting: Setting, classes: int) -> Outcome:
    start, splits = time.perf_counter(), setting.splits
    with setting.screen.counting("hidden states", "splits") as progress, setting.memory.phase(EVALUATION):
        parts = []
        for number, rows in enumerate((splits.train, splits.dev, splits.test), 1):
            parts.append(last_hidden(setting, rows))
            progress(number, 3)
    train, dev, test = parts
    if not all(bool(part.isfinite().all()) for part in parts):
        raise NotFiniteError(
            "hidden states are not finite, so nothing can be fitted to them: check the checkpoint for NaN, or take "
            "another model.dtype"
        )
    mean, deviation = train.mean(0), train.std(0, correction=0).clamp(min=1e-12)
    train, dev, test = ((part - mean) / deviation for part in (train, dev, test))
    labels = torch.tensor([row.label for row in splits.train])
    best: tuple[float, float | None, float, Score] | None = None
    for number, strength in enumerate(sorted(setting.recipe.method.strengths), 1):
        solution = regress(train, labels, classes, strength)
        on_dev = _score(setting, dev, splits.dev, solution)
        setting.metrics.log(number, strength=strength, **{f"dev_{on_dev.main}": on_dev.metrics[on_dev.main].value})
        if best is None or on_dev.merit > best[0]:
            value = on_dev.metrics[on_dev.main].value
            best = on_dev.merit, value, strength, _score(setting, test, splits.test, solution)
    assert best is not None, "there are strengths"
    _, dev_value, strength, score = best
    setting.metrics.log(
        len(setting.recipe.method.strengths) + 1,
        **{f"dev_{score.main}": dev_value},
        seconds=time.perf_counter() - start,
        memory_gib=setting.memory.most_gib(EVALUATION),
    )
    setting.screen.say(f"linear probe, C={strength:g}: {score.main} on test: {score}")
    where = "mask" if isinstance(splits.train[0], EncodedCloze) else "last token"
    about = f"Logistic regression on {train.shape[1]:,} features of the prompt's {where}; C={strength:g} by dev."
    return Outcome({**score.as_dict(), "strength": strength, "dev": dev_value}, [about])


def _score(setting: Setting, features: Tensor, rows: Sequence[Encoded], solution: tuple[Tensor, Tensor]) -> Score:
    weights, intercepts = solution
    logits = features @ weights + intercepts
    losses = F.cross_entropy(logits, torch.tensor([row.label for row in rows]), reduction="none")
    chosen = [Choice(*pair) for pair in zip(logits.argmax(1).tolist(), losses.tolist(), strict=True)]
    return setting.kind.score(chosen, rows)
