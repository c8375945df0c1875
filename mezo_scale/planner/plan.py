"""Every strategy for a model on given devices: what it takes, whether it fits, and which one to take."""

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mezo_scale.distributed.layout import STRATEGIES, Strategy
from mezo_scale.errors import RecipeError, ShardingError
from mezo_scale.planner.architecture import Architecture
from mezo_scale.planner.deepspeed import CONFIGS, zero3_settings
from mezo_scale.planner.memory import Memory, memory, shard_numel
from mezo_scale.planner.rates import Rates, Seconds, seconds
from mezo_scale.planner.traffic import Traffic, traffic
from mezo_scale.planner.workload import GIB, Workload

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_MANY = 4096  # devices, beyond which nobody is sent


@dataclass(frozen=True)
class Cluster:
    """The devices.

    Attributes:
        gpus: in all.
        gpus_per_node: of each node; `gpus` fill whole nodes.
        memory_gib: of each device.
        headroom: the part of it that is left free, for the context of the device, buffers of its communication library
            and fragments between allocations.
        host_gib: of each node, for what is offloaded; None: taken to be enough.
    """

    gpus: int
    gpus_per_node: int
    memory_gib: float
    headroom: float = 0.1
    host_gib: float | None = None

    def __post_init__(self) -> None:
        if self.gpus < 1 or self.gpus_per_node < 1:
            raise ShardingError(f"{self.gpus} devices, {self.gpus_per_node} per node: expected at least 1 of both")
        if self.gpus > self.gpus_per_node and self.gpus % self.gpus_per_node:
            whole = self.gpus - self.gpus % self.gpus_per_node
            raise ShardingError(
                f"{self.gpus} devices do not fill nodes of {self.gpus_per_node}: take {whole} or "
                f"{whole + self.gpus_per_node}, or say how many a node has"
            )
        if not self.memory_gib > 0:
            raise RecipeError(f"the memory per device is {self.memory_gib} GiB: expected more than 0")
        if not 0 <= self.headroom < 1:
            raise RecipeError(f"the headroom is {self.headroom}: expected a part of the memory, 0 or above and below 1")

    @property
    def nodes(self) -> int:
        return -(-self.gpus // self.gpus_per_node)

    @property
    def usable_gib(self) -> float:
        return self.memory_gib * (1 - self.headroom)


def device_counts(text: str) -> list[int]:
    """ "8" or "1,2,4..64": numbers of devices, rising; between a pair with dots each is twice the one before.

    Raises:
        RecipeError: text that is no such list.
    """
    found: list[int] = []
    for part in text.split(","):
        first, dots, last = part.partition("..")
        if not first.strip().isdecimal() or (dots and not last.strip().isdecimal()):
            raise RecipeError(f"--gpus is {text!r}: expected a number, or numbers like 1,2,4..64 (each twice the last)")
        found.append(int(first))
        while dots and 0 < found[-1] * 2 <= int(last):
            found.append(found[-1] * 2)
        if dots and found[-1] != int(last):
            raise RecipeError(f"--gpus is {text!r}: doubling {first} does not come to {last}; write the numbers out")
    if found != sorted(set(found)):
        raise RecipeError(f"--gpus is {text!r}: expected rising numbers, each once")
    return found


@dataclass(frozen=True)
class Entry:
    """A strategy, and what a step of it takes. Bytes per device; `note` says what else keeps it from running."""

    strategy: Strategy
    memory: Memory
    traffic: Traffic
    seconds: Seconds
    fits: bool
    host_gib: float
    note: str = ""
    dry: Memory | None = None
    dry_gathered: int = 0

    @property
    def dry_error(self) -> float | None:
        """Of the arithmetic against the dry run's peak."""
        return None if self.dry is None else self.memory.peak / self.dry.peak - 1


def strategies(cluster: Cluster, workload: Workload) -> Iterator[Strategy]:
    """Those that the recipe can say on these devices."""
    gpus = cluster.gpus
    masters = {"bfloat16": (True, False), "float16": (False,), "float32": (False,)}[workload.dtype]
    for master in masters:
        yield Strategy("ddp", replicate=gpus, master=master)
        for offload in (None, "cpu"):
            if gpus > 1 or offload:
                yield Strategy("fsdp2", shard=gpus, offload=offload, master=master)
            for copies in range(2, gpus):
                if gpus % copies == 0:
                    yield Strategy("hsdp", replicate=copies, shard=gpus // copies, offload=offload, master=master)
        stored = "float32" if master else workload.dtype
        for offload in (None, "cpu", "nvme"):
            if (gpus > 1 or offload) and (stored, offload) in CONFIGS:
                yield Strategy("zero3", shard=gpus, offload=offload, master=master)


def plan(
    arch: Architecture,
    cluster: Cluster,
    workload: Workload,
    rates: Rates = Rates(),  # noqa: B008
) -> list[Entry]:
    """Every strategy, in the order of `strategies`."""
    return [_entry(arch, strategy, cluster, workload, rates) for strategy in strategies(cluster, workload)]


def recommended(entries: list[Entry]) -> Entry | None:
    """The one to take: float32 masters before 16 bits (which lose small updates), devices before host memory before
    disks, then the fastest, then the least traffic, then the simplest. None if nothing fits."""
    fitting = [entry for entry in entries if entry.fits]
    masters = any(entry.strategy.master for entry in entries)
    return min(
        fitting,
        key=lambda entry: (
            masters and not entry.strategy.master,
            (None, "cpu", "nvme").index(entry.strategy.offload),
            round(entry.seconds.step, 3),
            entry.traffic.gathered,
            STRATEGIES.index(entry.strategy.name),
        ),
        default=None,
    )


def with_dry_run(config: "PretrainedConfig", entry: Entry, workload: Workload) -> Entry:
    """The entry with the figures of its dry run, or a note why the model has none."""
    from mezo_scale.planner.dry_run import dry_run  # seconds to import

    try:
        dry, gathered = dry_run(config, entry.strategy, workload)
    except RuntimeError as error:  # an operation whose result's size depends on values, or that has no fake form
        return replace(entry, note=f"no dry run ({' '.join(str(error).split())[:100]})")
    return replace(entry, dry=dry, dry_gathered=gathered)


def devices_needed(
    arch: Architecture, cluster: Cluster, workload: Workload, *, master: bool, offload: str | None = None
) -> int | None:
    """From how many such devices on FSDP2 over all of them fits; None: on no number."""

    def fits(gpus: int) -> bool:
        peak = memory(arch, Strategy("fsdp2", shard=gpus, offload=offload, master=master), workload).peak
        return peak <= cluster.usable_gib * GIB

    node = cluster.gpus_per_node
    numbers = [*range(1, node), *range(node, _MANY + 1, node)]
    first = bisect_left(numbers, True, key=fits)
    return numbers[first] if first < len(numbers) else None


def _entry(arch: Architecture, strategy: Strategy, cluster: Cluster, workload: Workload, rates: Rates) -> Entry:
    needed = memory(arch, strategy, workload)
    moved = traffic(arch, strategy, workload, cluster.gpus_per_node)
    time = seconds(arch, strategy, workload, rates, cluster.gpus_per_node)
    host = needed.host * min(cluster.gpus, cluster.gpus_per_node) / GIB if strategy.offload == "cpu" else 0.0
    note = ""
    if strategy.offload == "cpu" and cluster.host_gib is not None and host > cluster.host_gib:
        note = f"takes {host:.0f} GiB of each node's memory, which has {cluster.host_gib:g}"
    if strategy.offload == "nvme":
        stored = workload.stored(strategy)
        largest = max(shard_numel((shape,), strategy) for unit in arch.units for shape in unit.shapes)
        if largest > zero3_settings(stored, "nvme")["offload_param"]["buffer_size"]:
            config = CONFIGS[stored, "nvme"]
            note = f"its largest shard, {largest / 1e6:.0f} M elements, does not fit the buffers of {config}"
    fits = needed.peak <= cluster.usable_gib * GIB and not note
    return Entry(strategy, needed, moved, time, fits, host, note)
