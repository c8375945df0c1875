"""Splits in a model's tokens: the same on every rank, and no longer than the model has positions for."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import AutoConfig

from mezo_scale import tasks
from mezo_scale.distributed.preflight import RankInfo
from mezo_scale.distributed.world import World
from mezo_scale.errors import RecipeError, SharedError
from mezo_scale.recipe import Recipe
from mezo_scale.runs.evaluate import evaluate_recipe
from mezo_scale.runs.session import train
from mezo_scale.runs.splits import EncodedSplits, _table_length, prepare
from mezo_scale.tasks.kinds.candidates import Encoded
from tests.support import material, questions
from tests.support.fixtures import ROOT
from tests.support.launch import BIN, Launch
from tests.support.pool import Ranks

EXAMPLES = [Encoded((5, 6, 7), ((8,), (9,)), 1), Encoded((5, 6), ((8,), (9, 4)), 0)]
SPLITS = EncodedSplits(EXAMPLES, EXAMPLES[:1], EXAMPLES[1:])


@pytest.mark.parametrize(
    "other",
    [
        EncodedSplits(EXAMPLES[::-1], EXAMPLES[:1], EXAMPLES[1:]),
        EncodedSplits(EXAMPLES, EXAMPLES[1:], EXAMPLES[:1]),
        EncodedSplits(EXAMPLES, EXAMPLES[:1], [replace(EXAMPLES[1], label=1)]),
        EncodedSplits(EXAMPLES, EXAMPLES[:1], [replace(EXAMPLES[1], prompt=(5,), candidates=((6, 8), (6, 9, 4)))]),
        EncodedSplits(EXAMPLES, EXAMPLES[:1], []),
    ],
)
def test_a_digest_covers_order_tokens_labels_and_where_the_answer_begins(other: EncodedSplits) -> None:
    assert other.digest() != SPLITS.digest()
    assert EncodedSplits(*([replace(one) for one in part] for part in (EXAMPLES, EXAMPLES[:1], EXAMPLES[1:]))) == SPLITS


def test_a_digest_never_changes() -> None:
    assert SPLITS.digest() == 5529460282231058941
    assert -(2**63) <= SPLITS.digest() < 2**63


def compared(lacking: list[int], hosts: list[str]) -> str | None:
    """What a rank hears if those in `lacking` have one example less."""
    rank, size = dist.get_rank(), dist.get_world_size()
    infos = tuple(RankInfo(host, n, "cpu", "", 0.0, "", {}) for n, host in enumerate(hosts))
    world = World(rank, rank, size, size, torch.device("cpu"), ranks=infos)
    splits = replace(SPLITS, train=EXAMPLES[: 1 if rank in lacking else 2])
    try:
        splits.check_same(world)
    except SharedError as error:
        return str(error)
    return None


def test_ranks_with_other_examples_are_named_by_all(ranks: Ranks) -> None:
    assert ranks(2, compared, lacking=[], hosts=[]) == [None, None]
    (said,) = set(ranks(2, compared, lacking=[1], hosts=["a", "b"]))
    assert said is not None
    assert said.startswith("task.data: rank 1 on b found other examples or tokens than rank 0 on a: give all nodes")
    (said,) = set(ranks(3, compared, lacking=[1, 2], hosts=[]))
    assert said is not None
    assert said.startswith("task.data: rank 1, rank 2 found other examples or tokens than rank 0: give")


def test_two_nodes_with_different_files_stop_with_one_line(launch: Launch, recipe_file: Path, tmp_path: Path) -> None:
    lines = material.write_reviews(tmp_path / "all.csv").read_text().splitlines(keepends=True)
    for rank, rows in (("0", lines), ("1", lines[:-1])):  # as on two nodes with disks of their own
        (tmp_path / rank).mkdir()
        (tmp_path / rank / "data.csv").write_text("".join(rows))
    python = f'cd {tmp_path}/$RANK && PYTHONPATH={ROOT} exec {sys.executable} -m mezo_scale.cli "$@"'
    torchrun = (BIN / "torchrun", "--standalone", "--nproc-per-node", "2", "--no-python", "bash", "-c", python, "bash")
    done = launch(*torchrun, "train", recipe_file, "task.data=./data.csv", "strategy=fsdp2")
    assert done.code != 0
    assert done.output.count("error: task.data: rank 1 on ") == 1
    assert done.output.count("error: ") == 1
    assert "exitcode  : 2" in done.output
    assert not (tmp_path / "run").exists()


def test_a_table_of_positions_is_found_whatever_its_name() -> None:
    lengths = {"gpt2": 80, "opt": 80, "llama": None, "mixtral": None}
    assert {name: _table_length(material.CONFIGS[name]) for name in lengths} == lengths
    made = {"roberta": 510, "gptj": 2048, "ctrl": 256, "pegasus": 1024, "bloom": None, "xglm": None, "cpmant": None}
    assert {name: _table_length(AutoConfig.for_model(name)) for name in made} == made


@pytest.mark.parametrize("name", ["gpt2", "opt"])
@pytest.mark.parametrize("call", [train, lambda recipe: evaluate_recipe(recipe, "test", None)])
def test_sequences_longer_than_the_positions_are_refused_before_anything_is_written(
    make_recipe: Callable[..., Recipe], tmp_path: Path, name: str, call: Callable[[Recipe], object]
) -> None:
    folder = material.write_model(name, tmp_path / "model")
    recipe = make_recipe("max_length=81", f"model.name={folder}")
    with pytest.raises(
        RecipeError, match=r"max_length is 81, but .*model has 80 positions: ask for at most task\.max_length=80"
    ):
        call(recipe)
    assert not Path(recipe.output.dir).exists()
    assert EncodedSplits.read(*prepare(make_recipe("max_length=80", f"model.name={folder}"))).test


def test_a_model_that_computes_its_positions_takes_longer_sequences(make_recipe: Callable[..., Recipe]) -> None:
    recipe = make_recipe("max_length=100000")
    assert len(EncodedSplits.read(*prepare(recipe)).test) == 32


@pytest.mark.parametrize("call", [train, lambda recipe: evaluate_recipe(recipe, "test", None)])
def test_a_run_says_how_many_prompts_lost_their_beginning(
    make_recipe: Callable[..., Recipe], call: Callable[[Recipe], object], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe("max_length=18", "steps=1")
    _, kind = prepare(recipe)
    _, wide = prepare(make_recipe("max_length=100000"))
    test = tasks.load(recipe.task).test
    cut = sum(kind.length(kind.encode(one)) < wide.length(wide.encode(one)) for one in test)
    assert 0 < cut < len(test)
    call(recipe)
    said = [line for line in capsys.readouterr().out.splitlines() if "task.max_length=18" in line]
    assert len(said) == 1
    assert f"{cut} of 32 test prompts" in said[0]


def test_answers_that_no_written_text_can_hold_are_counted(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    folder = questions.write(tmp_path / "squad")
    for max_new_tokens, words in ((1, ["is too small for a right answer to 10 of 10 test prompts"]), (30, [])):
        recipe, kind = prepare(
            make_recipe("task.name=squad", f"task.data={folder}", "max_length=500", f"max_new_tokens={max_new_tokens}")
        )
        said = EncodedSplits.read(recipe, kind).remarks(kind, recipe, "test")
        assert [line.removeprefix("task.max_new_tokens ") for line in said] == words


def test_prompts_cut_to_make_room_for_what_is_written_count_and_whole_ones_are_not_spoken_of(
    make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    folder = questions.write(tmp_path / "squad")
    fixed = ("task.name=squad", f"task.data={folder}", "max_new_tokens=30")
    for max_length in (50, 500):
        recipe, kind = prepare(make_recipe(*fixed, f"max_length={max_length}"))
        rows = EncodedSplits.read(recipe, kind).test
        assert max(map(kind.length, rows)) < max_length
        assert [kind.is_cut(row) for row in rows] == [max_length == 50] * len(rows)
