"""Peak memory of a step by taking it: the real model, sharding, view, objective and update, on tensors without memory.

The process group is torch's fake one, so that one process stands for a rank of any number of ranks, and the tensors are
fake ones, so that a model of any size runs in seconds. What is counted is every storage that lives, by what it holds.
"""

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig

from mezo_scale import models
from mezo_scale.distributed.layout import Strategy
from mezo_scale.errors import ShardingError
from mezo_scale.models import heads
from mezo_scale.optim.losses import Evaluator
from mezo_scale.optim.pieces import Piece
from mezo_scale.optim.update import Writer
from mezo_scale.perturbation import View
from mezo_scale.perturbation.scratch import Scratch, Slot
from mezo_scale.planner.memory import Memory
from mezo_scale.planner.workload import BYTES, Workload
from mezo_scale.tasks.kinds.candidates import candidates_loss
from mezo_scale.trajectory import StepRecord

SHARDS, GATHERED, SCRATCH, LOGITS, ACTIVATIONS = "shards", "gathered", "scratch", "logits", "activations"


def dry_run(config: PretrainedConfig, strategy: Strategy, workload: Workload) -> tuple[Memory, int]:
    """(peak, bytes gathered) of a step on rank 0, the first step included.

    Raises:
        ShardingError: a process group exists already in this process.
        ValueError: a strategy that can't be run dry, or several positions of a row.
    """
    if not strategy.can_dry_run or workload.positions > 1:
        raise ValueError(f"{strategy.layout} with {workload} can't be run dry")
    stored, compute = getattr(torch, workload.stored(strategy)), getattr(torch, workload.dtype)
    mixed = compute if compute != stored else None
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with _fake_group(strategy.world_size):
        with fake:
            model = heads.made(config, dtype=stored).eval()
        if strategy.is_sharded:
            mesh = strategy.mesh("cpu")  # outside the mode: a mesh reads its own ranks
            with fake:
                models.shard_fsdp2(model, mesh, mixed)
        autocast = strategy.autocasts and mixed is not None
        computing = partial(torch.autocast, "cpu", compute, cache_enabled=False) if autocast else nullcontext
        storages = Storages(int(config.vocab_size))
        view = View(model, dtype=compute if autocast else None, scratch=_Scratch(storages))
        storages.watch_shards(model)
        with fake, storages:
            gathered = _step(model, view, workload, storages, computing)
    parts = storages.at_peak
    size = BYTES[workload.stored(strategy)]
    master = parts[SHARDS] - parts[SHARDS] * BYTES[workload.dtype] // size
    found = Memory(parts[SHARDS] - master, master, parts[GATHERED], parts[SCRATCH], parts[ACTIVATIONS], parts[LOGITS])
    return found, gathered


def _step(model: nn.Module, view: View, workload: Workload, storages: "Storages", compute: Any) -> int:
    """Two evaluations, for scratch reaches its size in the first, and the update. Bytes gathered in the second."""

    def objective(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        with compute():
            return candidates_loss(model, batch)

    batch = random_batch(model, workload.rows, workload.tokens)
    branches = [(branch // 2, 1e-3 if branch % 2 == 0 else -1e-3) for branch in range(workload.branches)]
    evaluator = Evaluator(model, view, paired=True)
    for _ in range(2):
        before = storages.gathered
        evaluator._evaluate(Piece.whole(batch, len(branches)), objective, branches)
    gathered = storages.gathered - before
    seeds = tuple(dict.fromkeys(seed for seed, _ in branches))
    ones = (1.0,) * len(seeds)
    Writer(view.layout).apply_([StepRecord(0, seeds, ones, ones, (1.0,), 1.0)])
    return gathered


def random_batch(model: Any, rows: int, tokens: int, seed: int = 0) -> dict[str, Tensor]:
    """What `candidates_loss` takes: random tokens, int64 [rows, tokens], and two candidates of one token each."""
    size, generator = (rows, tokens), torch.Generator().manual_seed(seed)
    batch = {
        "input_ids": torch.randint(int(model.config.vocab_size), size, generator=generator),
        "attention_mask": torch.ones(size, dtype=torch.int64),
        "candidate_ids": torch.tensor([[1, 2]]).expand(rows, 2).contiguous(),
        "label": torch.arange(rows) % 2,
    }
    return batch | ({"mask_at": torch.zeros_like(batch["label"])} if heads.is_masked(model.config) else {})


class Storages(TorchDispatchMode):
    """Every storage that an operation makes while this is open: how much lives, and what was there at the peak."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.kind: str | None = None  # of what is made right now, where it is known
        self.gathered = 0  # bytes that all-gathers have filled
        self.peak = 0
        self.at_peak: Counter[str] = Counter()
        self._live: dict[int, tuple[str, int]] = {}
        self._now: Counter[str] = Counter()
        self._references: dict[int, Any] = {}

    def watch_shards(self, model: nn.Module) -> None:
        for parameter in model.parameters():
            self._add(parameter._local_tensor if isinstance(parameter, DTensor) else parameter.data, SHARDS)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        if func.namespace == "c10d" and "allgather" in func.name():
            self.gathered += sum(leaf.nbytes for leaf in tree_leaves(args[0]) if isinstance(leaf, Tensor))
        gather = func.namespace == "fsdp" and "all_gather_copy_in" in func.name()
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf, self.kind or self._kind_of(leaf))
                if gather:
                    self._move(leaf.untyped_storage(), GATHERED)
        return result

    def _kind_of(self, tensor: Tensor) -> str:
        return LOGITS if tensor.dim() > 1 and tensor.shape[-1] == self.vocabulary else ACTIVATIONS

    def _add(self, tensor: Tensor, kind: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return
        self._references[key] = weakref.ref(storage, lambda _: self._remove(key))
        self._set(key, kind, storage.nbytes())

    def _remove(self, key: int) -> None:
        kind, size = self._live.pop(key)
        self._now[kind] -= size
        del self._references[key]

    def _move(self, storage: torch.UntypedStorage, kind: str) -> None:
        """Enters a storage, resized perhaps, under another kind."""
        if storage._cdata in self._live:
            old, size = self._live[storage._cdata]
            self._now[old] -= size
            self._set(storage._cdata, kind, storage.nbytes())

    def _set(self, key: int, kind: str, size: int) -> None:
        self._live[key] = (kind, size)
        self._now[kind] += size
        if (total := self._now.total()) > self.peak:
            self.peak, self.at_peak = total, Counter(self._now)

    def __enter__(self) -> "Storages":
        self._resize = resize = torch.UntypedStorage.resize_

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            resized = resize(storage, size)
            self._move(storage, GATHERED)  # so FSDP2 takes and frees what it copies weights to
            return resized

        torch.UntypedStorage.resize_ = resize_  # type: ignore[assignment,method-assign]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*error)


class _Scratch(Scratch):
    """The view's scratch, which says when it takes memory."""

    def __init__(self, storages: Storages) -> None:
        super().__init__()
        self._storages = storages

    def take(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Slot:
        self._storages.kind = SCRATCH
        try:
            return super().take(shape, dtype, device)
        finally:
            self._storages.kind = None


@contextmanager
def _fake_group(size: int) -> Iterator[None]:
    if dist.is_initialized():
        raise ShardingError("a process group exists already: run the plan in a process of its own, without a launcher")
    dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
