"""How long a step would take, from rates of links and compute: an estimate to compare by, not a measurement."""

import difflib
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from mezo_scale.distributed.layout import Strategy
from mezo_scale.errors import RecipeError
from mezo_scale.planner.architecture import Architecture
from mezo_scale.planner.traffic import traffic
from mezo_scale.planner.workload import Workload

FORMULA = """\
step = max(gather, compute) + update
  gather  = max(bytes inside / inside, node's bytes between / between, bytes from host / pcie, node's from disk / nvme)
  compute = (2 x layer parameters + 4 x layers x hidden x tokens) x branches x rows x tokens / compute
            + directions x parameters / noise
  update  = directions x parameters on this rank / noise (cpu noise where the shards are offloaded)
            + 2 x node's bytes on disk / nvme"""


@dataclass(frozen=True)
class Rates:
    """What a machine reaches, not what it is sold for. The defaults: A100 nodes on 100 Gb/s Ethernet.

    Attributes:
        compute_tflops: of a device in the compute dtype: half of an A100's 312.
        inside_gb_s: into each device from others of its node, in an all-gather: NVLink 3.
        between_gbit_s: into each node from the others, shared by its devices.
        pcie_gb_s: from host memory to each device.
        nvme_gb_s: from or to the disks of each node, shared by its devices.
        noise_g_s, cpu_noise_g_s: billions of normal numbers per second on a device, and on the CPU for each rank (one
            core measured 1.4 in float32, 0.8 in bfloat16; a GPU was not measured).
    """

    compute_tflops: float = 156.0
    inside_gb_s: float = 200.0
    between_gbit_s: float = 100.0
    pcie_gb_s: float = 20.0
    nvme_gb_s: float = 6.0
    noise_g_s: float = 50.0
    cpu_noise_g_s: float = 1.0

    @classmethod
    def parse(cls, given: Sequence[str]) -> "Rates":
        """The defaults, but for those that are given as NAME=VALUE. Raises RecipeError."""
        known = asdict(cls())
        for text in given:
            name, _, value = text.partition("=")
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {close[0]}?" if close else f": expected one of {', '.join(known)}"
                raise RecipeError(f"found the rate {text!r}{hint}")
            try:
                known[name] = float(value)
            except ValueError:
                raise RecipeError(f"the rate {name} is {value!r}: expected a number, like {name}=100") from None
            if not 0 < known[name] < float("inf"):
                raise RecipeError(f"the rate {name} is {value}: expected a finite number above 0")
        return cls(**known)


@dataclass(frozen=True)
class Seconds:
    """The terms of `FORMULA` for a step, in seconds: of all layers together."""

    gather: float
    compute: float
    update: float

    @property
    def step(self) -> float:
        return max(self.gather, self.compute) + self.update


def seconds(
    arch: Architecture, strategy: Strategy, workload: Workload, rates: Rates, gpus_per_node: int = 8
) -> Seconds:
    """An estimate by `FORMULA`. Latencies, loading of data and evaluations are left out."""
    moved = traffic(arch, strategy, workload, gpus_per_node)
    ranks = min(strategy.world_size, gpus_per_node)
    disk = moved.host * ranks / (rates.nvme_gb_s * 1e9) if strategy.offload == "nvme" else 0.0
    gather = max(
        moved.inside_node / (rates.inside_gb_s * 1e9),
        moved.between_nodes * gpus_per_node / (rates.between_gbit_s * 1e9 / 8),
        moved.host / (rates.pcie_gb_s * 1e9),
        disk,
    )
    flops = workload.branches * forward_flops(arch, workload.rows, workload.tokens)
    directions = -(-workload.branches // 2)
    compute = flops / (rates.compute_tflops * 1e12) + directions * arch.numel / (rates.noise_g_s * 1e9)
    update_rate = rates.noise_g_s if strategy.offload is None else rates.cpu_noise_g_s
    update = directions * arch.numel / strategy.shard / (update_rate * 1e9)
    return Seconds(gather, compute, update + 2 * disk)  # read, changed, written


def forward_flops(arch: Architecture, rows: int, tokens: int) -> int:
    """Of one forward pass, by `FORMULA`: those of the layers."""
    layers = sum(unit.numel * unit.count for unit in arch.units if unit.kind == "layer")
    return (2 * layers + 4 * arch.layers * arch.hidden * tokens) * rows * tokens
