"""A sweep: a YAML file whose lists multiply out to cells, each of which is measured once.

The descriptions under the fields are the only documentation of the options: `bench --help` is made from them.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BeforeValidator, Field

from mezo_scale.distributed.layout import Strategy
from mezo_scale.errors import RecipeError
from mezo_scale.recipe import ShardingSection, means_disk
from mezo_scale.recipe.reading import checked, parse_override, read_yaml
from mezo_scale.recipe.sections import Real, Section

SHIPPED = Path(__file__).with_name("sweeps")
Item = TypeVar("Item")
Count = Annotated[int, Field(ge=1)]
Several = Annotated[
    tuple[Item, ...],
    BeforeValidator(lambda value: [] if value is None else value if isinstance(value, list | tuple) else [value]),
    Field(strict=False),
]

WHERE = {
    "mezo": ("single", "fsdp2", "hsdp", "zero3"),  # single on several ranks is ddp; a cell has one name
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
        method: one of WHERE.
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

    @property
    def key(self) -> str:
        """The cell as JSON."""
        return json.dumps(asdict(self), sort_keys=True)

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


class Grid(Section):
    """What multiplies out. A field with several values may be given one; on one rank strong and weak are one cell."""

    models: Several[str] = Field(
        description="Folders, names on the hub, or random:SHAPE (random:opt-13b).", min_length=1
    )
    strategies: Several[Literal["single", "fsdp2", "hsdp", "zero3"]] = Field(("fsdp2",), description="As in a recipe.")
    world_sizes: Several[Count] = Field(
        (), description="Numbers of ranks; none: powers of two up to the GPUs there are, 1 and 2 without GPUs."
    )
    scalings: Several[Literal["strong", "weak"]] = Field(
        ("strong",), description="strong: rows is the whole batch. weak: rows is each rank's."
    )
    methods: Several[Literal["mezo", "published", "naive", "adamw"]] = Field(
        ("mezo",),
        description="mezo; published (MeZO in place, one rank), naive (the same on FSDP2's shards) or adamw (full "
        "fine-tuning under FSDP2): see mezo_scale/bench/rivals.py.",
    )
    directions: Several[Count] = Field((1,), description="Random directions per step, of mezo.")
    rows: int = Field(8, ge=1, description="Rows of a batch, see scalings.")
    tokens: int = Field(64, ge=2, description="Tokens of a row.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="What weights are stored in.")
    compute_dtype: Literal["bfloat16"] | None = Field(None, description="What is computed in; null: as stored.")
    replicate: int | None = Field(None, ge=2, description="Copies under hsdp; null: one per node, at least 2.")
    memory_cap_gib: Real | None = Field(None, gt=0, description="What a rank may take of its GPU.")

    def cells(self, places: "Places") -> Iterator[Cell]:
        """Every combination that makes sense, small worlds first. Raises RecipeError: rows that ranks can't share."""
        for world_size in sorted(self.world_sizes or places.world_sizes):
            copies = self.replicate or max(2, -(-world_size // places.ranks_per_node(world_size)))
            for model in self.models:
                for method, strategy, scaling in self._ways(world_size, copies):
                    rows = self.rows * (world_size if scaling == "weak" else 1)
                    if rows % world_size and not self.world_sizes:
                        continue  # a number of ranks that nobody asked for
                    if rows % world_size:
                        raise RecipeError(
                            f"rows is {rows}, which {world_size} ranks can't share evenly: give a multiple of "
                            f"{world_size}, or other world_sizes"
                        )
                    for directions in self.directions if method == "mezo" else (1,):
                        yield Cell(
                            model, strategy, world_size, rows, self.tokens, method, directions, self.dtype,
                            self.compute_dtype, copies if Strategy(strategy).is_hybrid else None, self.memory_cap_gib,
                        )  # fmt: skip

    def _ways(self, world_size: int, copies: int) -> Iterator[tuple[str, str, str]]:
        """(method, strategy, scaling) that so many ranks can run."""
        for method in self.methods:
            for strategy in self.strategies:
                fits = not (Strategy(strategy).is_hybrid and world_size % copies)
                if strategy in WHERE[method] and fits and (method != "published" or world_size == 1):
                    yield from ((method, strategy, scaling) for scaling in self.scalings)


class Sweep(Section):
    """How the cells are measured. Beside these fields a file has those of a grid, which hold for all its grids."""

    grids: tuple[Grid, ...] = Field(strict=False, description="Several grids, each with its own values of such fields.")
    rounds: int = Field(7, ge=1, description="How often a step and two bare forwards take turns.")
    timeout_s: Real = Field(1800, gt=0, description="Of a cell; then it is a row without figures.")
    budget_s: Real | None = Field(None, gt=0, description="Of the sweep: no cell is started after it, or runs longer.")
    published_s: dict[str, Real] = Field({}, description="Seconds per step that others published, by model.")


@dataclass(frozen=True)
class Places:
    """Where ranks can be: GPUs of this machine (0: none, ranks are on its CPUs), and nodes of a SLURM allocation.

    Attributes:
        gpus: of each node.
        nodes: 1 on a machine of one's own.
        slurm: whether srun starts the ranks.
    """

    gpus: int = 0
    nodes: int = 1
    slurm: bool = False

    @classmethod
    def here(cls, environ: Mapping[str, str] = os.environ) -> "Places":
        """Of a SLURM allocation as SLURM says (this process may run on a login node), else as torch does."""
        if "SLURM_JOB_ID" in environ and shutil.which("srun", path=environ.get("PATH")) is not None:
            said = environ.get("SLURM_GPUS_ON_NODE") or environ.get("SLURM_GPUS_PER_NODE", "")
            count = re.search(r"\d+$", said)  # "8", "a100:8"
            return cls(int(count[0]) if count else 0, int(environ.get("SLURM_JOB_NUM_NODES", "1")), True)
        import torch

        return cls(torch.cuda.device_count())

    @property
    def world_sizes(self) -> list[int]:
        most = self.gpus * self.nodes or 2
        return [2**power for power in range(most.bit_length())]

    def ranks_per_node(self, world_size: int) -> int:
        return min(self.gpus or -(-world_size // self.nodes), world_size)


def load(source: str | Path, overrides: Sequence[str] = ()) -> Sweep:
    """Reads a sweep file, or one of those that are shipped by its name. An override holds for all grids.

    Raises:
        RecipeError: in one line, for whatever is wrong with the file, a key or a value.
    """
    path = given_or_shipped(source, SHIPPED, "a sweep")
    own = [name for name in Sweep.model_fields if name != "grids"]
    known = [*Grid.model_fields, *own, "grids"]
    elsewhere = f"expected {', '.join(known[:-1])} or grids"
    tree = read_yaml(path, "the fields of a sweep")
    grids = tree.pop("grids", None) or [{}]
    if not isinstance(grids, list) or not all(isinstance(grid, dict) for grid in grids):
        raise RecipeError(f"{path}: grids: found {grids!r}, expected a list of fields")
    for override in overrides:
        key, value = parse_override(override, known[:-1], elsewhere, "sweep")
        tree[key] = value
        grids = [{name: given for name, given in grid.items() if name != key} for grid in grids]
    common = {name: tree.pop(name) for name in Grid.model_fields if name in tree}
    for key in tree.keys() - set(own):  # before the grids, in which a misspelt field is missing
        checked(Sweep, {key: None, "grids": ()}, str(path), known, elsewhere)
    found = [checked(Grid, common | grid, str(path), list(Grid.model_fields), elsewhere) for grid in grids]
    return checked(Sweep, tree | {"grids": found}, str(path), known, elsewhere)


def given_or_shipped(source: str | Path, folder: Path, what: str) -> Path:
    """A YAML file, or the one in a folder of the package's that has the name. Raises RecipeError: neither is there."""
    path = next((path for path in (str(source), f"{folder}/{source}.yaml") if os.path.isfile(path)), None)
    if path is None:
        raise RecipeError(f"there is no file {source}: give {what} (YAML), or one of {', '.join(names_in(folder))}")
    return Path(path)


def names_in(folder: Path) -> list[str]:
    """Of the YAML files that are shipped there."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def cells(sweep: Sweep, places: Places) -> list[Cell]:
    """Every cell once, in the order of the file. Raises RecipeError: there is none, or rows that ranks can't share."""
    found = dict.fromkeys(cell for grid in sweep.grids for cell in grid.cells(places))
    if not found:
        raise RecipeError(
            "no cell is left: published runs on one rank under single, naive and adamw under fsdp2, hsdp on a multiple "
            "of replicate ranks; give other methods, strategies or world_sizes"
        )
    return list(found)


def fields() -> Iterator[tuple[str, str]]:
    """(name, description) of every field of a sweep file."""
    for section in (Grid, Sweep):
        for name, field in section.model_fields.items():
            yield name, field.description or ""


def short_name(model: str) -> str:
    """A hub name without its owner; of a folder the last two parts, for many are called "model"."""
    parts = model.rstrip("/").split("/")
    return "/".join(parts[-2:] if means_disk(model) else parts[-1:])
