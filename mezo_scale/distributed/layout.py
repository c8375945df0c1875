"""How a model lies on the ranks of a run, and which rows and directions that leaves to each of them.

What the name of a strategy means is said here alone: elsewhere one asks a `Strategy` for what follows from it.
"""

from dataclasses import KW_ONLY, dataclass, fields
from typing import TYPE_CHECKING, Protocol

from mezo_scale.errors import RecipeError, ShardingError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_OFFLOADS: dict[str, tuple[str | None, ...]] = {
    "single": (None,),
    "ddp": (None,),
    "fsdp2": (None, "cpu"),
    "hsdp": (None, "cpu"),
    "zero3": (None, "cpu", "nvme"),
}
"""Every strategy, the simplest first, and where its shards may lie besides the devices."""

STRATEGIES = tuple(_OFFLOADS)


class Sharding(Protocol):
    """What a recipe says of the layout."""

    @property
    def strategy(self) -> str: ...
    @property
    def replicate(self) -> int | None: ...
    @property
    def cpu_offload(self) -> bool: ...


@dataclass(frozen=True)
class Axes:
    """The ranks of a run as a grid.

    A rank's number counts through (direction, replicate, shard, tensor), outermost first, as torch's device meshes
    count: ranks that differ in `tensor` alone are neighbours. Which rows a rank evaluates follows:

    - shards and replicas have rows of their own;
    - tensor-parallel ranks share rows, for each computes a part of every row;
    - direction-parallel copies share rows too, and split the directions of a step.

    Attributes:
        replicate: copies of the model that split the rows.
        shard: ranks that the weights of a copy are spread over; each splits the rows further.
        tensor: ranks that compute a row together.
        direction: copies of all that, each with directions of its own.

    Raises:
        ValueError: an axis of less than one rank.
    """

    replicate: int = 1
    shard: int = 1
    tensor: int = 1
    direction: int = 1

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(f"{field.name} is {getattr(self, field.name)}: expected at least 1 rank on an axis")

    @property
    def world_size(self) -> int:
        return self.direction * self.rows_size * self.tensor

    @property
    def rows_size(self) -> int:
        """The number of parts that a step's rows are split into."""
        return self.replicate * self.shard

    def rows_rank(self, rank: int) -> int:
        """Which part of the rows a rank evaluates, 0 <= part < rows_size. Raises ValueError: there is no such rank."""
        return self._known(rank) // self.tensor % self.rows_size

    def direction_rank(self, rank: int) -> int:
        """Which part of the directions a rank evaluates, 0 <= part < direction. Raises ValueError as `rows_rank`."""
        return self._known(rank) // (self.tensor * self.rows_size)

    def _known(self, rank: int) -> int:
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank is {rank}: expected 0 to {self.world_size - 1}, the ranks of {self}")
        return rank


