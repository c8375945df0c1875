"""Tensors without memory: the noise checks what it is given, and leaves it at that."""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mezo_scale import noise

BRANCHES = [(1, 1e-3), (1, -1e-3)]


def test_every_sweep_runs_on_fake_tensors_of_any_size() -> None:
    with FakeTensorMode():
        table = torch.empty(1 << 20, 1 << 14, dtype=torch.bfloat16)  # 32 GiB, if it were there
        noise.view(table, 7, BRANCHES, torch.empty(2, *table.shape))
        noise.rows(table, 7, BRANCHES, torch.zeros(2, 5, dtype=torch.int64), torch.empty(2, 5, 1 << 14))
        runs = np.array([[0, 0, table.numel()]])
        noise.write_(table.view(-1), runs, 7, [[1]], [[0.1]], [1.0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: noise.view(torch.empty(4), 7, BRANCHES, torch.empty(3, 4)), "out"),
        (lambda: noise.view(torch.empty(4, dtype=torch.int8), 7, BRANCHES, torch.empty(2, 4)), "weight"),
        (lambda: noise.rows(torch.empty(4, 2), 7, BRANCHES, torch.zeros(2, 3), torch.empty(2, 3, 2)), "ids"),
        (lambda: noise.write_(torch.empty(4), [[0, 0, 5]], 7, [[1]], [[0.1]], [1.0]), "runs"),
    ],
)
def test_wrong_arguments_are_refused_as_ever(call: object, message: str) -> None:
    with FakeTensorMode(), pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]
