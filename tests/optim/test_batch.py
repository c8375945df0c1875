"""Rows of a batch, whatever they are kept in: a row never meets another row's answer."""

import collections
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BatchEncoding

import mezo_scale as ms
from mezo_scale.optim import batch
from tests.support import models

IDS = torch.arange(12).view(4, 3)
ROWS = {
    "a tensor": torch.arange(4),
    "a bool array": np.array([True, False, False, True]),
    "a list": ["a", "b", "c", "d"],
    "a tuple": ("a", "b", "c", "d"),
    "lists in a list": [[1], [], [2, 3], [4]],
}


def plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor | np.ndarray) else value


@pytest.mark.parametrize("kind", ROWS)
def test_rows_of_every_kind_are_repeated_and_taken_alike(kind: str) -> None:
    given = {"ids": IDS, "nested": {"answers": ROWS[kind]}}
    values = plain(ROWS[kind])
    assert batch.rows(given) == 4
    assert plain(batch.repeat(given, 3)["nested"]["answers"]) == values * 3
    assert plain(batch.take(given, 1, 3)["nested"]["answers"]) == values[1:3]
    assert type(batch.repeat(given, 2)["nested"]["answers"]) is type(ROWS[kind])
    assert torch.equal(batch.repeat(given, 2)["ids"], torch.cat([IDS, IDS]))


@pytest.mark.parametrize("value", ["four", b"four", None, 4, 4.0, torch.tensor(4), np.float32(4), np.array(4), int])
def test_what_belongs_to_all_rows_passes_whole(value: Any) -> None:
    given = {"ids": IDS, "value": value}
    assert batch.rows(given) == 4
    assert batch.repeat(given, 2)["value"] is value
    assert batch.take(given, 0, 2)["value"] is value


@dataclasses.dataclass
class Record:
    ids: Tensor


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1, 2, 3], r"batch\['extra'\]\['x'\] has 3 rows but batch\['ids'\] has 4"),
        ((), r"batch\['extra'\]\['x'\] has 0 rows but batch\['ids'\] has 4"),
        (np.ones(8), r"batch\['extra'\]\['x'\] has 8 rows"),
        (torch.eye(4).to_sparse(), r"batch\['extra'\]\['x'\] is a torch.Tensor, whose rows can't be told"),
        ({1, 2, 3, 4}, r"batch\['extra'\]\['x'\] is a builtins.set"),
        (iter([1, 2, 3, 4]), "list_iterator"),
        (collections.deque([1, 2, 3, 4]), "collections.deque"),
        (torch.Size([1, 2, 3, 4]), "torch.Size"),
        (Record(IDS), "Record"),
    ],
)
def test_rows_that_can_not_be_told_are_refused_by_their_key(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        batch.rows({"ids": IDS, "extra": {"x": value}})


@pytest.mark.parametrize("given", [IDS, [1, 2], None])
def test_a_batch_that_is_no_mapping_is_refused(given: Any) -> None:
    with pytest.raises(ValueError, match="expected a mapping of names"):
        batch.rows(given)


def test_a_batch_may_be_all_lists() -> None:
    assert batch.rows({"question": ["a", "b"], "answer": ["c", "d"]}) == 2
    with pytest.raises(ValueError, match=r"batch\['answer'\] has 1 rows but batch\['question'\] has 2"):
        batch.rows({"question": ["a", "b"], "answer": ["c"]})


@pytest.mark.parametrize("kind", [BatchEncoding, collections.UserDict, collections.OrderedDict])
def test_a_mapping_keeps_its_type(kind: Any) -> None:
    given = kind({"ids": IDS, "more": kind({"answers": [1, 2, 3, 4]})})
    for made in (batch.repeat(given, 2), batch.take(given, 0, 3)):
        assert type(made) is kind
        assert type(made["more"]) is kind
    assert batch.take(BatchEncoding({"ids": IDS}), 0, 1).to("cpu")["ids"].tolist() == [[0, 1, 2]]


def test_a_mapping_that_is_not_made_from_items_becomes_a_dict() -> None:
    given = collections.defaultdict(list, ids=IDS)
    assert type(batch.take(given, 0, 1)) is dict


def against_answers(model: nn.Module, rows: Any) -> Tensor:
    last = model(input_ids=rows["input_ids"], use_cache=False).logits[:, -1].float()
    pairs = zip(last, rows["answers"], strict=True)
    return torch.stack([F.cross_entropy(row, torch.as_tensor(answer)) for row, answer in pairs])


@pytest.mark.parametrize("micro_batch", [None, 1, 2, 3])
@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_a_row_meets_its_own_answer_in_every_piece(kind: Any, paired: bool, micro_batch: int | None) -> None:
    given = BatchEncoding({"input_ids": models.batch("llama", 4)["input_ids"], "answers": kind([3, 9, 14, 20])})
    whole = ms.MeZO(models.build("llama"), eps=1e-2, paired=False)
    cut = ms.MeZO(models.build("llama"), eps=1e-2, paired=paired)
    expected = whole.step(batch=given, objective=against_answers)
    assert cut.step(batch=given, objective=against_answers, micro_batch=micro_batch) == pytest.approx(expected, 1e-5)
