"""What the tests of trainers have in common: rows, arguments, weights."""

from __future__ import annotations

import pathlib
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from mezo_scale.integrations.transformers import MeZOConfig


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Texts of one length, each its own labels."""

    def __init__(self, count: int) -> None:
        self.ids = torch.randint(5, 60, (count, 8), generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def arguments(folder: pathlib.Path, **more: Any) -> dict[str, Any]:
    """Of a short training on the CPU that writes nothing but what `more` says."""
    return {
        "output_dir": str(folder),
        "learning_rate": 1e-3,
        "eps": 1e-2,
        "seed": 7,
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "lr_scheduler_type": "constant",
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        **more,
    }


def config(folder: pathlib.Path, *, kind: type[MeZOConfig] = MeZOConfig, **more: Any) -> MeZOConfig:
    return kind(**arguments(folder, **more))


def values(model: nn.Module) -> list[Tensor]:
    return [param.detach().clone() for param in model.parameters()]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


class StopAfter(TrainerCallback):
    """Ends a run early, with nothing saved that was not to be saved."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step >= self.step
