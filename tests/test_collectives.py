"""Where scalars go before ranks exchange them."""

import pytest
import torch
import torch.distributed as dist

from mezo_scale import collectives


@pytest.mark.parametrize(
    ("backend", "expected"),
    [
        ("nccl", torch.device("cuda", 3)),
        ("cuda:nccl", torch.device("cuda", 3)),
        ("cpu:gloo,cuda:nccl", torch.device("cpu")),
        ("gloo", torch.device("cpu")),
    ],
)
def test_scalars_go_to_the_device_of_a_group_that_takes_no_others(
    monkeypatch: pytest.MonkeyPatch, backend: str, expected: torch.device
) -> None:
    monkeypatch.setattr(dist, "get_backend", lambda: backend)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert collectives.device() == expected
