"""The processes of a run: which one this is, what it computes on, and how it enters and leaves their process group.

Launchers say who is who in RANK, LOCAL_RANK and WORLD_SIZE; what one leaves out, `distributed.launcher` fills in.
Without a launcher the run is one process.
"""

import logging
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from mezo_scale.distributed import preflight
from mezo_scale.distributed.launcher import Launcher, adopt
from mezo_scale.distributed.preflight import RankInfo
from mezo_scale.errors import MezoError, ShardingError, SharedError

# Sharded loading of a large model and a replay on a slow disk keep ranks waiting for each other.
_TIMEOUT = timedelta(hours=1)
# A thread of gloo's that still has a tensor to let go of when the interpreter ends aborts the process. With PyTorch
# alone, on a busy machine, 2 programs of 25 that end with a collective do so, and 0 of 40 that wait this long.
_LETTING_GO_S = 0.1
_MESSAGE_BYTES = 1024


@dataclass(frozen=True)
class World:
    """This process among the others.

    Attributes:
        rank: 0 <= rank < size.
        local_rank: the rank inside this machine.
        local_size: the number of processes on this machine.
        size: the number of processes of the run.
        device: what this process computes on.
        store: the rendezvous' own; None for a process alone.
        ranks: what each rank said of itself at the start; empty for a process alone.
    """

    rank: int
    local_rank: int
    local_size: int
    size: int
    device: torch.device
    store: dist.Store | None = None
    ranks: tuple[RankInfo, ...] = ()

    @classmethod
    def from_environment(cls) -> "World":
        """Reads the launcher's variables; takes the machine's accelerator, or the CPU where there is none."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
        if device.type == "cuda" and local_rank >= torch.cuda.device_count():
            raise ShardingError(
                f"LOCAL_RANK is {local_rank}, but this machine has {torch.cuda.device_count()} GPUs: "
                "start at most one process per GPU"
            )
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return cls(int(os.environ.get("RANK", "0")), local_rank, local_size, size, device)

    @property
    def nodes(self) -> int:
        """The number of machines, where each runs as many processes as this one."""
        return max(1, self.size // self.local_size)

    @contextmanager
    def raise_on_all(self) -> Iterator[None]:
        """A MezoError that any rank meets inside is raised by all of them, so that none waits for one that is gone.

        For work without collectives. The message is that of the lowest rank that has one.
        """
        error: MezoError | None = None
        try:
            yield
        except MezoError as met:
            error = met
        if error is not None and not dist.is_initialized():
            raise error
        message = self._first_message("" if error is None else str(error))
        if message:
            raise SharedError(message) from error

    def _first_message(self, message: str) -> str:
        if not dist.is_initialized():
            return message
        text = message.encode()[:_MESSAGE_BYTES].ljust(_MESSAGE_BYTES, b"\0")
        mine = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(self.device)
        everyone = torch.empty(self.size, _MESSAGE_BYTES, dtype=torch.uint8, device=self.device)
        dist.all_gather(list(everyone.unbind()), mine)
        texts = [bytes(row.tolist()).rstrip(b"\0").decode(errors="ignore") for row in everyone.cpu()]
        first = next((text for text in texts if text), "")
        bad = dict.fromkeys(one.host for one, text in zip(self.ranks, texts, strict=False) if text)
        fine = {one.host for one in self.ranks} - set(bad)
        return f"on {', '.join(bad)}, but not on {min(fine)}: {first}" if bad and fine else first

    def check_shared(self, folder: Path) -> None:
        """Raises SharedError unless all hosts see the same `folder`; it need not exist yet. Every rank calls it."""
        if self.store is not None:
            preflight.check_shared(folder, self.store, self.ranks, self.rank)


@contextmanager
def process_group(*, always_group: bool) -> Iterator[World]:
    """The run's process group, made here and destroyed at the end, whatever happened in between.

    `always_group` makes a process group even for a process alone, for the layouts that are made of one.
    """
    launcher = adopt()
    world = World.from_environment()
    _quieten(world)
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    if world.size == 1 and not always_group:
        yield world
        return
    if world.size > 1:
        world = _rendezvous(world, launcher)
    dist.init_process_group(
        # gloo beside nccl moves what is offloaded to host memory.
        backend="cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo",
        timeout=_TIMEOUT,
        device_id=world.device if world.device.type == "cuda" else None,
        store=dist.HashStore() if world.store is None else dist.PrefixStore("group", world.store),
        rank=world.rank,
        world_size=world.size,
    )
    try:
        yield world
    finally:
        dist.destroy_process_group()
        if world.device.type == "cpu" and world.size > 1:
            time.sleep(_LETTING_GO_S)


def _rendezvous(world: World, launcher: Launcher) -> World:
    """The world with all ranks in it. Raises LaunchError or SharedError."""
    store = preflight.rendezvous(launcher)
    ranks = preflight.exchange(store, launcher, world.device)
    return replace(world, store=store, ranks=tuple(ranks))


def _quieten(world: World) -> None:
    """The libraries' own progress and notices would drown the run's lines."""
    for name in ("DeepSpeed", "huggingface_hub", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if world.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would guess, and say so
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # meant for DeepSpeed
    if world.rank > 0:
        warnings.simplefilter("ignore")
