"""The comparisons that come along: the paper's settings, and those that pages show."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from mezo_scale.bench import comparison

Run = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize("name", comparison.shipped())
def test_the_papers_settings_that_come_along_are_valid(run: Run, name: str, tmp_path: Path) -> None:
    code, text, _ = run("recipe", "--example", name)
    assert code == 0
    (tmp_path / f"{name}.yaml").write_text(text)
    asked = comparison.load(tmp_path / f"{name}.yaml")
    assert asked.cells == comparison.load(name).cells
    assert {"mezo", "mezo-lora"} <= {cell.label for cell in asked.cells}


def test_the_comparison_that_the_page_shows_is_one(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "compare.md").read_text()
    (text,) = re.findall(r"^```yml\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    (tmp_path / "compare.yaml").write_text(text)
    assert len(comparison.load(tmp_path / "compare.yaml").cells) == 1 + 3 + 1 + 6 + 6


def test_the_papers_grids_are_the_papers() -> None:
    def rates(name: str, label: str) -> list[float]:
        return [cell.lr for cell in comparison.load(name).cells if cell.label == label and cell.lr is not None]

    assert rates("opt", "mezo") == [1e-6, 1e-7]
    assert rates("opt-written", "mezo") == [1e-6, 5e-7, 1e-7]
    assert rates("opt", "mezo-prefix") == [1e-2, 1e-3]
    assert rates("opt", "ft") == [1e-5, 5e-5, 8e-5]
    roberta = comparison.load("roberta").cells
    assert sorted({cell.recipe.task.split_seed for cell in roberta}) == [13, 21, 42, 87, 100]
    assert {(cell.recipe.train.batch_size, cell.recipe.train.steps) for cell in roberta if cell.label == "mezo"} == {
        (64, 100_000)
    }
    assert {cell.recipe.task.template for cell in roberta} == {None}  # the model is asked the task's own cloze


def test_an_example_that_there_is_not_is_refused(run: Run) -> None:
    assert run("recipe", "--example", "gpt") == (
        2,
        "",
        "error: --example: found 'gpt', expected opt, opt-written, roberta\n",
    )
