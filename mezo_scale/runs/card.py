"""The card of a tuned model: what it is, what it is worth, and how whoever has its base model makes it again."""

import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from mezo_scale import tasks
from mezo_scale.models import adapters
from mezo_scale.recipe import Recipe, means_disk
from mezo_scale.runs.directory import RunDirectory, replace_file
from mezo_scale.runs.report import as_markdown, main_metric, results_table

CARD = "README.md"
LOG = "steps.mezo"  # not trajectory.mezo, by which the directory of a run is known


def add_card(folder: Path, recipe: Recipe, run: RunDirectory, results: Mapping[str, Any], about: str) -> None:
    """Puts README.md into a checkpoint that is being saved and, of a run of MeZO, what rebuilds it; for rank 0.

    Args:
        results: as `Score.as_dict` writes them, those of the tuned model among them.
        about: what was done and what was tuned, in a sentence.
    """
    name, is_adapter = recipe.model.name, (folder / adapters.CONFIG_FILE).is_file()
    base = Path(name).name if means_disk(name) else name  # where it lies is nobody's business
    again: list[str] = []
    step, until = results["tuned"].get("step"), ""
    if step is not None and step < results.get("ended", {}).get("step", step):
        until = f"--until {step} "
    if recipe.method.name == "mezo":
        shutil.copyfile(run.trajectory, folder / LOG)
        begun = ""
        if is_adapter:
            shutil.copytree(run.adapter_init, folder / run.adapter_init.name)
            begun = f"--adapter {run.adapter_init.name} "
        again = [
            "",
            "## Made again from its log",
            "",
            f"`{LOG}` holds every step of the run. With the base model it gives these weights, bit for bit:",
            "",
            f"    mezo-scale replay --base {base} --trajectory {LOG} {begun}{until}--out tuned",
        ]
    lines = [
        f"# {base}, tuned on {recipe.task.name}",
        "",
        f"{about} Made by mezo-scale {version('mezo-scale')}.",
        "",
        *as_markdown(results_table(results)),
        *again,
    ]
    data = _data(recipe, results["tuned"], is_adapter)
    (folder / CARD).write_text(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines) + "\n", encoding="utf-8")


def add_licence(path: Path, base: str) -> None:
    """Puts the licence that a base model's card on the hub names into a card that has none, if the hub gives it."""
    if not path.is_file():  # a checkpoint of before there were cards
        return
    card = ModelCard.load(path)
    if card.data.license is None and (found := _licence_of(base)):
        card.data.license = found
        replace_file(path, card.content)


def _licence_of(base: str) -> str | None:
    """None where there is no card, in the folder or on the hub, or it names none."""
    where = Path(base) / CARD if means_disk(base) else base
    try:
        found: str | None = ModelCard.load(where).data.license
    except Exception:  # the hub's client has roots of its own, and a card can be any text
        return None
    return found


def _reads_images(recipe: Recipe) -> bool:
    kind = tasks.known()[recipe.task.name].kind
    return isinstance(kind, tasks.NamedKind) and kind.reads_images


def _data(recipe: Recipe, tuned: Mapping[str, Any], is_adapter: bool) -> ModelCardData:
    base, main = recipe.model.name, main_metric(tuned)
    data = recipe.task.name if means_disk(recipe.task.data) else recipe.task.data
    result = EvalResult(
        task_type="image-classification" if _reads_images(recipe) else "text-generation",
        dataset_type=data,
        dataset_name=data,
        dataset_split="test",
        metric_type=main,
        metric_value=tuned[main],
    )
    on_disk = means_disk(base)
    return ModelCardData(
        base_model=None if on_disk else base,
        license=_licence_of(base) if on_disk else None,
        library_name="peft" if is_adapter else "transformers",
        tags=["mezo-scale", recipe.method.name],
        model_name=f"{Path(base).name}-{recipe.task.name}",
        eval_results=None if tuned[main] is None else [result],  # of rows none of which is finite
    )
