"""What a planned step has to do."""

from dataclasses import dataclass

from mezo_scale.distributed.layout import Strategy
from mezo_scale.errors import RecipeError

GIB = 1 << 30
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


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
