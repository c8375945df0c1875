"""Prompts are run once where a model was measured to give the same so, and answer by answer everywhere else."""

import random
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, MistralConfig

from mezo_scale import models
from mezo_scale.distributed.layout import Strategy
from mezo_scale.distributed.world import World
from mezo_scale.models import Loaded
from mezo_scale.recipe import TaskSection, parse
from mezo_scale.runs.evaluate import evaluate
from mezo_scale.tasks.kinds.candidates import Candidates, Encoded
from tests.support import material
from tests.support.pool import Ranks

SIZES = {
    "hidden_size": 32,
    "d_model": 32,
    "num_hidden_layers": 2,
    "n_layers": 2,
    "num_attention_heads": 4,
    "n_heads": 4,
    "intermediate_size": 48,
}


def rows(count: int, longest: int = 12, seed: int = 0) -> list[Encoded]:
    """Prompts of 3 to `longest` tokens with 2 to 5 candidates of 1 to 4 tokens that differ."""
    draw = random.Random(seed)

    def tokens(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw.randrange(5, 290) for _ in range(draw.randint(low, high)))

    return [
        Encoded(tokens(3, longest), tuple(dict.fromkeys(tokens(1, 4) for _ in range(draw.randint(2, 5)))), 0)
        for _ in range(count)
    ]


def kind(*, plain: bool = False) -> Candidates:
    tokenizer = material.tokenizer()
    tokenizer.pad_token_id = 0
    made = Candidates(tokenizer, TaskSection(data="d", max_length=32))
    made.sharing.refused = plain
    return made


def loaded(model: nn.Module) -> Loaded:
    return Loaded(model, material.tokenizer(), torch.device("cpu"), Strategy("single"))


def of_family(config: Any) -> nn.Module:
    return material.with_large_weights(lambda: AutoModelForCausalLM.from_config(config), 0)


@contextmanager
def counting(model: nn.Module) -> Iterator[list[tuple[int, ...]]]:
    """The shapes of the masks that the model is called with."""
    shapes: list[tuple[int, ...]] = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["attention_mask"].shape)), with_kwargs=True
    )
    yield shapes
    handle.remove()


def losses(model: nn.Module, made: Candidates, given: Sequence[Encoded], batch: int = 4) -> tuple[float, float]:
    found = evaluate(loaded(model), made, given, batch).metrics
    assert found["loss"].value is not None
    assert found["accuracy"].value is not None
    return found["loss"].value, found["accuracy"].value


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_evaluations_share_prompts_and_give_the_same(name: str) -> None:
    model, given = material.build(name), rows(13)
    with counting(model) as shapes:
        shared = losses(model, kind(), given)
    assert [len(shape) for shape in shapes] == [2, 4] * ((len(shapes) - 4) // 2) + [4] * 4  # compared, then evaluated
    assert all(shape[0] <= 4 for shape in shapes if len(shape) == 4)
    assert shared == pytest.approx(losses(model, kind(plain=True), given), abs=1e-5)


def test_what_was_measured_is_not_measured_again_and_longer_rows_are() -> None:
    model, made = material.build("llama"), kind()
    with counting(model) as shapes:
        losses(model, made, rows(4))
        shapes.clear()
        losses(model, made, rows(4))
        assert [len(shape) for shape in shapes] == [4]
        shapes.clear()
        losses(model, made, rows(4, longest=24))
        assert [len(shape) for shape in shapes][-1] == 4
        assert 2 in map(len, shapes)


@pytest.mark.parametrize("family", ["bloom", "mpt", "mamba", "window", "deaf"])
def test_a_model_to_which_a_tree_is_another_text_keeps_the_plain_way_and_says_so_once(family: str) -> None:
    if family == "window":  # attention that ends 6 tokens back
        model = of_family(MistralConfig(vocab_size=301, num_key_value_heads=2, sliding_window=6, **SIZES))
    elif family == "deaf":  # takes positions and counts its own
        model = material.build("llama")
        model.model.register_forward_pre_hook(
            lambda module, args, kwargs: (args, kwargs | {"position_ids": None}), with_kwargs=True
        )
    else:
        model = of_family(AutoConfig.for_model(family, vocab_size=301, max_position_embeddings=80, **SIZES))
    given, made = rows(9), kind()
    with pytest.warns(UserWarning, match="the model can't run a prompt once for all answers to it") as said:
        found = losses(model, made, given)
    assert len(said) == 1
    assert found == losses(model, kind(plain=True), given)
    assert found == losses(model, made, given)  # without a word


def test_a_window_that_no_row_reaches_beyond_changes_nothing() -> None:
    model = of_family(MistralConfig(vocab_size=301, num_key_value_heads=2, sliding_window=17, **SIZES))
    made = kind()
    losses(model, made, rows(9))
    assert made.sharing.covers(rows(9))
    with pytest.warns(UserWarning, match="scores differ by"):
        losses(model, made, rows(9, longest=28))
    assert not made.sharing.covers(rows(9))


def test_16_bits_differ_by_rounding_only() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        model = material.build("llama").to(dtype)
        made = kind()
        with counting(model) as shapes:
            evaluate(Loaded(model, None, torch.device("cpu"), Strategy("single"), precision=dtype), made, rows(9), 4)
        assert len(shapes[-1]) == 4


def test_where_no_score_is_finite_nothing_is_said_of_prompts() -> None:
    model, made = material.build("llama"), kind()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(Exception, match="have scores that are not finite"):
        evaluate(loaded(model), made, rows(4), 2)
    assert not made.sharing.refused


def over_ranks(folder: str, strategy: str, *, breaks: bool) -> tuple[float, float, list[int], int]:
    """(loss, accuracy, dims of the masks of the last evaluation, warnings) on this rank."""
    rank, size = dist.get_rank(), dist.get_world_size()
    world = World(rank, rank, size, size, torch.device("cpu"))
    recipe = parse({"model": {"name": folder}, "task": {"data": "none"}, "sharding": {"strategy": strategy}})
    found = models.load(recipe, world)
    if breaks:  # in the middle of a forward pass, where gathered weights are in use
        layer: nn.Module = found.model.get_submodule("model.layers.1")

        def refuse(module: nn.Module, args: Any, kwargs: Any) -> None:
            mask = kwargs.get("attention_mask")
            if isinstance(mask, torch.Tensor) and mask.is_floating_point():
                raise ValueError("no such mask")

        layer.register_forward_pre_hook(refuse, with_kwargs=True)
    made = kind()
    with counting(found.model) as shapes, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        evaluate(found, made, rows(9), 2)
        shapes.clear()
        score = evaluate(found, made, rows(9), 2)
    prompts = [warning for warning in said if "run a prompt once" in str(warning.message)]
    loss, accuracy = (score.metrics[name].value for name in ("loss", "accuracy"))
    assert loss is not None
    assert accuracy is not None
    return loss, accuracy, [len(shape) for shape in shapes], len(prompts)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero3"])
def test_ranks_share_prompts_together_or_not_at_all(ranks: Ranks, tmp_path: Path, strategy: str) -> None:
    folder = material.write_model("llama", tmp_path / "llama")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    expected = losses(model, kind(plain=True), rows(9))
    for breaks, dims in ((False, 4), (True, 2)):
        found = ranks(2, over_ranks, folder=str(folder), strategy=strategy, breaks=breaks)
        assert [one[3] for one in found] == [int(breaks), 0]
        for loss, accuracy, shapes, _ in found:
            assert (loss, accuracy) == pytest.approx(expected, abs=1e-5)
            assert shapes == [dims] * 3
