"""Tokens and batches: what a candidate's tokens are, what is padded, and which rows make up a step."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mezo_scale.errors import RecipeError
from mezo_scale.tasks import Example
from mezo_scale.tasks.kinds.candidates import Encoded, collate, encode
from mezo_scale.tasks.order import share, step_indices
from tests.support import material

EXAMPLE = Example("the plot is dull , and that is all It was", (" terrible", " great"), 0)


def test_prompt_and_candidate_together_are_the_tokens_of_the_text() -> None:
    tokenizer = material.tokenizer()
    encoded = encode(EXAMPLE, tokenizer, 64)
    assert tokenizer.decode(encoded.prompt) == EXAMPLE.prompt
    assert [tokenizer.decode(candidate) for candidate in encoded.candidates] == [" terrible", " great"]
    assert list(encoded.prompt + encoded.candidates[1]) == tokenizer(EXAMPLE.prompt + " great")["input_ids"]


def test_a_long_prompt_loses_its_beginning() -> None:
    tokenizer = material.tokenizer()
    whole = encode(EXAMPLE, tokenizer, 64)
    short = encode(EXAMPLE, tokenizer, 8)
    assert short.length == 8
    assert short.prompt == whole.prompt[-7:]
    assert short.candidates == whole.candidates


class WithEnds:
    """A tokenizer that puts a token before, and one after every text."""

    bos_token_id, eos_token_id = 1, 2

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        letters = [ord(letter) for letter in text]
        return {"input_ids": [1, *letters, 2] if add_special_tokens else letters}


def test_a_token_before_the_text_stays_and_one_after_it_goes() -> None:
    encoded = encode(Example("abcdefgh", ("xy", "z"), 1), WithEnds(), 8)
    assert encoded.prompt == (1, *map(ord, "defgh"))
    assert encoded.candidates == (tuple(map(ord, "xy")), (ord("z"),))


@pytest.mark.parametrize(
    ("candidates", "said"),
    [
        (("x" * 7, "y"), r"tokens, expected between 1 and task.max_length \(8\) - 2"),
        (("x", ""), r"task\.candidates \['x', ''\]: '' adds no tokens to the prompt, expected at least 1"),
        (("x", "y", "x"), "two of them are the same tokens to this model"),
    ],
)
def test_candidates_without_room_or_tokens_of_their_own_are_refused(candidates: tuple[str, ...], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        encode(Example("abc", candidates, 0), WithEnds(), 8)


PADDING = [0] * 13  # of three tokens to sixteen


@given(st.lists(st.integers(1, 70), min_size=1, max_size=5), st.integers(1, 3))
def test_batches_have_few_widths_and_none_is_wider_than_a_model_has_positions(
    lengths: list[int], candidate: int
) -> None:
    examples = [Encoded((5,) * length, ((7,) * candidate, (8,) * candidate), 0) for length in lengths]
    longest = max(lengths) + (candidate if candidate > 1 else 0)
    assert collate(examples, pad_id=0)["input_ids"].shape[-1] == -(-longest // 16) * 16
    capped = collate(examples, pad_id=0, max_length=73)
    assert capped["input_ids"].shape[-1] == min(73, -(-longest // 16) * 16)
    assert capped["attention_mask"].sum(-1).max() == longest


def test_candidates_of_one_token_need_only_the_prompt_run() -> None:
    batch = collate([Encoded((5, 6, 7), ((8,), (9,)), 1), Encoded((5,), ((8,),), 0)], pad_id=0)
    assert batch["input_ids"].tolist() == [[*PADDING, 5, 6, 7], [*PADDING, 0, 0, 5]]
    assert batch["attention_mask"].tolist() == [[*PADDING, 1, 1, 1], [*PADDING, 0, 0, 1]]
    assert batch["candidate_ids"].tolist() == [[8, 9], [8, -1]]
    assert batch["label"].tolist() == [1, 0]


def test_longer_candidates_are_written_out_inside_their_row() -> None:
    batch = collate([Encoded((5, 6), ((8,), (9, 9)), 1), Encoded((5,), ((8,),), 0)], pad_id=0, max_length=4)
    assert batch["input_ids"].tolist() == [[[0, 5, 6, 8], [5, 6, 9, 9]], [[0, 0, 5, 8], [0, 0, 5, 8]]]
    assert batch["candidate_mask"].int().tolist() == [[[0, 0, 0, 1], [0, 0, 1, 1]], [[0, 0, 0, 1], [0, 0, 0, 0]]]
    assert {tensor.shape[0] for tensor in batch.values()} == {2}
    assert torch.equal(batch["attention_mask"].bool(), batch["input_ids"] > 0)


@given(st.integers(0, 2**63 - 1), st.integers(1, 40), st.integers(1, 25))
def test_every_epoch_takes_every_example_once_whatever_the_batch(seed: int, count: int, batch_size: int) -> None:
    steps = -(-2 * count // batch_size)
    taken = np.concatenate([step_indices(seed, step, count, batch_size) for step in range(steps)])
    for epoch in range(2):
        assert sorted(taken[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_the_rows_of_a_step_depend_on_seed_and_step_alone() -> None:
    late_first = [step_indices(3, step, 50, 8).tolist() for step in (9, 2)]
    assert [step_indices(3, step, 50, 8).tolist() for step in range(10)][2] == late_first[1]
    assert step_indices(3, 9, 50, 8).tolist() == late_first[0]
    assert step_indices(4, 9, 50, 8).tolist() != late_first[0]


@given(st.integers(1, 30), st.integers(1, 12))
def test_the_ranks_share_a_step_out_evenly_and_leave_nothing(rows: int, size: int) -> None:
    parts = [share(np.arange(rows), rank, size) for rank in range(size)]
    assert np.concatenate(parts).tolist() == list(range(rows))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