@dataclass(frozen=True)
class Strategy:
    """One way to spread a model over ranks.

    Attributes:
        name: one of STRATEGIES. A whole model on one rank is "single", on each of several "ddp", whichever was asked
            for.
        replicate: copies of the model.
        shard: ranks that one copy is spread over.
        offload: where the shards lie instead of on the devices: None, "cpu" or "nvme".
        master: weights stored in float32 although a step computes in 16 bits.

    Raises:
        RecipeError: no such strategy, or it can't offload there.
        ShardingError: a number of copies or ranks that it can't have.
    """

    name: str
    _: KW_ONLY
    replicate: int = 1
    shard: int = 1
    offload: str | None = None
    master: bool = False

    def __post_init__(self) -> None:
        if self.name not in _OFFLOADS:
            raise RecipeError(f"the strategy is {self.name!r}: expected {', '.join(STRATEGIES[:-1])} or zero3")
        if self.shard < 1 or self.replicate < 1:
            raise ShardingError(f"{self.replicate} copies over {self.shard} ranks each: expected at least 1 of both")
        if self.offload not in _OFFLOADS[self.name]:
            raise RecipeError(f"{self.name} can't offload to {self.offload}: expected one of {_OFFLOADS[self.name]}")
        if self.is_sharded and not self.is_hybrid and self.replicate > 1:
            raise ShardingError(f"{self.name} has one copy of the model, found {self.replicate}: take hsdp for more")
        if not self.is_sharded:
            if self.shard > 1:
                raise ShardingError(f"{self.name} spreads no copy over {self.shard} ranks: take fsdp2, hsdp or zero3")
            object.__setattr__(self, "name", "single" if self.replicate == 1 else "ddp")

    @classmethod
    def of(cls, sharding: Sharding, world_size: int, nodes: int = 1, *, master: bool = False) -> "Strategy":
        """The strategy that a recipe asks for, on the ranks that there are.

        Under zero3 `offload` is None whatever DeepSpeed's own configuration says.

        Args:
            sharding: the recipe's section.
            world_size: ranks.
            nodes: machines; hsdp has a copy on each unless the recipe says how many.
            master: see the class.

        Raises:
            RecipeError: options that contradict each other.
            ShardingError: a number of copies that does not divide the ranks.
        """
        asked = cls(sharding.strategy)
        if sharding.replicate is not None and not asked.is_hybrid:
            raise RecipeError(
                f"sharding.replicate is {sharding.replicate}, but sharding.strategy is {sharding.strategy}: "
                "copies are what hsdp has; leave replicate out or take hsdp"
            )
        if sharding.cpu_offload and not asked.is_fsdp2:
            raise RecipeError(
                f"sharding.cpu_offload is for fsdp2 and hsdp, but sharding.strategy is {sharding.strategy}: leave it "
                "out; zero3 offloads as its ds_config says"
            )
        replicate = 1 if asked.is_sharded else world_size
        if asked.is_hybrid:
            replicate = nodes if sharding.replicate is None else sharding.replicate
        if world_size % replicate:
            divisors = [str(number) for number in range(1, world_size + 1) if world_size % number == 0]
            raise ShardingError(
                f"sharding.replicate is {replicate}, but WORLD_SIZE is {world_size}, which {replicate} does not "
                f"divide: set sharding.replicate to {' or '.join(divisors)}, or start "
                f"{(world_size // replicate + 1) * replicate} processes"
            )
        offload = "cpu" if sharding.cpu_offload else None
        shard = world_size // replicate
        return cls(sharding.strategy, replicate=replicate, shard=shard, offload=offload, master=master)

    @property
    def world_size(self) -> int:
        return self.replicate * self.shard

    @property
    def axes(self) -> Axes:
        return Axes(self.replicate, self.shard)

    @property
    def layout(self) -> str:
        """In a few characters: "hsdp 2 x 8" (copies x ranks of each), "zero3 + cpu"."""
        copies = f" {self.replicate} x {self.shard}" if self.is_hybrid else ""
        return self.name + copies + (f" + {self.offload}" if self.offload else "")

    @property
    def is_sharded(self) -> bool:
        """Whether weights are stored in parts and gathered when they are needed, if by a single rank."""
        return self.name not in ("single", "ddp")

    @property
    def is_hybrid(self) -> bool:
        """Whether there are copies that are each spread over several ranks."""
        return self.name == "hsdp"

    @property
    def is_fsdp2(self) -> bool:
        """Whether torch's `fully_shard` does it."""
        return self.name in ("fsdp2", "hsdp")

    @property
    def is_deepspeed(self) -> bool:
        """Whether DeepSpeed does it, as its own configuration file says."""
        return self.name == "zero3"

    @property
    def needs_group(self) -> bool:
        """Whether even one rank needs a process group."""
        return self.is_sharded

    @property
    def autocasts(self) -> bool:
        """Whether a compute dtype other than the stored one is autocast; if not, weights are gathered in it."""
        return not self.is_fsdp2

    @property
    def can_dry_run(self) -> bool:
        """Whether a step can be taken on tensors without memory: not with DeepSpeed or copies from the host."""
        return not self.is_deepspeed and self.offload is None

    def mesh(self, device_type: str) -> "DeviceMesh":
        """The device mesh of `fully_shard`: ("replicate", "shard"), or ("shard",) alone where there is one copy.

        Every rank calls it, in a process group of `world_size` ranks.
        """
        from torch.distributed.device_mesh import init_device_mesh  # seconds to import, and planning needs no torch

        mesh = init_device_mesh(device_type, (self.replicate, self.shard), mesh_dim_names=("replicate", "shard"))
        return mesh if self.replicate > 1 else mesh["shard"]
