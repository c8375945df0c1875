"""What is planned: how a model is spread over devices, and what a step has to do."""

from dataclasses import dataclass

from mezo_scale.errors import RecipeError, ShardingError

GIB = 1 << 30
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Strategy:
    """One way to spread a model.

    Attributes:
        name: the recipe's `sharding.strategy`: single, fsdp2, hsdp or zero3.
        shard: ranks that one copy of the model is spread over.
        replicate: copies of the model; the ranks of all of them have rows of their own.
        offload: where the shards lie instead of on the devices: None, "cpu" or "nvme".
        master: weights stored in float32 although a step computes in 16 bits.
    """

    name: str
    shard: int = 1
    replicate: int = 1
    offload: str | None = None
    master: bool = False

    def __post_init__(self) -> None:
        if self.name not in ("single", "fsdp2", "hsdp", "zero3"):
            raise RecipeError(f"the strategy is {self.name!r}: expected single, fsdp2, hsdp or zero3")
        if self.shard < 1 or self.replicate < 1:
            raise ShardingError(f"{self.replicate} copies over {self.shard} ranks each: expected at least 1 of both")
        offloads = {"single": (None,), "fsdp2": (None, "cpu"), "hsdp": (None, "cpu"), "zero3": (None, "cpu", "nvme")}
        if self.offload not in offloads[self.name]:
            raise RecipeError(f"{self.name} can't offload to {self.offload}: expected one of {offloads[self.name]}")

    @property
    def gpus(self) -> int:
        return self.shard * self.replicate

    @property
    def layout(self) -> str:
        """In a few characters: "hsdp 2 x 8", "zero3 + cpu"."""
        copies = f" {self.replicate} x {self.shard}" if self.name == "hsdp" else ""
        return self.name + copies + (f" + {self.offload}" if self.offload else "")


@dataclass(frozen=True)
class Workload:
    """A step.

    Attributes:
        rows: of the batch, on each rank (of a micro-batch, where the recipe has one).
        tokens: of each row, padding included.
        branches: evaluations of a step: two per direction.
        dtype: what the forward pass computes in.
        positions: per row whose logits the loss needs: 1 for one-token candidates, else the longest candidate's
            tokens and one more.
    """

    rows: int = 1
    tokens: int = 400
    branches: int = 2
    dtype: str = "bfloat16"
    positions: int = 1

    def __post_init__(self) -> None:
        for name, least in (("rows", 1), ("tokens", 1), ("branches", 1), ("positions", 1)):
            if getattr(self, name) < least:
                raise RecipeError(f"{name} is {getattr(self, name)}: expected at least {least}")
        if self.dtype not in BYTES:
            raise RecipeError(f"the dtype is {self.dtype!r}: expected {', '.join(BYTES)}")

    def stored(self, strategy: Strategy) -> str:
        """The dtype of the stored weights."""
        return "float32" if strategy.master else self.dtype
