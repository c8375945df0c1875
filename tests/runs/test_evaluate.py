"""Evaluations: what is counted, and how sure one can be of it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from mezo_scale import collectives
from mezo_scale.distributed.layout import Strategy
from mezo_scale.distributed.world import World
from mezo_scale.models import Loaded
from mezo_scale.optim.mezo import MeZO
from mezo_scale.recipe import TaskSection
from mezo_scale.runs.console import Screen
from mezo_scale.runs.evaluate import evaluate, replay_if_begun
from mezo_scale.tasks import Passage
from mezo_scale.tasks.kinds.candidates import Candidates, Encoded
from mezo_scale.tasks.kinds.modeling import Block, Modeling
from tests.support import layouts, material
from tests.support.pool import Ranks
from tests.tasks.test_objectives import by_hand


@torch.no_grad()
def test_every_example_counts_once_whatever_the_batch_size() -> None:
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(5, 250, (count,), generator=generator).tolist())

    examples = [Encoded(tokens(2 + n % 5), ((7,), (8,)), n % 2) for n in range(11)]
    loaded = Loaded(material.build("llama"), material.tokenizer(), torch.device("cpu"), Strategy("single"))
    loaded.processor.pad_token_id = 0
    kind = Candidates(loaded.processor, TaskSection(data="d"))
    scores = [by_hand(loaded.model, example) for example in examples]
    right = sum((score[1] > score[0]) == example.label for score, example in zip(scores, examples, strict=True))
    for batch_size in (1, 4, 50):
        found = evaluate(loaded, kind, examples, batch_size).metrics
        assert (found["accuracy"].n, found["accuracy"].total) == (11, right)
        assert found["loss"].value == pytest.approx(
            evaluate(loaded, kind, examples, 11).metrics["loss"].value, rel=1e-5
        )


def perplexity(layout: str) -> tuple[float, int]:
    """Of 23 blocks, the last of them short, on the ranks that there are."""
    size, text = dist.get_world_size(), " ".join(text for text, _ in material.reviews())
    tokenizer = material.tokenizer()
    tokenizer.pad_token_id = 0
    kind = Modeling(tokenizer, TaskSection(name="wikitext", data="d", max_length=16))
    blocks = kind.encode_all([Passage(text)])[:22]
    sharded = layouts.shard(layout, material.build("llama"))
    strategy = Strategy("single") if size == 1 else Strategy(layout, shard=size)
    loaded = Loaded(sharded.model, tokenizer, torch.device("cpu"), strategy)
    found = evaluate(loaded, kind, [*blocks, Block(blocks[0].tokens[:5])], 4).metrics["perplexity"]
    sharded.close()
    return found.value, found.n


def test_ranks_come_to_the_perplexity_of_one(ranks: Ranks) -> None:
    ((alone, count),) = ranks(1, perplexity, layout="plain")
    assert count == 23
    for size, layout in ((3, "fsdp2"), (2, "zero3")):
        for found in ranks(size, perplexity, layout=layout):
            assert found == (pytest.approx(alone, rel=1e-5), 23)


def steps_replayed(runs: list[str], until: int | None) -> int:
    """As on nodes that do not share a disk: each rank looks in a folder of its own."""
    screen = Screen(World.from_environment())
    return replay_if_begun(material.build("llama"), Path(runs[collectives.rank()]), until, screen)


def test_rank_0_decides_for_all_whether_there_is_a_run_to_replay(ranks: Ranks, tmp_path: Path) -> None:
    there, nowhere = tmp_path / "trajectory.mezo", tmp_path / "nowhere"
    model = material.build("llama")
    optimizer = MeZO(model, trajectory=there)
    for _ in range(2):
        optimizer.step(lambda: model(torch.tensor([[5, 6]])).logits.square().mean())
    for runs, until, steps in (((there, nowhere), None, 2), ((nowhere, there), None, 0), ((there, nowhere), 0, 0)):
        assert ranks(2, steps_replayed, runs=list(map(str, runs)), until=until, timeout_s=60) == [steps, steps]


def test_the_majority_baseline_answers_with_the_train_splits_label() -> None:
    example = Encoded((5,), ((7,), (8,)), 0)
    train = [replace(example, label=label) for label in (1, 1, 0)]
    test = [replace(example, label=label) for label in (1, 0, 0, 0)]
    found = Candidates(material.tokenizer(), TaskSection(data="d")).baselines(train, test)["majority"]
    assert (found.metrics["accuracy"].total, found.count) == (1, 4)
