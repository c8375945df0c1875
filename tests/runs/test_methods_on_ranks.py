"""Baselines on several ranks come to what one process comes to."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mezo_scale import models
from mezo_scale.distributed.world import World
from mezo_scale.recipe import parse
from mezo_scale.runs.console import Screen
from mezo_scale.runs.directory import RunDirectory
from mezo_scale.runs.memory import PhaseMemory
from mezo_scale.runs.methods import session
from mezo_scale.runs.methods.setting import Setting
from mezo_scale.runs.metrics import Metrics
from mezo_scale.runs.splits import EncodedSplits, prepare
from tests.support.pool import Ranks


def outcome(folder: str, model: str, data: str, strategy: str, method: str, **sections: Any) -> tuple[Any, list[Any]]:
    """What a method comes to in the group that there is, and the lines of its metrics."""
    tree = {
        "model": {"name": model},
        "task": {"data": data, "train": 45, "dev": 16, "test": 31, "max_length": 80},
        "sharding": {"strategy": strategy},
        "output": {"dir": folder},
        "method": {"name": method},
    }
    recipe, kind = prepare(parse(tree | sections))
    world, run = World(dist.get_rank(), 0, 1, dist.get_world_size(), torch.device("cpu")), RunDirectory(Path(folder))
    splits = EncodedSplits.read(recipe, kind)
    fit = session.plan(recipe, world, run, kind, splits)
    run.create()
    loaded = models.load(recipe, world)
    memory, metrics = PhaseMemory(world.device), Metrics(run, world, -1, recipe, None)
    found = fit(Setting(recipe, world, kind, splits, loaded, Screen(world), memory, metrics)).result
    metrics.close()
    dist.barrier()
    return found, [json.loads(line) for line in run.metrics.read_text().splitlines()]


@pytest.mark.parametrize("method", ["icl", "linear_probe"])
def test_what_takes_no_steps_comes_to_the_same(
    ranks: Ranks, tmp_path: Path, model_folder: Path, reviews_file: Path, method: str
) -> None:
    given = {"model": str(model_folder), "data": str(reviews_file), "method": method}
    ((alone, _),) = ranks(1, outcome, folder=str(tmp_path / "1"), strategy="single", **given)
    for found, _ in ranks(3, outcome, folder=str(tmp_path / "3"), strategy="fsdp2", **given):
        assert found["loss"] == pytest.approx(alone["loss"], rel=1e-4)
        assert found["accuracy"] == alone["accuracy"]


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_adamw_under_fsdp2_goes_the_way_of_one_process(
    ranks: Ranks, tmp_path: Path, model_folder: Path, reviews_file: Path, tune: str
) -> None:
    given = {
        "model": str(model_folder),
        "data": str(reviews_file),
        "method": "adamw",
        "tune": {"what": tune},
        "optimizer": {"lr": 1e-2, "weight_decay": 0.1},
        # 7 rows are 3, 2, 2 of the ranks: in parts of 2 the others have none left for the second.
        "train": {"steps": 6, "batch_size": 7, "micro_batch": 2, "eval_every": 0},
    }
    ((_, alone),) = ranks(1, outcome, folder=str(tmp_path / "1"), strategy="single", **given)
    found = ranks(3, outcome, folder=str(tmp_path / "3"), strategy="fsdp2", **given)
    expected = [line["loss"] for line in alone if "loss" in line]
    assert expected[-1] != pytest.approx(expected[0], abs=1e-3)
    for _, lines in found:
        assert [line["loss"] for line in lines if "loss" in line] == pytest.approx(expected, abs=2e-3)
