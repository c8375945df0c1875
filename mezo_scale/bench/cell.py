"""What a sweep measures: one cell per model, strategy, world size, batch and method."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mezo_scale.distributed.layout import Strategy
from mezo_scale.errors import RecipeError
from mezo_scale.recipe import ShardingSection, means_disk

STRATEGIES = ("single", "fsdp2", "hsdp", "zero3")  # single on several ranks is ddp; a cell has one name
METHODS = {
    "mezo": STRATEGIES,
    "published": ("single",),  # one device: it has no sharding
    "naive": ("fsdp2",),
    "adamw": ("fsdp2",),
}
"""Each method, and the strategies it runs under."""


@dataclass(frozen=True)
class Cell:
    """One combination. Two equal cells measure the same thing, which is how a sweep knows what is done.

    Attributes:
        model: as in a recipe: a folder, a name on the hub, or random:SHAPE.
        strategy: as in a recipe.
        world_size: ranks.
        rows, tokens: of a step's batch, over all ranks together.
        method: one of METHODS.
        num_directions: of MeZO.
        dtype, compute_dtype: as in a recipe.
        replicate: copies of the model, for hsdp.
        memory_cap_gib: what a rank may take of its device (CUDA only).
    """

    model: str
    strategy: str
    world_size: int
    rows: int
    tokens: int
    method: str = "mezo"
    num_directions: int = 1
    dtype: str = "float32"
    compute_dtype: str | None = None
    replicate: int | None = None
    memory_cap_gib: float | None = None

    def __str__(self) -> str:
        method = f"{self.method} x {self.num_directions} directions" if self.num_directions > 1 else self.method
        ranks = f"{self.world_size} rank{'s' if self.world_size > 1 else ''}"
        return f"{short_name(self.model)}, {self.strategy}, {ranks}, {self.rows} x {self.tokens}, {method}"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def sharding(self) -> ShardingSection:
        """As a recipe would have it."""
        given = {"strategy": self.strategy, "replicate": self.replicate}
        configs = {"ds_config": "ds_configs/zero3_bf16.json"} if self.dtype == "bfloat16" else {}
        return ShardingSection.model_validate(given | configs)

    @property
    def spread(self) -> Strategy:
        """How the model lies on the cell's ranks. Raises ShardingError: copies that do not divide them."""
        master = self.dtype == "float32" and self.compute_dtype is not None
        return Strategy.of(self.sharding, self.world_size, master=master)

    @property
    def key(self) -> str:
        return json.dumps(self.as_dict(), sort_keys=True)


@dataclass(frozen=True)
class Grid:
    """The options of a sweep.

    `rows` is the batch of a step under strong scaling, whatever the number of ranks, and each rank's under weak
    scaling; on one rank the two are one cell.
    """

    models: Sequence[str]
    strategies: Sequence[str] = ("fsdp2",)
    world_sizes: Sequence[int] = (1,)
    scalings: Sequence[str] = ("strong", "weak")
    methods: Sequence[str] = ("mezo",)
    directions: Sequence[int] = (1,)
    rows: int = 8
    tokens: int = 64
    dtype: str = "float32"
    compute_dtype: str | None = None
    replicate: int | None = None
    memory_cap_gib: float | None = None

    def cells(self) -> list[Cell]:
        """Every combination that makes sense, each once, small worlds first.

        Raises:
            RecipeError: an unknown word, or rows that can't be shared evenly.
        """
        if not self.models:
            raise RecipeError(
                "--model: none is given; expected a folder, a name on the hub or random:SHAPE, or --quick"
            )
        _check("--dtype", (self.dtype,), ("float32", "bfloat16", "float16"))
        _check("--compute-dtype", (self.compute_dtype or "bfloat16",), ("bfloat16",))
        _check("--strategy", self.strategies, STRATEGIES)
        _check("--method", self.methods, tuple(METHODS))
        _check("--scaling", self.scalings, ("strong", "weak"))
        found = [
            Cell(
                model,
                strategy,
                world_size,
                self.rows * (world_size if scaling == "weak" else 1),
                self.tokens,
                method,
                directions,
                self.dtype,
                self.compute_dtype,
                (self.replicate or 2) if Strategy(strategy).is_hybrid else None,
                self.memory_cap_gib,
            )
            for world_size in sorted(self.world_sizes)
            for model in self.models
            for method in self.methods
            for strategy in self.strategies
            for scaling in self.scalings
            for directions in (self.directions if method == "mezo" else (1,))
            if strategy in METHODS[method]
            and not (method == "published" and world_size > 1)
            and not (Strategy(strategy).is_hybrid and world_size % (self.replicate or 2))
        ]
        if not found:
            raise RecipeError(
                f"no cell is left: {', '.join(self.methods)} under {', '.join(self.strategies)} on "
                f"{', '.join(map(str, self.world_sizes))} ranks; published runs on one rank under single, naive and "
                "adamw under fsdp2, hsdp on a multiple of --replicate ranks"
            )
        for cell in found:
            if cell.rows % cell.world_size:
                raise RecipeError(
                    f"--rows is {self.rows}, which {cell.world_size} ranks can't share evenly: give a multiple of "
                    f"{cell.world_size}, or other --world-sizes"
                )
        return list(dict.fromkeys(found))


def quick(models: Sequence[str] = ()) -> list[Cell]:
    """A first look: one small model (or the given ones), 1 and 2 ranks, every method; minutes on two CPU cores."""
    demo = Path(".demo") / "model"
    found = []
    for model in models or ([str(demo)] if (demo / "config.json").is_file() else ["random:smollm2-135m"]):
        one, two = (replace(Cell(model, "fsdp2", 1, rows=4, tokens=16), world_size=ranks) for ranks in (1, 2))
        alone = replace(one, strategy="single")
        found += [alone, replace(alone, method="published"), one]
        found += [two, replace(two, rows=8)]
        found += [replace(two, method="naive"), replace(two, method="adamw"), replace(two, strategy="zero3")]
    return found


def short_name(model: str) -> str:
    """A hub name without its owner; of a folder the last two parts, for many are called "model"."""
    parts = model.rstrip("/").split("/")
    return "/".join(parts[-2:] if means_disk(model) else parts[-1:])


def _check(option: str, found: Sequence[str], known: Sequence[str]) -> None:
    for word in found:
        if word not in known:
            raise RecipeError(f"{option}: found {word!r}, expected {', '.join(known)}")
