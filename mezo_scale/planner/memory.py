"""Peak memory of a step on one device, and of saving on a host, by arithmetic.

The largest of a few moments: while a unit's weights are copied out of the gathered buffer, and while it computes. What
lies there at every moment: the shards, the root's gathered weights, and the view's scratch, which is kept from step to
step. The dry run (`dry_run`) takes the same step with the real model and finds the same peak; a test holds both
together.
"""

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import astuple, dataclass

from mezo_scale.distributed.layout import Strategy
from mezo_scale.planner.architecture import Architecture, Shapes
from mezo_scale.planner.deepspeed import zero3_settings
from mezo_scale.planner.workload import BYTES, Workload

LEARNING_ROWS = 3  # rows of the small runs with which the view learns how a model divides (perturbation/pairing.py)
ALIGN = 64  # perturbation/scratch.py, which imports torch; a test compares the two


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the peak of a step.

    Attributes:
        shards: weights stored there, as 16 bits would take them (or float32 where a step computes in it).
        master: what a float32 master takes besides.
        gathered: weights of the layers in flight, and the buffers they came in.
        scratch: perturbed weights.
        activations, logits: of all rows in all branches.
        host: shards in host memory or on disk instead: not on the device, and no part of the peak.
    """

    shards: int
    master: int
    gathered: int
    scratch: int
    activations: int
    logits: int
    host: int = 0

    @property
    def peak(self) -> int:
        return int(sum(astuple(self))) - self.host


def memory(arch: Architecture, strategy: Strategy, workload: Workload) -> Memory:
    """Bytes per device at the peak of a step, the first one included."""
    stored, compute = BYTES[workload.stored(strategy)], BYTES[workload.dtype]
    elements = shards_numel(arch, strategy)
    shards, master = elements * min(stored, compute), elements * max(stored - compute, 0)
    scratch = _scratch(arch, strategy, workload)
    tall = workload.rows * workload.branches
    moments = [(gathered, scratch, *live) for gathered, *live in _moments(arch, strategy, workload, tall)]
    if workload.branches > 1:
        moments += [(gathered, 0, *live) for gathered, *live in _moments(arch, strategy, workload, LEARNING_ROWS)]
    gathered, scratch, activations, logits = max(moments, key=sum)
    if strategy.offload is None:
        return Memory(shards, master, gathered, scratch, activations, logits)
    return Memory(0, 0, gathered, scratch, activations, logits, host=shards + master)


def saving(arch: Architecture, strategy: Strategy, workload: Workload) -> int:
    """Bytes of host memory that rank 0 needs to save a checkpoint, besides what it stores.

    The largest parameter, whole, and another rank's part of it (`sharding/gather.py`). Where a checkpoint has other
    shapes than the model, the largest tensor that is made of a parameter comes to that.
    """
    size = BYTES[workload.stored(strategy)]
    shapes = (shape for unit in arch.units for shape in unit.shapes)
    parts = strategy.shard > 1
    return max(size * (math.prod(shape) + (shard_numel((shape,), strategy) if parts else 0)) for shape in shapes)


def shard_numel(shapes: Shapes, strategy: Strategy) -> int:
    """Elements that a rank stores of parameters of these shapes, padding included."""
    if strategy.is_deepspeed:  # flat, each parameter in equal parts
        return sum(-(-math.prod(shape) // strategy.shard) for shape in shapes)
    return sum(-(-shape[0] // strategy.shard) * math.prod(shape[1:]) for shape in shapes)  # rows of dim 0


def shards_numel(arch: Architecture, strategy: Strategy) -> int:
    """Elements that a rank stores of the whole model, padding included."""
    return sum(unit.count * shard_numel(unit.shapes, strategy) for unit in arch.units)


def gathered_dtype(kind: str, strategy: Strategy, workload: Workload) -> str:
    """What a unit of this kind is gathered in: FSDP2's layers in the compute dtype, all else as stored."""
    if kind == "layer" and not strategy.autocasts:
        return workload.dtype
    return workload.stored(strategy)


