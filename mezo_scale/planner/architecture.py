"""A model as the planner sees it: what is gathered together, what is perturbed together, and how wide it gets.

Read from the model's modules on the meta device, so that any architecture that transformers knows can be planned.
"""

import math
from dataclasses import dataclass

from torch import nn
from transformers import PretrainedConfig

from mezo_scale.models.shapes import skeleton

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
    """Of the model that this configuration describes."""
    key = f"{type(config).__name__} {config.to_json_string(use_diff=False)}"
    if key not in _KNOWN:
        _KNOWN[key] = _read(skeleton(config), config.get_text_config())
    return _KNOWN[key]


def _read(model: nn.Module, config: PretrainedConfig) -> Architecture:
    names = set(getattr(model, "_no_split_modules", None) or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    embed, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is None or embed.weight is head.weight
    tables = [] if tied else [embed, head]
    roots = [model, *tables[:1], *layers, *tables[1:]]  # in the order of their forward passes
    unit_of = {module: number for number, root in enumerate(roots) for module in root.modules()}  # the innermost wins
    seen: set[int] = set()
    shapes: list[list[tuple[int, ...]]] = [[] for _ in roots]
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
    kinds = ["root", *["table"] * len(tables[:1]), *["layer"] * len(layers), *["table"] * len(tables[1:])]
    units = tuple(Unit(kind, tuple(own)) for kind, own in zip(kinds, shapes, strict=True))
    hidden = int(config.hidden_size)
    inner, attention = _widths(layers[0], config) if layers else (hidden, hidden)
    return Architecture(units, tuple(owners), hidden, inner, attention, int(config.vocab_size))


def _widths(layer: nn.Module, config: PretrainedConfig) -> tuple[int, int]:
    """(inner, attention) of `Architecture`, from the widths of a layer's matrices."""
    widths = [module.out_features for module in layer.modules() if isinstance(module, nn.Linear)]
    widest = max(widths, default=int(config.hidden_size))
    # The activation function is given one tensor and makes another; a gated one makes the product besides.
    inner = (widths.count(widest) + 1) * widest
    heads = int(config.num_attention_heads)
    width = int(getattr(config, "head_dim", None) or config.hidden_size // heads) * heads
    shared = int(getattr(config, "num_key_value_heads", None) or heads) * width // heads
    # Queries, keys and values, the keys and values repeated for all query heads, and what comes out.
    return inner, 2 * width + 2 * shared + (2 * width if shared < width else 0)
