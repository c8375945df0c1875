"""One recipe in every strategy, started by torchrun: the same losses, and one line where it can't run."""

import json
from pathlib import Path

import pytest
import yaml

from mezo_scale.recipe import load
from mezo_scale.runs.verify import verify
from tests.support import material
from tests.support.launch import BIN, Launch

STEPS = 20


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("strategies")
    tree = {
        "model": {"name": str(material.write_model("llama", folder / "model"))},
        "task": {
            "data": str(material.write_reviews(folder / "reviews.csv")),
            "train": 48,
            "dev": 16,
            "test": 32,
            "max_length": 40,
        },
        "optimizer": {"lr": 2e-3},
        "train": {"steps": STEPS, "batch_size": 7, "eval_every": 0},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def train(launch: Launch, processes: int, *arguments: object) -> str:
    torchrun = (BIN / "torchrun", "--standalone", "--nproc-per-node", processes, "-m", "mezo_scale.cli")
    done = launch(*torchrun, "train", *arguments)
    assert done.code == 0, done.output
    return done.output


def test_every_strategy_goes_the_same_way(launch: Launch, recipe: Path, tmp_path: Path) -> None:
    cells = {
        "single": (1, []),
        "fsdp2": (2, ["strategy=fsdp2"]),
        "zero3": (2, ["strategy=zero3"]),
        "hsdp": (4, ["strategy=hsdp", "replicate=2"]),
    }
    for name, (processes, overrides) in cells.items():
        output = train(launch, processes, recipe, f"output.dir={tmp_path / name}", *overrides)
        assert "Warning" not in output
        assert output.count("continue this run: ") == 1
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "single"), abs=1e-3)
        # The saved checkpoint is what one process gets from the trajectory alone, bit for bit.
        assert len(list(verify(load(tmp_path / name)))) == 3


def test_a_run_goes_on_in_another_strategy_with_other_ranks(launch: Launch, recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "moving"
    train(launch, 2, recipe, f"output.dir={run}", "strategy=fsdp2", "steps=4")
    output = train(launch, 3, run, "strategy=single", "steps=8")
    assert f"continuing {run}: 4 steps are replayed, 4 are left" in output
    train(launch, 2, run, "strategy=zero3", "steps=12")
    assert len(losses(run)) == 12
    assert len(list(verify(load(run)))) == 3


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["train.batch_size=1"], "train.batch_size is 1, but there are 2 processes: give each at least one row"),
        (["train.steps=0"], "train.steps: found 0 (an integer), expected greater than or equal to 1"),
    ],
)
def test_what_cannot_run_on_two_ranks_is_said_once(
    launch: Launch, recipe: Path, tmp_path: Path, overrides: list[str], said: str
) -> None:
    torchrun = (BIN / "torchrun", "--standalone", "--nproc-per-node", "2", "-m", "mezo_scale.cli")
    done = launch(*torchrun, "train", recipe, f"output.dir={tmp_path / 'run'}", *overrides)
    assert done.code != 0
    assert done.output.count("error: ") == 1
    assert said in done.output
    assert "mezo_scale/" not in done.output.split("error: ")[0]
    assert not (tmp_path / "run").exists()


def test_an_error_is_said_though_the_ranks_that_keep_silent_meet_it_first(launch: Launch, tmp_path: Path) -> None:
    late = tmp_path / "late.py"
    late.write_text(
        "import os, sys, time\n"
        "time.sleep(3 if os.environ['RANK'] == '0' else 0)\n"
        "sys.argv[1:] = ['train', 'no-such-recipe.yaml']\n"
        "from mezo_scale.cli import main\n"
        "main()\n"
    )
    done = launch(BIN / "torchrun", "--standalone", "--nproc-per-node", "2", late)
    assert done.code != 0
    assert done.output.count("error: ") == 1
