"""How a recipe learns: every estimator in a run, what contradicts it, and what is said before the first step."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mezo_scale.errors import MezoError, ModelError, RecipeError
from mezo_scale.recipe import Recipe, load
from mezo_scale.runs.session import train
from mezo_scale.runs.verify import verify
from mezo_scale.trajectory import Trajectory

MakeRecipe = Callable[..., Recipe]
GROUPED = ("estimator=grouped", "group_size=2", "balance=labels", "sort_window=3")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoint" / "model.safetensors")


@pytest.mark.parametrize("options", [GROUPED, ("estimator=one_sided", "num_directions=3")], ids=lambda given: given[0])
def test_a_run_of_any_estimator_in_two_sessions_is_the_run_in_one(
    make_recipe: MakeRecipe, tmp_path: Path, options: tuple[str, ...]
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(make_recipe(*options, "steps=4", "eval_every=0", f"output.dir={whole}"))
    train(make_recipe(*options, "steps=2", "eval_every=0", f"output.dir={parts}"))
    train(load(parts, ["steps=4"]))
    one, other = (Trajectory.open(run / "trajectory.mezo") for run in (whole, parts))
    assert one.records == other.records
    assert one.header.num_directions == 3
    assert one.header.estimator in ("grouped by 2", "one_sided")
    found, expected = weights(parts), weights(whole)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert f"{one.header.estimator}, 3 direction(s)" in (whole / "report.md").read_text()


def test_a_run_is_not_continued_with_other_groups_or_another_order(make_recipe: MakeRecipe) -> None:
    train(make_recipe(*GROUPED, "steps=1", "checkpoint=false"))
    for change, said in [
        ("group_size=6", "optimizer.group_size: 2, now 6"),
        ("balance=none", "train.balance: 'labels', now 'none'"),
        ("sort_window=0", "train.sort_window: 3, now 0"),
    ]:
        with pytest.raises(RecipeError, match=said):
            train(make_recipe(*GROUPED, "steps=2", change))
    train(make_recipe(*GROUPED, "steps=2", "check_eps=false", "checkpoint=false"))


def test_eps_is_checked_before_the_first_step_of_a_run_only(
    make_recipe: MakeRecipe, capsys: pytest.CaptureFixture[str]
) -> None:
    train(make_recipe("check_eps=true", "steps=1", "checkpoint=false"))
    assert "eps 0.001: rounding " in capsys.readouterr().out
    train(make_recipe("check_eps=true", "steps=2", "checkpoint=false"))
    assert "rounding" not in capsys.readouterr().out


def test_the_check_of_eps_changes_no_step(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    records = []
    for check in ("true", "false"):
        train(make_recipe(f"check_eps={check}", "checkpoint=false", f"output.dir={tmp_path / check}"))
        records.append(Trajectory.open(tmp_path / check / "trajectory.mezo").records)
    assert records[0] == records[1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["group_size=2"], "optimizer.group_size is 2, but optimizer.estimator is spsa, which has no groups"),
        (["estimator=grouped"], "optimizer.estimator is grouped, but there is no optimizer.group_size: give one"),
        (["estimator=grouped", "group_size=4"], "train.batch_size is 6, which optimizer.group_size 4 does not divide"),
        (["estimator=grouped", "group_size=2", "num_directions=3"], "num_directions is 3, but .* grouped"),
        (["estimator=one_sided"], "num_directions is 1, but optimizer.estimator is one_sided"),
        (
            ["estimator=grouped", "group_size=3", "balance=labels"],
            "2, but optimizer.group_size is 3: take a multiple of 2",
        ),
        (["batch_size=5", "balance=labels"], "2, but train.batch_size is 5: take a multiple of 2"),
        (["rank=2"], "optimizer.rank is 2, but optimizer.distribution is normal, which has no rank"),
        (["distribution=rademacher", "entries=signs"], "optimizer.entries is signs, but .* rademacher"),
    ],
)
def test_what_contradicts_the_estimator_or_the_noise_is_refused_before_anything_is_written(
    make_recipe: MakeRecipe, options: list[str], said: str
) -> None:
    recipe = make_recipe(*options)
    with pytest.raises(RecipeError, match=said) as error:
        train(recipe)
    assert "\n" not in str(error.value)
    assert not recipe.directory.exists()


def test_the_metrics_have_a_slope_per_group(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(*GROUPED, "steps=2", "eval_every=0", "checkpoint=false")
    train(recipe)
    lines: list[dict[str, Any]] = [
        json.loads(line) for line in (recipe.directory / "metrics.jsonl").read_text().splitlines()
    ]
    assert [len(line["projected_grads"]) for line in lines] == [3, 3]


def test_a_recipe_of_low_rank_directions_is_resumed_with_its_own_only(make_recipe: MakeRecipe) -> None:
    low_rank = ("distribution=low_rank", "rank=2", "entries=normal", "eval_every=0")
    recipe = make_recipe(*low_rank, "steps=2")
    train(recipe)
    train(load(recipe.directory, ["steps=3"]))
    log = Trajectory.open(recipe.directory / "trajectory.mezo")
    assert (log.header.distribution, log.header.noise_version, len(log)) == ("low_rank of rank 2 in normal", 2, 3)
    assert len(list(verify(recipe))) == 3
    for change, said in (("rank=3", "optimizer.rank: 2, now 3"), ("entries=signs", "optimizer.entries: 'normal', now")):
        with pytest.raises(RecipeError, match=said):
            train(make_recipe(*low_rank, "steps=4", change))


def test_a_rank_that_no_matrix_has_is_refused_with_both_numbers_before_anything_is_written(
    make_recipe: MakeRecipe,
) -> None:
    recipe = make_recipe("distribution=low_rank", "rank=4096")
    with pytest.raises(MezoError, match=r"rank is 4096, but a matrix of \d+ x \d+ has rank \d+ at most"):
        train(recipe)
    assert not (recipe.directory / "trajectory.mezo").exists()


def test_eps_auto_is_chosen_once_and_kept_by_the_log(
    make_recipe: MakeRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(make_recipe("eps=auto", "steps=4", "eval_every=0", f"output.dir={whole}"))
    shown = capsys.readouterr().out
    eps = Trajectory.open(whole / "trajectory.mezo").header.eps
    assert f"optimizer.eps: auto is {eps:g} in this run" in shown
    assert f"eps {eps:g}: rounding " in shown
    assert f"eps {eps:g}, " in (whole / "report.md").read_text()
    train(make_recipe("eps=auto", "steps=2", "eval_every=0", f"output.dir={parts}"))
    capsys.readouterr()
    train(load(parts, ["steps=4"]))
    assert "rounding" not in capsys.readouterr().out
    assert Trajectory.open(parts / "trajectory.mezo").records == Trajectory.open(whole / "trajectory.mezo").records
    assert verify(parts)
    same = make_recipe(f"eps={eps}", "steps=4", "eval_every=0", f"output.dir={tmp_path / 'said'}")
    train(same)
    assert (
        Trajectory.open(tmp_path / "said" / "trajectory.mezo").records
        == Trajectory.open(whole / "trajectory.mezo").records
    )


def test_eps_auto_needs_a_slope(make_recipe: MakeRecipe) -> None:
    with pytest.raises(MezoError, match="optimizer.eps is auto, but a score"):
        train(make_recipe("eps=auto", "objective=accuracy"))
    with pytest.raises(RecipeError, match="optimizer.eps"):
        make_recipe("eps=automatic")


def test_a_rank_that_no_matrix_has_is_refused_before_the_base_model_is_graded(
    make_recipe: MakeRecipe, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe("optimizer.distribution=low_rank", "optimizer.rank=1000")
    with pytest.raises(ModelError, match=r"embed.*: rank is 1000, but a matrix of .* take a rank of at most"):
        train(recipe)
    assert "zero-shot" not in capsys.readouterr().out
    assert not Path(recipe.output.dir).exists()
