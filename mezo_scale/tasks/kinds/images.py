"""Images that are classified: each is told which of the model's classes it is of."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mezo_scale.errors import RecipeError, one_line
from mezo_scale.recipe import TaskSection
from mezo_scale.tasks.encoding import Batch
from mezo_scale.tasks.example import Picture
from mezo_scale.tasks.kinds.candidates import Choice
from mezo_scale.tasks.kinds.kind import Kind, Objective, refuse_temperature
from mezo_scale.tasks.score import AnyMetric, ByClass, Metric, Score, best_of, most_frequent
from mezo_scale.tasks.tables import shown


@dataclass(frozen=True, repr=False)
class Image:
    """An image's file, the number of its class, and the names of all classes."""

    data: bytes
    label: int
    candidates: tuple[str, ...]

    def __repr__(self) -> str:
        # Digests are taken of it.
        return f"Image(sha256={hashlib.sha256(self.data).hexdigest()}, label={self.label})"


class Images(Kind[Image, Choice]):
    """One of the model's classes: the one with the largest logit; graded by accuracy.

    Objectives: cross_entropy, over the model's classes; accuracy, 1 where a wrong one is chosen.
    """

    metrics = ("accuracy", "macro_f1", "balanced_accuracy")
    reads_images = True

    def __init__(self, reader: Any, section: TaskSection) -> None:
        """`reader`: `mezo_scale.models.vision.ImageReader`. Raises RecipeError for fields that do not fit the model."""
        refuse_temperature(section)
        self._reader, self._main = reader, section.metric or "accuracy"
        self._labels: tuple[str, ...] = reader.labels
        names = self._labels if section.labels is None else tuple(map(str, section.labels))
        if len(names) != len(self._labels) or len(set(names)) < len(names):
            raise RecipeError(
                f"task.labels: found {shown(names)}, expected {len(self._labels)} that differ, one for each class of "
                f"the model: {shown(self._labels)}"
            )
        numbers = {} if section.labels is not None else {str(number): number for number in range(len(names))}
        if any(numbers.get(name, number) != number for number, name in enumerate(names)):
            raise RecipeError(
                f"the model's classes {shown(names)} can be labels by their names and by their numbers, and mean "
                "different ones: say in task.labels what the column holds"
            )
        self._numbers = numbers | {name: number for number, name in enumerate(names)}
        self._shape: tuple[int, ...] | None = None
        self.objectives: dict[str, Objective] = {"cross_entropy": cross_entropy, "accuracy": accuracy_loss}

    def encode(self, example: Picture) -> Image:
        """The image, once it has been read as a step will read it.

        Raises:
            RecipeError: it is no image, not of the others' size, or its label is no class of the model.
        """
        found = str(example.label)
        if found not in self._numbers:
            raise RecipeError(
                f"task.data: {example.place} has the label {example.label!r:.60}, expected one of "
                f"{shown(list(self._numbers), 20)}: mend it, say in task.labels what the column holds, in the order of "
                "the model's classes, or give a model with such a class"
            )
        try:
            shape = tuple(self._reader([example.data]).shape[1:])
        except Exception as error:  # PIL and transformers raise anything
            raise RecipeError(f"task.data: {example.place} has no image that can be read ({one_line(error)})") from None
        self._shape = self._shape or shape
        if shape != self._shape:
            raise RecipeError(
                f"task.data: {example.place} has an image of {list(shape)} as the model's processor leaves it, the "
                f"ones before it {list(self._shape)}: give images of one size, or a processor that makes them so"
            )
        return Image(example.data, self._numbers[found], self._labels)

    def length(self, row: Image) -> int:
        """All are equally long."""
        return 1

    def collate(self, rows: Sequence[Image], objective: str | None = None, max_length: int | None = None) -> Batch:
        """pixel_values: float32 [rows, channels, height, width]; label: int64 [rows]."""
        pixels = self._reader([row.data for row in rows])
        return {"pixel_values": pixels, "label": torch.tensor([row.label for row in rows])}

    def predict(self, model: nn.Module, batch: Batch) -> list[Choice]:
        logits = class_logits(model, batch)
        losses = _losses(logits, batch).double()
        return [Choice(*row) for row in zip(logits.argmax(1).tolist(), losses.tolist(), strict=True)]

    def score(self, predictions: Sequence[Choice], rows: Sequence[Image]) -> Score:
        chosen = [found.candidate if math.isfinite(found.loss) else None for found in predictions]
        losses = Metric.of([found.loss for found in predictions], bounded=False)
        return Score({**self._graded(chosen, rows), "loss": losses}, self._main)

    def log_probs(self, model: nn.Module, batch: Batch) -> Tensor:
        """Of every class, float32 [rows, classes]."""
        return class_logits(model, batch).log_softmax(1)

    def baselines(self, train: Sequence[Image], test: Sequence[Image]) -> dict[str, Score]:
        """What always answering with the train split's most frequent class gives: the best of several."""
        labels = most_frequent([row.label for row in train])
        graded = [self._graded([label] * len(test), test) for label in labels]
        return {"majority": best_of([Score(found, self._main) for found in graded])}

    def _graded(self, chosen: Sequence[int | None], rows: Sequence[Image]) -> dict[str, AnyMetric]:
        labels = [row.label for row in rows]
        pairs = zip(chosen, labels, strict=True)
        right = [math.nan if found is None else float(found == label) for found, label in pairs]
        metrics: dict[str, AnyMetric] = {"accuracy": Metric.of(right)}
        if self._main != "accuracy":
            metrics[self._main] = ByClass.of(self._main, chosen, labels, len(self._labels))
        return metrics


def class_logits(model: nn.Module, batch: Batch) -> Tensor:
    """float32 [rows, classes]."""
    dtype = next(model.parameters()).dtype
    logits: Tensor = model(pixel_values=batch["pixel_values"].to(dtype)).logits
    return logits.float()


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy over the classes, float32 [rows]."""
    return F.cross_entropy(class_logits(model, batch), batch["label"], reduction="none")


def accuracy_loss(model: nn.Module, batch: Batch) -> Tensor:
    """0 where the class with the largest logit is right, else 1; NaN where a logit is not finite. float32 [rows]."""
    logits = class_logits(model, batch)
    wrong: Tensor = (logits.argmax(1) != batch["label"]).float()
    return wrong.masked_fill(~logits.isfinite().all(1), math.nan)


accuracy_loss.smooth = cross_entropy  # type: ignore[attr-defined]


def _losses(logits: Tensor, batch: Batch) -> Tensor:
    losses = F.cross_entropy(logits, batch["label"], reduction="none")
    return losses.masked_fill(~logits.isfinite().all(1), math.nan)
