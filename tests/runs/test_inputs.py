"""Results on other data or weights under one name are told apart: no table has both, and none is taken for new."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

from mezo_scale.bench import comparing, comparison, comparison_report
from mezo_scale.bench.comparison import Cell, Comparison
from mezo_scale.errors import RecipeError
from mezo_scale.models.fingerprints import of_files
from mezo_scale.recipe import Recipe, load
from mezo_scale.runs.directory import RunDirectory
from mezo_scale.runs.session import train

MakeRecipe = Callable[..., Recipe]


def relabelled(folder: Path) -> None:
    """One label of the data changes."""
    lines = (folder / "reviews.csv").read_text().splitlines()
    text, label = lines[1].rsplit(",", 1)
    (folder / "reviews.csv").write_text("\n".join([lines[0], f"{text},{1 - int(label)}", *lines[2:]]) + "\n")


def tuned_further(folder: Path) -> None:
    """One number of one weight changes."""
    path = folder / "model" / "model.safetensors"
    weights = load_file(path)
    next(iter(weights.values())).view(-1)[0] += 1
    save_file(weights, path, {"format": "pt"})


def normalised(folder: Path) -> None:
    path = folder / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 1e-2}))


def spoken_to(folder: Path) -> None:
    (folder / "model" / "chat_template.jinja").write_text("{{ messages }}")


CHANGES = {relabelled: "data", tuned_further: "weights", normalised: "config", spoken_to: "tokenizer"}


@pytest.fixture
def folder(tmp_path: Path, model_folder: Path, reviews_file: Path) -> Path:
    shutil.copytree(model_folder, tmp_path / "model")
    shutil.copy(reviews_file, tmp_path / "reviews.csv")
    return tmp_path


@pytest.fixture
def make(folder: Path, make_recipe: MakeRecipe) -> MakeRecipe:
    own = f"model.name={folder / 'model'}", f"task.data={folder / 'reviews.csv'}"
    return lambda *overrides: make_recipe(*own, *overrides)


def compared(folder: Path, *overrides: str, **methods: Any) -> Comparison:
    tree = {
        "model": {"name": str(folder / "model")},
        "task": {"data": str(folder / "reviews.csv"), "train": 48, "dev": 16, "test": 32, "max_length": 40},
        "output": {"dir": str(folder / "out")},
        "compare": {"methods": methods, "seeds": [0]},
    }
    (folder / "compare.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    return comparison.load(folder / "compare.yaml", overrides)


def start(cell: Cell, log: Path, processes: int | None) -> None:
    train(cell.recipe)


ZERO, PROBE = {"method": {"name": "zero_shot"}}, {"method": {"name": "linear_probe"}}
MEZO = {"optimizer": {"lr": 1e-3, "eps": 1e-2}, "train": {"steps": 2, "batch_size": 6, "eval_every": 2}}


@pytest.mark.parametrize(("change", "name"), CHANGES.items())
def test_a_comparison_does_not_go_on_with_other_data_or_weights(
    folder: Path, change: Callable[[Path], None], name: str
) -> None:
    comparing.run(compared(folder, zero=ZERO), start=start)
    change(folder)
    begun: list[str] = []
    with pytest.raises(RecipeError, match=rf"zero has a result on other {name} than there are now: give another out"):
        comparing.run(compared(folder, zero=ZERO, probe=PROBE), start=lambda cell, *_: begun.append(cell.name))
    assert not begun


def test_a_method_with_longer_rows_is_held_to_the_same_data(folder: Path) -> None:
    """Its tokens are others, but it reads the same examples."""
    comparing.run(compared(folder, zero=ZERO), start=start)
    longer = {**PROBE, "task": {"max_length": 48}}
    comparing.run(compared(folder, zero=ZERO, probe=longer), start=start)
    relabelled(folder)
    with pytest.raises(RecipeError, match="zero has a result on other data than there are now"):
        comparing.run(compared(folder, zero=ZERO, probe=longer, icl={"method": {"name": "icl"}}), start=start)


def test_results_that_were_put_together_from_different_data_make_no_table(folder: Path) -> None:
    both = compared(folder, zero=ZERO, probe=PROBE)
    comparing.run(both, start=start)
    path = RunDirectory(folder / "out" / "probe").environment
    (session,) = json.loads(path.read_bytes())
    path.write_text(json.dumps([session | {"inputs": session["inputs"] | {"data": "0" * 16}}]))
    with pytest.raises(RecipeError, match="probe has a result on other data than others of this comparison"):
        comparing.run(both, start=start)
    path.write_text(json.dumps([{key: session[key] for key in session if key != "inputs"}]))  # of before there were any
    comparing.run(both, start=start)
    assert "| probe |" in comparison_report.write(both, {})


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["output.checkpoint=best"], "output.checkpoint=best: False, now True"),
        (["train.patience=1", "train.eval_every=1"], "train.patience: None, now 1; train.eval_every: 2, now 1"),
    ],
)
def test_a_result_of_another_step_than_is_asked_for_is_not_put_beside_those_that_are(
    folder: Path, overrides: list[str], said: str
) -> None:
    comparing.run(compared(folder, mezo=MEZO), start=start)
    other = compared(folder, *overrides, "compare.seeds=[0,1]", mezo=MEZO)
    with pytest.raises(RecipeError, match=re.escape(f"mezo-seed0 holds a run with {said}: give another output.dir")):
        comparing.run(other, start=start)


def test_data_that_is_edited_while_runs_go_on_stops_the_comparison(folder: Path) -> None:
    begun: list[str] = []

    def edits(cell: Cell, log: Path, processes: int | None) -> None:
        begun.append(cell.name)
        start(cell, log, processes)
        relabelled(folder)

    with pytest.raises(RecipeError, match="zero has a result on other data than there are now"):
        comparing.run(compared(folder, zero=ZERO, probe=PROBE), start=edits)
    assert begun == ["zero"]


def test_a_run_that_ended_without_a_value_is_a_row_with_its_reason(folder: Path) -> None:
    asked = compared(folder, zero=ZERO)
    comparing.run(asked, start=start)
    path = RunDirectory(folder / "out" / "zero").evaluation
    results = json.loads(path.read_bytes())
    path.write_text(json.dumps(results | {"zero_shot": results["zero_shot"] | {"accuracy": None}}))
    table = comparison_report.write(asked, {})
    assert "| zero | | no result: it ended, but with no accuracy: on some rows that is not finite |" in table


@pytest.mark.parametrize(("change", "name"), list(CHANGES.items())[:2])
def test_a_finished_baseline_is_not_taken_for_one_of_other_data_or_weights(
    folder: Path, change: Callable[[Path], None], name: str
) -> None:
    (cell,) = compared(folder, zero=ZERO).cells
    recipe = cell.recipe
    train(recipe)
    report = (recipe.directory / "report.md").read_bytes()
    change(folder)
    with pytest.raises(RecipeError, match=f"zero has a result on other {name} than there are now"):
        train(recipe)
    assert (recipe.directory / "report.md").read_bytes() == report


def test_a_run_does_not_go_on_with_a_recipe_that_was_edited_in_its_directory(make: MakeRecipe) -> None:
    train(make("train.steps=1"))
    path = make().directory / "recipe.yaml"
    before = path.read_text()
    path.write_text(before.replace("batch_size: 6", "batch_size: 12"))
    with pytest.raises(RecipeError, match=r"holds a run with train.batch_size: 6, now 12: give another output.dir"):
        train(load(make().directory, ["train.steps=2"]))
    path.write_text(before.replace("steps: 1\n", "steps: 2\n"))
    train(load(make().directory))
    assert len(RunDirectory(make().directory).read_log()) == 2


def test_an_evaluation_says_that_it_is_on_other_data_than_the_run_s(
    folder: Path, make: MakeRecipe, run: Callable[..., tuple[int, str, str]]
) -> None:
    train(make("train.steps=1"))
    said = "was made with other data than it is evaluated with now"
    code, shown, _ = run("evaluate", make().directory)
    assert code == 0
    assert said not in shown
    relabelled(folder)
    code, shown, _ = run("evaluate", make().directory)
    assert code == 0
    assert said in shown
    assert load(make().directory).train.steps == 1


def test_a_digest_of_files_is_of_every_byte_and_of_large_ones_in_blocks(tmp_path: Path) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_bytes(bytes(3 << 20))
    with large.open("wb") as file:
        file.truncate(300 << 20)
    found = {of_files([small]), of_files([large]), of_files([small, large])}
    assert len(found) == 3
    for path, place in ((small, 0), (small, 2_000_001), (small, (3 << 20) - 1), (large, 0), (large, (300 << 20) - 1)):
        with path.open("r+b") as file:
            file.seek(place)
            file.write(b"\1")
        found.add(of_files([path]))
    assert len(found) == 8
    large.open("ab").write(b"\0")
    assert of_files([large]) not in found
