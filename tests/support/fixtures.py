"""Fixtures of several rooms: a tiny model, its data and recipe, the command line, warm ranks, the demo."""

import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock

from mezo_scale import cli
from mezo_scale.recipe import Recipe, load
from tests.support import material
from tests.support.pool import Ranks

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tied head, and its tokenizer."""
    return material.write_model("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def reviews_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return material.write_reviews(tmp_path_factory.mktemp("data") / "reviews.csv")


@pytest.fixture
def recipe_file(tmp_path: Path, model_folder: Path, reviews_file: Path) -> Path:
    """A recipe that runs in a second or two; its run directory is beside it and does not exist yet."""
    return write_recipe(tmp_path, model_folder, reviews_file)


def write_recipe(folder: Path, model_folder: Path, reviews_file: Path) -> Path:
    """The file of such a recipe, in `folder`."""
    tree = {
        "model": {"name": str(model_folder)},
        "task": {"data": str(reviews_file), "train": 48, "dev": 16, "test": 32, "max_length": 40},
        "optimizer": {"lr": 1e-2},
        "train": {"steps": 4, "batch_size": 6, "eval_every": 2, "log_every": 1},
        "output": {"dir": str(folder / "run")},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture
def make_recipe(recipe_file: Path) -> Callable[..., Recipe]:
    """The recipe with overrides: make_recipe("train.steps=8")."""

    def make(*overrides: str, **values: Any) -> Recipe:
        return load(recipe_file, [*overrides, *(f"{key}={value}" for key, value in values.items())])

    return make


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs the command line in this process: exit code, output, errors."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mezo-scale", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return call


@pytest.fixture(scope="session")
def pool() -> Iterator[Ranks]:
    pool = Ranks()
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def ranks(pool: Ranks) -> Iterator[Ranks]:
    """Runs a function on 1 to 4 warm gloo ranks: see `tests/support/pool.py`."""
    yield pool
    pool.rest()  # gloo's threads are never idle: they would take from the tests of other files


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The folder with the demo's model and data, real weights and texts, made once per checkout."""
    folder = ROOT / ".demo"
    tool = [sys.executable, str(ROOT / "tools" / "prepare_demo.py"), "--out", str(folder)]
    with FileLock(tmp_path_factory.getbasetemp().parent / "demo.lock"):  # one worker makes it, the others wait
        done = subprocess.run(tool, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder
