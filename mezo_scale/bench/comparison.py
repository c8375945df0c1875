"""A comparison: a YAML file that multiplies methods by seeds and learning rates; each cell is an ordinary recipe.

The file is a recipe with one section more, `compare`. What stands in the other sections holds for every method that
looks at it; what a method has under `compare.methods` is its own.
"""

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from mezo_scale.bench.sweep import Several, given_or_shipped, names_in
from mezo_scale.errors import RecipeError
from mezo_scale.recipe import Recipe, looks_at, options, parse, takes_steps
from mezo_scale.recipe.reading import checked, parse_override, read_yaml
from mezo_scale.recipe.sections import Section

SHIPPED = Path(__file__).parents[1] / "recipes"
Tree = dict[str, Any]
_LABEL = re.compile(r"[A-Za-z0-9][\w.-]*")


class CompareSection(Section):
    """What is compared."""

    methods: dict[str, dict[str, Any]] = Field(
        min_length=1,
        description="By a name of your own the sections of a recipe that are its own. optimizer.lr may be a list: each "
        "is run, and the one with the best mean on dev after the last step stands in the table.",
    )
    seeds: Several[Annotated[int, Field(ge=0, lt=2**63)]] = Field(
        (0,), min_length=1, description="Each is a run of every method."
    )
    vary: Literal["optimizer.seed", "task.split_seed"] = Field(
        "optimizer.seed",
        description="What a seed is: of the run (methods that draw nothing are run once), or of the split of the data.",
    )


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        label: the name of its method in the file.
        lr: where there are several; else None.
        seed: None where the method draws nothing.
        recipe: its own, with its directory.
    """

    label: str
    lr: float | None
    seed: int | None
    recipe: Recipe

    @property
    def name(self) -> str:
        return _name(self.label, self.lr, self.seed)


@dataclass(frozen=True)
class Comparison:
    """All cells, in the order of the file, and the folder of their directories and of the report."""

    cells: tuple[Cell, ...]
    out: Path


def load(source: str | Path, overrides: Sequence[str] = ()) -> Comparison:
    """Reads a file, or one of those that are shipped by its name.

    An override, `section.field=value`, holds for every method that looks at the field, whatever it has of its own.

    Raises:
        RecipeError: in one line, for whatever is wrong with the file, a key or a value.
    """
    path = given_or_shipped(source, SHIPPED, "a comparison")
    shared = read_yaml(path, "sections of a recipe, and compare")
    section = shared.pop("compare", None)
    if section is None:
        raise RecipeError(f"{path} has no section compare: expected one with methods; `mezo-scale train` runs a recipe")
    known = [option.key for option in options()]
    own = [f"compare.{name}" for name in ("seeds", "vary")]
    given: Tree = {}
    for override in overrides:
        key, value = parse_override(override, [*known, *own])
        if key in own and isinstance(section, dict):
            section[key.removeprefix("compare.")] = value
        else:
            given[key] = value
    fields = [f"compare.{name}" for name in CompareSection.model_fields]
    asked = checked(CompareSection, section, f"{path}: compare", fields, f"expected {', '.join(fields)}")
    out = Path(given.pop("output.dir", None) or _taken(shared, "output", "dir") or Path("runs") / path.stem)
    trees = {label: _tree(label, fields, path) for label, fields in asked.methods.items()}
    _share(shared, given, trees, path)
    cells = [cell for label, tree in trees.items() for cell in _cells(label, tree, asked, out, path)]
    (name, count), *_ = Counter(cell.name for cell in cells).most_common(1)
    if count > 1:
        raise RecipeError(
            f"{path}: two runs would be called {name}: give methods other names, or rates that differ more"
        )
    return Comparison(tuple(cells), out)


def shipped() -> list[str]:
    """The names of the comparisons that come along: the paper's settings."""
    return names_in(SHIPPED)


def fields() -> Iterator[tuple[str, str]]:
    """(name, description) of every field of the section."""
    for name, field in CompareSection.model_fields.items():
        yield f"compare.{name}", field.description or ""


