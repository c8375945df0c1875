"""Candidates behind a prompt that is run once: the same scores as with the prompt before each of them."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import mezo_scale as ms
from mezo_scale.models import prefix
from mezo_scale.recipe import TaskSection
from mezo_scale.tasks.example import Example
from mezo_scale.tasks.kinds.candidates import OBJECTIVES, Candidates, Encoded, candidate_scores, collate
from mezo_scale.tasks.kinds.trees import Sharing, Tree, grow
from mezo_scale.tasks.kinds.trees import collate as collate_trees
from tests.support import material

MODELS = ("llama", "llama-untied", "opt", "gpt2", "mixtral")
WIDE = 64
ROWS = [
    Encoded((40, 41, 42, 43, 44), ((7,), (8, 6, 5), (8, 6), (8, 6, 4, 9), (11, 12)), 1),
    Encoded((50, 51), ((9, 9), (7, 5), (4,)), 2),
    Encoded((60,), ((20, 21, 22),), 0),
]
CASES = [
    (ROWS, WIDE),
    (ROWS, 10),  # a row in several trees, others with one
    (ROWS, 1),  # every candidate alone
    (ROWS[:1], WIDE),
    ([Encoded((5, 6), ((7,), (8,)), 0), ROWS[0]], WIDE),  # one with single tokens only
]


def test_beginnings_that_candidates_share_stand_once() -> None:
    assert grow([(1, 2, 3), (1, 2), (1, 5), (2, 3)], 20) == [
        Tree((1, 2, 3, 5, 2, 3), (-1, 0, 1, 0, -1, 4), {0: (0, 1, 2), 1: (0, 1), 2: (0, 3), 3: (4, 5)})
    ]


def test_candidates_that_do_not_fit_one_tree_go_on_in_another() -> None:
    assert grow([(1, 2, 3), (1, 4), (5,), (6, 7, 8, 9, 10)], 4) == [
        Tree((1, 2, 3, 4), (-1, 0, 1, 0), {0: (0, 1, 2), 1: (0, 3)}),
        Tree((5,), (-1,), {2: (0,)}),
        Tree((6, 7, 8, 9, 10), (-1, 0, 1, 2, 3), {3: (0, 1, 2, 3, 4)}),
    ]


def test_a_token_attends_to_its_own_branch_and_to_the_prompt() -> None:
    batch = collate_trees([Encoded((40, 41), ((7, 8), (7, 9)), 1)], 0, WIDE)
    assert {name: tuple(leaf.shape) for name, leaf in batch.items()} == {
        "input_ids": (1, 1, 16),
        "position_ids": (1, 1, 16),
        "attends": (1, 1, 16, 16),
        "before": (1, 1, 3),
        "paths": (1, 1, 2, 3),
        "label": (1,),
    }
    assert batch["input_ids"][0, 0].tolist() == [0] * 11 + [40, 41, 7, 8, 9]
    assert batch["position_ids"][0, 0, 11:].tolist() == [0, 1, 2, 3, 3]
    assert batch["attends"][0, 0, 11:, 11:].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 1, 0, 1],
    ]
    padding = batch["attends"][0, 0]
    assert torch.equal(padding[:11], torch.eye(16, dtype=torch.bool)[:11])
    assert not padding[11:, :11].any()


@pytest.mark.parametrize(("rows", "widest"), CASES, ids=["one tree", "some", "apart", "one row", "short"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_scores_are_those_of_the_plain_way(name: str, rows: list[Encoded], widest: int) -> None:
    model = material.build(name)
    plain = candidate_scores(model, collate(rows, pad_id=0))
    shared = candidate_scores(model, collate_trees(rows, 0, widest))
    assert shared.dtype == torch.float32
    torch.testing.assert_close(shared, plain, atol=1e-5, rtol=0)
    torch.testing.assert_close(candidate_scores(model, collate_trees(rows, 0, widest, 50)), plain, atol=1e-5, rtol=0)


@torch.no_grad()
def test_eager_attention_gives_the_same() -> None:
    model = material.build("llama")
    plain = candidate_scores(model, collate(ROWS, pad_id=0))
    model.set_attn_implementation("eager")
    torch.testing.assert_close(candidate_scores(model, collate_trees(ROWS, 0, WIDE)), plain, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_prefix_stands_before_the_tree(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(material.write_model("llama", tmp_path / "base")).eval()
    bare = candidate_scores(model, collate(ROWS, pad_id=0))
    states = prefix.activations(model, 5, 7, torch.device("cpu"))
    config = prefix.config_for(states, str(tmp_path / "base"))
    prefix.attach_(model, config, torch.device("cpu"), torch.float32, torch.float32)
    prefix.weight(model).copy_(prefix.flat(states))
    plain = candidate_scores(model, collate(ROWS, pad_id=0))
    assert not torch.allclose(plain, bare, atol=1e-2)
    torch.testing.assert_close(candidate_scores(model, collate_trees(ROWS, 0, WIDE)), plain, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
@torch.no_grad()
def test_in_all_branches_of_a_step_at_once_too(name: str) -> None:
    model, branches = material.build(name), [(11, 1e-2), (11, -1e-2), (12, 1e-2)]
    tall = {
        key: torch.cat([leaf] * len(branches)) for key, leaf in collate_trees(ROWS, 0, 10).items()
    }  # as the optimizer repeats it
    with ms.perturbed(model, branches):
        together = OBJECTIVES["candidates"](model, tall).view(len(branches), -1)
    for branch, losses in zip(branches, together, strict=True):
        with ms.perturbed(model, [branch]):
            apart = OBJECTIVES["candidates"](model, collate(ROWS, pad_id=0))
        torch.testing.assert_close(losses, apart, atol=1e-5, rtol=0)
    assert not torch.allclose(together[0], together[1])


@torch.no_grad()
def test_what_was_cut_and_what_follows_an_entity_stay_as_they_are() -> None:
    """As in ReCoRD: candidates are whole sentences that may begin alike, and the prompt loses its beginning."""
    model, tokenizer = material.build("llama"), material.tokenizer()
    tokenizer.pad_token_id = 0
    kind = Candidates(tokenizer, TaskSection(data="d", max_length=40))
    texts = tuple(f" this film is moving , and {name} is dull" for name in ("the plot", "its cast", "the ending"))
    row = kind.encode(Example("every scene is dull , and i left early . " * 4, texts, 2))
    assert (row.length, len(row.candidates[0])) == (40, len(tokenizer(texts[0])["input_ids"]))
    plain = candidate_scores(model, kind.collate([row]))
    kind.sharing.settle([row], same=True)
    batch = kind.collate([row])
    assert batch["input_ids"].shape[:2] == (1, 1)
    assert "attends" not in kind.collate([row], "candidates")  # of a step
    assert int(batch["paths"].any(2).sum()) < sum(map(len, row.candidates))
    torch.testing.assert_close(candidate_scores(model, batch), plain, atol=1e-5, rtol=0)


def test_only_rows_within_what_was_measured_are_shared() -> None:
    short, long, wide = (
        Encoded((40,) * prompt, tuple((n, 6) for n in range(10, 10 + count)), 0)
        for prompt, count in ((4, 2), (9, 2), (4, 8))
    )
    alone = Encoded((40,) * 30, ((7,), (8,)), 0)
    sharing = Sharing(24)
    assert not sharing.covers([short])
    assert sharing.unmeasured([short, alone]) == [alone, short]
    assert sharing.unmeasured([short, wide, long]) == [long, wide]
    sharing.settle([short], same=True)
    assert sharing.covers([short])
    assert not sharing.covers([short, long])
    assert not sharing.covers([short, wide])
    assert sharing.unmeasured([short]) == []
    assert sharing.unmeasured([short, wide]) == [short, wide]
    sharing.settle([long, wide], same=True)
    assert sharing.covers([short, long, wide])
    assert not sharing.covers([short, alone])
    sharing.settle([alone], same=False)
    assert not sharing.covers([short])
    assert sharing.unmeasured([short, alone]) == []


@pytest.mark.parametrize("candidates", [((7,), (8,)), ((7, 8, 9),)], ids=["single tokens", "one candidate"])
def test_where_nothing_would_be_shared_nothing_is_measured(candidates: tuple[tuple[int, ...], ...]) -> None:
    rows = [Encoded((40, 41), candidates, 0)]
    sharing = Sharing(24)
    assert sharing.unmeasured(rows) == []
    sharing.settle(rows, same=True)
    assert not sharing.covers(rows)


@torch.no_grad()
def test_the_real_model_gives_the_same(demo: Path) -> None:
    model: nn.Module = AutoModelForCausalLM.from_pretrained(demo / "model", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(demo / "model")
    kind = Candidates(tokenizer, TaskSection(data="d", max_length=96))
    names = ("Orla", "Brem", "the keeper of the lamp", "New Brem", "New Brem Harbour")
    story = "The lamp of Brem burns oil, and Orla keeps it.\n- The harbour is dark without it\n-"
    rows = [
        kind.encode(Example(story, tuple(f" Nobody saw what {name} did that night" for name in names), 0)),
        kind.encode(Example("The lamp went out because", (" the oil was gone.", " I lit it."), 0)),
    ]
    plain = candidate_scores(model, collate(rows, tokenizer.pad_token_id))
    for widest in (192, 48):
        shared = candidate_scores(model, collate_trees(rows, tokenizer.pad_token_id, widest))
        torch.testing.assert_close(shared, plain, atol=1e-5, rtol=0)
    with ms.perturbed(model, [(3, 1e-3), (3, -1e-3)]):
        batch = {name: torch.cat([leaf] * 2) for name, leaf in collate_trees(rows, 0, 192).items()}
        together = OBJECTIVES["candidates"](model, batch)
    for number, sign in enumerate((1e-3, -1e-3)):
        with ms.perturbed(model, [(3, sign)]):
            apart = OBJECTIVES["candidates"](model, collate(rows, 0))
        torch.testing.assert_close(together[2 * number : 2 * number + 2], apart, atol=2e-5, rtol=0)
