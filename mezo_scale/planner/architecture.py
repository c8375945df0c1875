"""A model as the planner sees it: what is gathered together, what is perturbed together, and how wide it gets.

Published shapes come from known.json, for which nothing heavy is imported (`tools/known_shapes.py` makes it, a test
compares it with the models). Any other is read from the model's modules on the meta device.
"""

import json
import math
from collections import Counter
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mezo_scale.errors import ModelError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig

KNOWN = Path(__file__).with_name("known.json")
Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Unit:
    """What is gathered at once (`models.units`): a decoder layer, an untied table, or the rest: the root.

    Attributes:
        kind: "layer", "table" or "root".
        shapes: of its parameters, each once.
        count: of such units, one after the other.
    """

    kind: str
    shapes: Shapes
    count: int = 1

    @property
    def numel(self) -> int:
        """Parameters of one of them."""
        return sum(map(math.prod, self.shapes))


@dataclass(frozen=True)
class Owner:
    """A module with parameters: its weights are perturbed together, and ZeRO-3 gathers them together.

    Attributes:
        kind: of the unit that its parameters belong to.
        lookup: a table of which only the rows that are looked up are perturbed.
        shapes: of its parameters, tied ones included.
        count: of such modules in the model.
    """

    kind: str
    lookup: bool
    shapes: Shapes
    count: int = 1

    @property
    def largest(self) -> int:
        return max(map(math.prod, self.shapes))


@dataclass(frozen=True)
class Architecture:
    """A model in numbers.

    Attributes:
        units: in the order in which a forward pass gathers them, the root first.
        owners: in the order of the modules.
        hidden: width of the residual stream.
        inner: values per token inside the widest part of a layer, as many as are alive at once.
        attention: the same inside attention: queries, keys and values and what is made of them.
        vocabulary: rows of the output table.
        hub: what the model is called on the hub, if its shape is a published one.
    """

    units: tuple[Unit, ...]
    owners: tuple[Owner, ...]
    hidden: int
    inner: int
    attention: int
    vocabulary: int
    hub: str | None = None

    @property
    def numel(self) -> int:
        """Parameters, tied ones once."""
        return sum(unit.numel * unit.count for unit in self.units)

    @property
    def layers(self) -> int:
        return sum(unit.count for unit in self.units if unit.kind == "layer")


def architecture_of(name: str) -> Architecture:
    """Of a model by name: a published shape, a name on the hub, a folder or its config.json.

    Raises:
        RecipeError: there is no such model.
        ModelError: it is quantised, no language model, or does not say how wide it is.
    """
    key = name.removeprefix("random:").lower()
    if key in _known():
        return _known()[key]
    from mezo_scale.models.shapes import config_of  # seconds to import

    return architecture(config_of(name))


_READ: dict[str, Architecture] = {}


def architecture(config: "PretrainedConfig") -> Architecture:
    """Of the model that this configuration describes. Raises ModelError: it does not say how wide it is."""
    from mezo_scale.models.shapes import skeleton

    key = f"{type(config).__name__} {config.to_json_string(use_diff=False)}"
    if key not in _READ:
        _READ[key] = _read(skeleton(config), config.get_text_config())
    return _READ[key]


@cache
def _known() -> dict[str, Architecture]:
    """The published shapes, by their short names and by those on the hub."""
    known = {}
    for name, tree in json.loads(KNOWN.read_text(encoding="utf-8")).items():
        units = tuple(Unit(**unit | {"shapes": _tuples(unit["shapes"])}) for unit in tree.pop("units"))
        owners = tuple(Owner(**owner | {"shapes": _tuples(owner["shapes"])}) for owner in tree.pop("owners"))
        known[name] = known[tree["hub"].lower()] = Architecture(units, owners, **tree)
    return known


def _tuples(shapes: list[list[int]]) -> Shapes:
    return tuple(map(tuple, shapes))


def _read(model: "nn.Module", config: "PretrainedConfig") -> Architecture:
    from torch import nn

    from mezo_scale.models.units import units

    parts = units(model)
    unit_of = {module: number for number, part in enumerate(parts) for module in part.module.modules()}
    seen: set[int] = set()
    shapes: list[list[tuple[int, ...]]] = [[] for _ in parts]
    owners: Counter[Owner] = Counter()
    for module in model.modules():
        own = [parameter for parameter in module._parameters.values() if parameter is not None]
        for parameter in own:
            if id(parameter) not in seen:
                seen.add(id(parameter))
                shapes[unit_of[module]].append(tuple(parameter.shape))
        if own:
            kind, lookup = parts[unit_of[module]].kind, isinstance(module, nn.Embedding)
            owners[Owner(kind, lookup, tuple(tuple(parameter.shape) for parameter in own))] += 1
    alike = groupby((part.kind, tuple(own)) for part, own in zip(parts, shapes, strict=True))
    hidden = _field(config, "hidden_size")
    layers = [part.module for part in parts if part.kind == "layer"]
    inner, attention = _widths(layers[0], config) if layers else (hidden, hidden)
    return Architecture(
        tuple(Unit(kind, own, len(list(group))) for (kind, own), group in alike),
        tuple(Owner(owner.kind, owner.lookup, owner.shapes, count) for owner, count in owners.items()),
        hidden,
        inner,
        attention,
        _field(config, "vocab_size"),
    )


def _field(config: "PretrainedConfig", name: str) -> int:
    """A width that the arithmetic needs. Raises ModelError: the configuration has none, or one per layer."""
    try:
        value = getattr(config, name, None)
    except RuntimeError:  # transformers', where layers differ
        value = None
    if not isinstance(value, int):
        raise ModelError(
            f"a {config.model_type} model can't be planned: its configuration has {name} {value}, expected one number "
            "for all layers, for the arithmetic is that of attention; measure the model with mezo-scale bench"
        )
    return value


def _widths(layer: "nn.Module", config: Any) -> tuple[int, int]:
    """(inner, attention) of `Architecture`, from the widths of a layer's matrices."""
    from torch import nn

    widths = [module.out_features for module in layer.modules() if isinstance(module, nn.Linear)]
    widest = max(widths, default=_field(config, "hidden_size"))
    # The activation function is given one tensor and makes another; a gated one makes the product besides.
    inner = (widths.count(widest) + 1) * widest
    heads = _field(config, "num_attention_heads")
    width = int(getattr(config, "head_dim", None) or config.hidden_size // heads) * heads
    shared = int(getattr(config, "num_key_value_heads", None) or heads) * width // heads
    # Queries, keys and values, the keys and values repeated for all query heads, and what comes out.
    return inner, 2 * width + 2 * shared + (2 * width if shared < width else 0)