def _tree(label: str, sections: Mapping[str, Any], path: Path) -> Tree:
    """A method's own sections. Raises RecipeError."""
    where = f"{path}: compare.methods.{label}"
    if not _LABEL.fullmatch(label):
        raise RecipeError(f"{where}: expected a name of letters, digits, dots, dashes and underscores: folders bear it")
    for name, found in sections.items():
        if name not in Recipe.model_fields or not isinstance(found, dict):
            raise RecipeError(
                f"{where}.{name}: found {str(found)[:80]!r}, expected sections of a recipe "
                f"({', '.join(Recipe.model_fields)}) with their fields"
            )
    if "dir" in sections.get("output", {}):
        raise RecipeError(f"{where}.output.dir is given, but each run has its folder in output.dir: leave it out")
    return deepcopy(dict(sections))


def _share(shared: Tree, given: Tree, trees: Mapping[str, Tree], path: Path) -> None:
    """Puts what is shared, and what was given on the command line, where methods look at it.

    Raises:
        RecipeError: no method does.
    """
    common: Tree = {}
    for section, found in shared.items():
        if section not in Recipe.model_fields or not isinstance(found, dict | None):
            raise RecipeError(
                f"{path}: {section}: found {str(found)[:80]!r}, expected sections of a recipe "
                f"({', '.join(Recipe.model_fields)}) with their fields, and compare"
            )
        common |= {f"{section}.{name}": value for name, value in (found or {}).items()}
    for fixed, fields in ((False, common), (True, given)):
        for key, value in fields.items():
            section, name = key.split(".", 1)
            takers = [tree for tree in trees.values() if looks_at(_method(tree, shared), key)]
            if not takers:
                raise RecipeError(f"{path}: {key} is {value!r}, which none of the methods has a use for: leave it out")
            for tree in takers:
                own = tree.setdefault(section, {})
                own[name] = value if fixed else own.get(name, value)


def _method(tree: Tree, shared: Tree) -> str:
    """A method's name; of one that there is not, MeZO's: the check of its recipe says what is wrong."""
    name = _taken(tree, "method", "name") or _taken(shared, "method", "name") or "mezo"
    return name if name in ("adamw", "linear_probe", "icl", "zero_shot") else "mezo"


def _taken(tree: Tree, section: str, name: str) -> Any:
    return (tree.get(section) or {}).get(name)


def _cells(label: str, tree: Tree, asked: CompareSection, out: Path, path: Path) -> Iterator[Cell]:
    """The runs of a method. Raises RecipeError."""
    origin = f"{path}: compare.methods.{label}"
    section, field = asked.vary.split(".")
    if _taken(tree, section, field) is not None:
        raise RecipeError(f"{origin}: {asked.vary} is given, but compare.seeds says what it is: leave one of them out")
    grid = _taken(tree, "optimizer", "lr")
    rates = list(dict.fromkeys(grid)) if grid and isinstance(grid, list) else [None]
    varies = looks_at(_method(tree, {}), asked.vary)
    for lr, seed in itertools.product(rates, dict.fromkeys(asked.seeds) if varies else (None,)):
        own = deepcopy(tree)
        if lr is not None:
            own["optimizer"]["lr"] = lr
        if seed is not None:
            own.setdefault(section, {})[field] = seed
        recipe = parse(own, origin)
        rate = recipe.optimizer.lr if len(rates) > 1 else None
        directory = str(out / _name(label, rate, seed))
        checkpoint = recipe.output.checkpoint if "checkpoint" in own.get("output", {}) else False
        output = recipe.output.model_copy(update={"dir": directory, "checkpoint": checkpoint})
        recipe = recipe.model_copy(update={"output": output})
        every, steps = recipe.train.eval_every, recipe.train.steps
        if rate is not None and takes_steps(recipe.method.name) and (every == 0 or steps % every):
            raise RecipeError(
                f"{origin}: train.eval_every is {every}, but dev chooses among several optimizer.lr after the last of "
                f"{steps} steps: give a train.eval_every that divides them, such as {steps}"
            )
        yield Cell(label, rate, seed, recipe)


def _name(label: str, lr: float | None, seed: int | None) -> str:
    rate = "" if lr is None else f"-lr{lr:g}"
    return f"{label}{rate}" + ("" if seed is None else f"-seed{seed}")
