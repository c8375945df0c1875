"""Wrong arguments: a ValueError that names the argument, before anything is written."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mezo_scale import noise

WHOLE = np.array([[0, 0, 6]])


def bfloat16(**changes: Any) -> dict[str, Any]:
    return {"local": torch.ones(6, dtype=torch.bfloat16), "remainder": torch.zeros(6, dtype=torch.int16)} | changes


@pytest.mark.parametrize(
    ("argument", "changes"),
    [
        ("local", {"local": torch.ones(6, dtype=torch.float64)}),
        ("local", {"local": torch.ones(6, dtype=torch.int8)}),
        ("local", {"local": torch.ones(12)[::2]}),
        ("local", {"local": torch.ones(2, 3)}),
        ("local", {"local": torch.ones(6, device="meta")}),
        ("runs", {"runs": np.array([[0, 0, 7]])}),
        ("runs", {"runs": np.array([[4, 0, 3]])}),
        ("runs", {"runs": np.array([[-1, 0, 3]])}),
        ("runs", {"runs": np.array([[0, 0, 3], [2, 9, 3]])}),
        ("runs", {"runs": np.array([[3, 9, 3], [0, 0, 4]])}),
        ("runs", {"runs": np.array([[0, 2**63 - 2, 3]])}),
        ("runs", {"runs": np.array([[0, 6]])}),
        ("runs", {"runs": np.array([[0.0, 0.0, 6.0]])}),
        ("param_id", {"param_id": -1}),
        ("param_id", {"param_id": 2**64}),
        ("param_id", {"param_id": "model.weight"}),
        ("seeds", {"seeds": [[-1]]}),
        ("seeds", {"seeds": [[2**64]]}),
        ("seeds", {"seeds": [[1.5]]}),
        ("seeds", {"seeds": np.array([[-1]])}),
        ("seeds", {"seeds": [[]], "alphas": [[]]}),
        ("seeds", {"seeds": [5]}),
        ("alphas", {"alphas": [[1.0, 2.0]]}),
        ("decays", {"decays": [1.0, 1.0]}),
        ("remainder", {"remainder": torch.zeros(6, dtype=torch.int16)}),
        ("remainder", bfloat16(remainder=torch.zeros(6, dtype=torch.int32))),
        ("remainder", bfloat16(remainder=torch.zeros(5, dtype=torch.int16))),
        ("remainder", bfloat16(remainder=torch.zeros(12, dtype=torch.int16)[::2])),
        ("remainder", bfloat16(remainder=torch.zeros(6, dtype=torch.int16, device="meta"))),
        ("rounding", {"rounding": "up"}),
        ("noise", {"noise": "rademacher"}),
    ],
)
def test_a_write_with_a_wrong_argument_names_it_and_writes_nothing(argument: str, changes: dict[str, Any]) -> None:
    work: dict[str, Any] = {"local": torch.ones(6), "runs": WHOLE, "param_id": 1}
    work |= {"seeds": [[5]], "alphas": [[1.0]], "decays": [1.0], **changes}
    before = {name: work[name].clone() for name in ("local", "remainder") if name in work}
    with pytest.raises(ValueError, match=rf"^{argument}\b"):
        noise.write_(**work)
    for name, tensor in before.items():
        if tensor.device.type != "meta":
            assert torch.equal(work[name], tensor)


@pytest.mark.parametrize(
    ("argument", "changes"),
    [
        ("weight", {"weight": torch.ones(2, 3, dtype=torch.float64)}),
        ("weight", {"weight": torch.ones(3, 2).T}),
        ("param_id", {"param_id": 1.0}),
        ("branches", {"branches": []}),
        ("branches", {"branches": [(-1, 1.0)]}),
        ("branches", {"branches": [(2**64, 1.0)]}),
        ("out", {"out": torch.zeros(2, 2, 3)}),
        ("out", {"out": torch.zeros(1, 3, 2)}),
        ("out", {"out": torch.zeros(1, 2, 3, dtype=torch.float64)}),
        ("out", {"out": torch.zeros(1, 3, 2).transpose(1, 2)}),
        ("out", {"out": torch.zeros(1, 2, 3, device="meta")}),
        ("runs", {"runs": np.array([[0, 0, 7]])}),
        ("noise", {"noise": "rademacher"}),
    ],
)
def test_a_view_with_a_wrong_argument_names_it_and_writes_nothing(argument: str, changes: dict[str, Any]) -> None:
    work: dict[str, Any] = {"weight": torch.ones(2, 3), "param_id": 1, "branches": [(5, 1.0)]}
    work |= {"out": torch.zeros(1, 2, 3), **changes}
    with pytest.raises(ValueError, match=rf"^{argument}\b"):
        noise.view(**work)
    assert work["out"].device.type == "meta" or not work["out"].any()


@pytest.mark.parametrize(
    ("argument", "changes"),
    [
        ("table", {"table": torch.ones(4, 3, dtype=torch.int64)}),
        ("table", {"table": torch.tensor(1.0)}),
        ("branches", {"branches": []}),
        ("ids", {"ids": torch.tensor([[0, 4]])}),
        ("ids", {"ids": torch.tensor([[-1, 0]])}),
        ("ids", {"ids": torch.tensor([0, 1])}),
        ("ids", {"ids": torch.tensor([[0, 1], [0, 1]])}),
        ("ids", {"ids": torch.tensor([[0, 1]], dtype=torch.int32)}),
        ("ids", {"ids": torch.zeros(1, 2, dtype=torch.int64, device="meta")}),
        ("out", {"out": torch.zeros(1, 3, 3)}),
        ("noise", {"noise": "rademacher"}),
    ],
)
def test_rows_with_a_wrong_argument_name_it_and_write_nothing(argument: str, changes: dict[str, Any]) -> None:
    work: dict[str, Any] = {"table": torch.ones(4, 3), "param_id": 1, "branches": [(5, 1.0)]}
    work |= {"ids": torch.tensor([[0, 3]]), "out": torch.zeros(1, 2, 3), **changes}
    with pytest.raises(ValueError, match=rf"^{argument}\b"):
        noise.rows(**work)
    assert not work["out"].any()


@pytest.mark.parametrize(("start", "count"), [(-1, 4), (0, -4), (2**63 - 2, 4)])
def test_a_stretch_outside_the_elements_is_refused(start: int, count: int) -> None:
    with pytest.raises(ValueError, match=r"^start\b"):
        noise.normal(1, 2, start, count)


@pytest.mark.parametrize(
    ("argument", "numbers"), [("run_seed", (-1, 0, 0)), ("step", (0, 2**64, 0)), ("k", (0, 0, -1))]
)
def test_a_direction_outside_its_bits_is_refused(argument: str, numbers: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=rf"^{argument}\b"):
        noise.direction_seed(*numbers)


def test_a_noise_of_no_known_kind_is_refused_in_the_word_that_users_have_for_it() -> None:
    with pytest.raises(ValueError, match="distribution is 'uniform': expected 'normal', 'rademacher' or 'low_rank'"):
        noise.Noise("uniform")