def _moments(arch: Architecture, strategy: Strategy, workload: Workload, tall: int) -> Iterator[tuple[int, int, int]]:
    """(gathered, activations, logits) at each moment that may be the peak of a forward pass of `tall` rows."""
    inside = {kind: _inside(arch, strategy, workload, tall, kind) for kind in ("root", "table", "layer", "last")}
    if strategy.is_fsdp2:
        yield from _moments_fsdp2(arch, strategy, workload, inside)
    else:  # a whole model is gathered from nowhere
        live = _live_zero3(arch, strategy, workload) if strategy.is_deepspeed else 0
        yield live, *inside["layer"]
        yield live, *inside["last"]


def _moments_fsdp2(
    arch: Architecture, strategy: Strategy, workload: Workload, inside: dict[str, tuple[int, int]]
) -> Iterator[tuple[int, int, int]]:
    """FSDP2 keeps the buffer of one unit until the next one's weights are copied out of theirs: at that moment three
    units are there, then two. The root's weights stay until its forward pass ends."""
    units = [unit for unit in arch.units for _ in range(unit.count)]
    whole = [
        shard_numel(unit.shapes, strategy) * strategy.shard * BYTES[gathered_dtype(unit.kind, strategy, workload)]
        for unit in units
    ]
    buffers = whole if strategy.shard > 1 else [0] * len(whole)
    root = whole[0]
    yield buffers[0] + root, 0, 0
    between = inside["root"][0]
    for i in range(1, len(units)):
        last = i == len(units) - 1 and units[i].kind == "table"
        yield root + buffers[i - 1] + buffers[i] + whole[i], between // 2 if last else between, 0
        yield root + buffers[i] + whole[i], *inside[units[i].kind]
    in_root = units[-1].kind != "table"
    yield root + buffers[-1] + (0 if in_root else whole[-1]), *inside["last"]


def _live_zero3(arch: Architecture, strategy: Strategy, workload: Workload) -> int:
    """ZeRO-3 gathers parameters one after the other, as far ahead as `stage3_max_live_parameters` lets it; what came in
    one bucket is there twice while it is put together."""
    if strategy.shard == 1 and strategy.offload is None:
        return 0
    settings = zero3_settings(workload.stored(strategy), strategy.offload)
    most = settings["stage3_max_live_parameters"] + max(owner.largest for owner in arch.owners)
    live: int = min(arch.numel, most) + min(arch.numel, settings["stage3_prefetch_bucket_size"])
    return live * BYTES[workload.stored(strategy)]


def _inside(arch: Architecture, strategy: Strategy, workload: Workload, tall: int, kind: str) -> tuple[int, int]:
    """(activations, logits) while a unit of this kind computes; kind "last": while logits are made and compared."""
    compute, stored = BYTES[workload.dtype], BYTES[workload.stored(strategy)]
    stream = tall * workload.tokens * arch.hidden  # elements of the residual stream
    outer = compute if strategy.autocasts else stored  # FSDP2's mixed precision casts at the borders of a layer
    if kind == "last":
        table = compute if strategy.autocasts else BYTES[gathered_dtype("table", strategy, workload)]
        return stream * outer, tall * workload.positions * arch.vocabulary * (table + 2 * 4)
    between = 2 * stream * outer  # what the embeddings gave, which the model keeps, and what the layer is given
    if kind != "layer":
        return between, 0
    if outer != compute:
        between += stream * outer  # the layer is given a copy in its own dtype
    # Under autocast, normalisation inside attention leaves it in float32.
    attention = arch.attention * (stored if strategy.autocasts else compute)
    widest = tall * workload.tokens * max(arch.inner * compute, attention)
    mask = tall * workload.tokens**2
    # The residual, what normalisation made of it, and the widest part.
    return between + 2 * stream * compute + widest + mask, 0


def _scratch(arch: Architecture, strategy: Strategy, workload: Workload) -> int:
    """One buffer per dtype, as large as the largest module's perturbed weights: in two branches, if there are two."""
    largest: dict[str, int] = defaultdict(int)
    together = min(workload.branches, 2)
    autocast = strategy.master and strategy.autocasts
    for owner in arch.owners:
        if owner.lookup:
            continue
        need: dict[str, int] = defaultdict(int)
        for shape in owner.shapes:
            dtype = gathered_dtype(owner.kind, strategy, workload)
            if autocast and len(shape) > 1:
                dtype = workload.dtype
            need[dtype] += -(-together * math.prod(shape) // ALIGN) * ALIGN
        for dtype, numel in need.items():
            largest[dtype] = max(largest[dtype], numel)
    return sum(numel * BYTES[dtype] for dtype, numel in largest.items())
