"""Peak memory by phase: what a run prints, reports and logs of it."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mezo_scale.recipe import Recipe
from mezo_scale.runs.memory import EVALUATION, STEPS, PhaseMemory
from mezo_scale.runs.session import train
from tests.runs.test_not_finite import metrics


def test_a_moment_belongs_to_the_innermost_phase_that_is_open() -> None:
    memory = PhaseMemory(torch.device("cpu"))
    with memory.phase(STEPS):
        before = memory.most_gib(STEPS)
        with memory.phase(EVALUATION):
            torch.zeros(100 << 20)  # 400 MiB
        after = memory.most_gib(STEPS)
    assert memory.most_gib(EVALUATION) > before + 0.35
    assert after < before + 0.2


def test_a_run_tells_its_peak_memory_beside_that_of_inference(
    make_recipe: Callable[..., Recipe], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe("eval_every=2", "micro_batch=4")
    train(recipe)
    said = re.search(
        r"^peak memory per rank (\d+\.\d\d) GiB; inference alone (\d+\.\d\d) GiB \(same batch\)$",
        capsys.readouterr().out,
        re.MULTILINE,
    )
    assert said is not None
    peak, alone = map(float, said.groups())
    assert 0.1 < alone <= peak + 0.05 < alone + 0.5  # the interpreter and its libraries, and a model of a few kB
    run = Path(recipe.output.dir)
    found = dict(re.findall(r"^\| ([a-z ]+) \| (\d+\.\d\d) \|", (run / "report.md").read_text(), re.MULTILINE))
    assert found.keys() == {"loading", "evaluation", "inference alone", "training steps", "checkpoint"}
    assert float(found["training steps"]) == peak
    logged = [line["memory_gib"] for line in metrics(run) if "dev_accuracy" in line]
    assert len(logged) == 2
    assert max(logged) == pytest.approx(peak, abs=0.01)
