"""The few exchanges between ranks: scalars, and a trajectory's bytes. One rank alone takes the same path.

Everything goes over the default process group: the data-parallel ranks hold different rows, and ranks that share rows
(tensor parallelism) add the same sums and counts, which leaves every mean as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from mezo_scale.errors import MezoError, SharedError


def is_distributed() -> bool:
    """Whether there are other ranks to talk to."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def sum_scalars(values: Sequence[float], *, timeout_s: float | None = None) -> list[float]:
    """The sum over ranks of each value, in float64: one all-reduce.

    `timeout_s`: how long to wait for the others; None: as long as the process group does. Then torch raises.
    """
    return _reduce(torch.tensor(values, dtype=torch.float64), dist.ReduceOp.SUM, timeout_s).tolist()


def sum_integers(values: Sequence[int]) -> list[int]:
    """The sum over ranks of each value, modulo 2^64, as signed integers."""
    return _reduce(torch.tensor(values, dtype=torch.int64), dist.ReduceOp.SUM).tolist()


def max_integer(value: int) -> int:
    """The largest value of any rank."""
    return int(_reduce(torch.tensor([value], dtype=torch.int64), dist.ReduceOp.MAX).item())


def gather_integers(value: int) -> list[int]:
    """Every rank's value, in rank order."""
    everyone: list[int] = gather_table(np.array([value], np.int64))[:, 0].tolist()
    return everyone


def gather_table(mine: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Every rank's table, int64 [ranks, ...], in rank order. All ranks' have one shape."""
    if not is_distributed():
        return mine[None]
    here = torch.from_numpy(mine).to(device())
    everyone = torch.empty(dist.get_world_size(), *mine.shape, dtype=torch.int64, device=here.device)
    dist.all_gather(list(everyone.unbind()), here)
    table: npt.NDArray[np.int64] = everyone.cpu().numpy()
    return table


def broadcast_bytes(data: bytes | None) -> bytes:
    """Rank 0's bytes, on every rank."""
    if not is_distributed():
        return data or b""
    size = max_integer(len(data) if data is not None and rank() == 0 else 0)
    buffer = torch.zeros(size, dtype=torch.uint8, device=device())
    if data is not None and rank() == 0 and size:
        buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    if size:
        dist.broadcast(buffer, src=0)
    return bytes(buffer.cpu().numpy().tobytes())


def from_first_rank(work: Callable[[], bytes]) -> bytes:
    """What rank 0's `work` returns, on every rank; the others do not call it.

    Raises:
        MezoError: as `work` did on rank 0; on the others a SharedError with its text.
    """
    if not is_distributed():
        return work()
    error: BaseException | None = None
    said = None
    if rank() == 0:
        try:
            said = b"+" + work()
        except BaseException as met:
            error = met
            said = b"-" + (str(met) if isinstance(met, MezoError) else f"rank 0 failed: {met!r}").encode()
    said = broadcast_bytes(said)
    if error is not None:
        raise error
    if said.startswith(b"-"):
        raise SharedError(said[1:].decode())
    return said[1:]


def device() -> torch.device:
    """Where the group's backend wants its tensors: NCCL and its kin take no CPU tensors."""
    backend = str(dist.get_backend())
    for device, name in (("cuda", "nccl"), ("xpu", "xccl"), ("hpu", "hccl")):
        if name in backend and "gloo" not in backend:
            return torch.device(device, getattr(torch, device).current_device())
    return torch.device("cpu")


def store() -> dist.Store | None:
    """A connection of its own to where the default process group's ranks met; None if that kind of store has none."""
    try:
        return dist.distributed_c10d._get_default_store().clone()
    except (RuntimeError, NotImplementedError):
        return None


def _reduce(values: torch.Tensor, op: dist.ReduceOp.RedOpType, timeout_s: float | None = None) -> torch.Tensor:
    if not is_distributed():
        return values
    values = values.to(device())
    if timeout_s is None:
        dist.all_reduce(values, op=op)
    else:
        work = dist.all_reduce(values, op=op, async_op=True)
        assert work is not None
        work.wait(timedelta(seconds=timeout_s))
    return values.cpu()
