"""The perturbed view of one model against copies of it that were really moved; on one rank or sharded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mezo_scale.errors import MezoError, ViewError
from mezo_scale.perturbation import Branch, View
from tests.support import layouts
from tests.support.moved import moved
from tools.tiny_models import Batch, Builder, row_losses

BRANCHES = [(11, 0.1), (11, -0.1), (5, 0.2)]
"""Far apart: any parameter that was left out has to show."""
TOLERANCE = 1e-5
LEAST_EFFECT = 100 * TOLERANCE
"""Relative change of a loss: with less, a view that did nothing would pass."""


@dataclass(frozen=True)
class Comparison:
    """Largest relative errors of the view's losses; None where it refused.

    Attributes:
        one: branch by branch.
        paired: all branches in one tall batch.
        why_not: what it said when it refused.
        unread: how many trainable parameters nothing reads.
        for_example: some of their names.
    """

    one: float | None
    paired: float | None = None
    why_not: str = ""
    unread: int = 0
    for_example: list[str] = field(default_factory=list)


class UnusableError(Exception):
    """A model that can't be compared: its losses are not finite, or change from call to call."""


def cell(layout: str, build: Builder) -> dict[str, Any]:
    """One row of the table. Raises whatever the model raises that is not under a view."""
    try:
        model, batch = build()
    except Exception as error:
        raise UnusableError(f"it can't be built: {in_words(error)}") from error
    right = moved_losses(model, batch)
    try:
        sharded, close = shard(layout, model)
    except MezoError as error:
        return asdict(Comparison(None, None, str(error)))
    except Exception as error:
        raise UnusableError(f"{layout} can't shard it: {in_words(error)}") from error
    try:
        result = asdict(compare(sharded, batch, right))
    except Exception:
        _must_run(layout, build)
        raise
    finally:
        close()
    if layout == "plain":
        return result
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, result)
    return max(everyone, key=lambda other: (other["one"] or 0.0, other["paired"] or 0.0))


def _must_run(layout: str, build: Builder) -> None:
    """Raises UnusableError if a model does not even run without a view once it is sharded."""
    model, batch = build()
    sharded, close = shard(layout, model)
    try:
        with torch.no_grad():
            for _ in range(3):  # prefetching starts with the second forward
                row_losses(sharded, batch)
    except Exception as error:
        raise UnusableError(f"its own forwards fail under {layout}, without a view, too: {in_words(error)}") from error
    finally:
        close()


def in_words(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def moved_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Losses of physically perturbed copies, [branches, rows]; the model itself stays as it is.

    Raises:
        UnusableError: by these losses nothing can be compared.
    """
    with torch.no_grad():
        plain = row_losses(model, batch)
        if not torch.isfinite(plain).all():
            raise UnusableError("its losses are not finite")
        if not torch.equal(plain, row_losses(model, batch)):
            raise UnusableError("its losses change from call to call")
        right = torch.stack([row_losses(moved(model, seed, scale), batch) for seed, scale in BRANCHES])
    if not torch.isfinite(right).all():
        raise UnusableError("its losses are not finite when perturbed")
    if (effect := _error(right, plain)) < LEAST_EFFECT:
        raise UnusableError(f"what is trainable changes its losses by {effect:.0e} only")
    return right


def compare(model: nn.Module, batch: Batch, right: Tensor) -> Comparison:
    """The view against `right`: a branch at a time and, with a view of its own, all at once."""
    try:
        view = View(model)
        one = torch.cat([_evaluate(view, [branch], model, batch) for branch in BRANCHES])
    except MezoError as error:
        return Comparison(None, None, str(error))
    error_one, unread = _error(one, right), view.never_ran
    try:
        paired = _evaluate(View(model), BRANCHES, model, batch)
    except Exception as error:  # as MeZO: whatever a tall batch raises is a reason to evaluate one branch at a time
        words = str(error) if isinstance(error, ViewError) else in_words(error)
        return Comparison(error_one, None, words, len(unread), unread[:3])
    return Comparison(error_one, _error(paired, right), "", len(unread), unread[:3])


def _evaluate(view: View, branches: Sequence[Branch], model: nn.Module, batch: Batch) -> Tensor:
    tall = {key: torch.cat([value] * len(branches)) for key, value in batch.items()}
    with view.branches(branches):
        return row_losses(model, tall).view(len(branches), -1)


def _error(losses: Tensor, right: Tensor) -> float:
    return float(((losses - right).abs() / right.abs().clamp_min(1e-6)).nan_to_num(float("inf")).max())


def shard(layout: str, model: nn.Module) -> tuple[nn.Module, Callable[[], object]]:
    """The model sharded as the package does it, in place, and how to let go of it."""
    if layout == "zero3":
        sharded = layouts.zero3(model)
        return sharded.model.get_submodule("module"), sharded.close
    if layout == "fsdp2":
        _fsdp2(model)
    return model, lambda: None


def _fsdp2(model: nn.Module) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from mezo_scale.models.fsdp2 import shard_fsdp2

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if not hasattr(model, "peft_config"):
        return shard_fsdp2(model, mesh)
    layers = [module for module in model.modules() if type(module).__name__.endswith("DecoderLayer")]
    held = [parameter for layer in layers for parameter in layer.parameters()]
    if len(held) == len(set(held)):  # what two layers share can only be in a unit around both
        for layer in layers:
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return None
