"""A model as the planner sees it: what is gathered together, what is perturbed together, and how wide it gets.

Read from the model's modules on the meta device, so that any architecture that transformers knows can be planned.
"""

import math
from dataclasses import dataclass

from torch import nn
from transformers import PretrainedConfig

from mezo_scale.errors import ModelError
from mezo_scale.models.shapes import skeleton
from mezo_scale.models.units import units

Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Unit:
    """What FSDP2 gathers at once (`models.shard_fsdp2`): a decoder layer, an untied table, or the rest: the root.

    Attributes:
        kind: "layer", "table" or "root".
        shapes: of its parameters, each once.
    """

    kind: str
    shapes: Shapes

    @property
    def numel(self) -> int:
        return sum(map(math.prod, self.shapes))


@dataclass(frozen=True)
class Owner:
    """A module with parameters: its weights are perturbed together, and ZeRO-3 gathers them together.

    Attributes:
        unit: position in `Architecture.units` of the one that its parameters belong to.
        lookup: a table of which only the rows that are looked up are perturbed.
        shapes: of its parameters, tied ones included.
    """

    unit: int
    lookup: bool
    shapes: Shapes

    @property
    def numel(self) -> int:
        return sum(map(math.prod, self.shapes))


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
    """

    units: tuple[Unit, ...]
    owners: tuple[Owner, ...]
    hidden: int
    inner: int
    attention: int
    vocabulary: int

    @property
    def numel(self) -> int:
        """Parameters, tied ones once."""
        return sum(unit.numel for unit in self.units)

    @property
    def layers(self) -> int:
        return sum(unit.kind == "layer" for unit in self.units)


_KNOWN: dict[str, Architecture] = {}


def architecture(config: PretrainedConfig) -> Architecture:
    """Of the model that this configuration describes. Raises ModelError: it does not say how wide it is."""
    key = f"{type(config).__name__} {config.to_json_string(use_diff=False)}"
    if key not in _KNOWN:
        _KNOWN[key] = _read(skeleton(config), config.get_text_config())
    return _KNOWN[key]


def _read(model: nn.Module, config: PretrainedConfig) -> Architecture:
    parts = units(model)
    unit_of = {module: number for number, part in enumerate(parts) for module in part.module.modules()}
    seen: set[int] = set()
    shapes: list[list[tuple[int, ...]]] = [[] for _ in parts]
    owners = []
    for module in model.modules():
        own = [parameter for parameter in module._parameters.values() if parameter is not None]
        for parameter in own:
            if id(parameter) not in seen:
                seen.add(id(parameter))
                shapes[unit_of[module]].append(tuple(parameter.shape))
        if own:
            lookup = isinstance(module, nn.Embedding)
            owners.append(Owner(unit_of[module], lookup, tuple(tuple(parameter.shape) for parameter in own)))
    planned = tuple(Unit(part.kind, tuple(own)) for part, own in zip(parts, shapes, strict=True))
    hidden = _field(config, "hidden_size")
    layers = [part.module for part in parts if part.kind == "layer"]
    inner, attention = _widths(layers[0], config) if layers else (hidden, hidden)
    return Architecture(planned, tuple(owners), hidden, inner, attention, _field(config, "vocab_size"))


def _field(config: PretrainedConfig, name: str) -> int:
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


def _widths(layer: nn.Module, config: PretrainedConfig) -> tuple[int, int]:
    """(inner, attention) of `Architecture`, from the widths of a layer's matrices."""
    widths = [module.out_features for module in layer.modules() if isinstance(module, nn.Linear)]
    widest = max(widths, default=_field(config, "hidden_size"))
    # The activation function is given one tensor and makes another; a gated one makes the product besides.
    inner = (widths.count(widest) + 1) * widest
    heads = _field(config, "num_attention_heads")
    width = int(getattr(config, "head_dim", None) or config.hidden_size // heads) * heads
    shared = int(getattr(config, "num_key_value_heads", None) or heads) * width // heads
    # Queries, keys and values, the keys and values repeated for all query heads, and what comes out.
    return inner, 2 * width + 2 * shared + (2 * width if shared < width else 0)
