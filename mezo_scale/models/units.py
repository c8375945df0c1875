"""The units of a model: what is gathered together, whoever shards, plans or measures it."""

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torch.distributed.fsdp import FSDPModule


@dataclass(frozen=True)
class Unit:
    """A part of a model that is sharded, gathered and freed at once, without the units inside it.

    Attributes:
        kind: "root" for the model itself, with what no other unit has; "table" for untied embeddings and their head;
            "layer" for a decoder layer.
        name: of the module in `model.named_modules()`; of the root "".
        module: it.
    """

    kind: Literal["root", "table", "layer"]
    name: str
    module: nn.Module


def units(model: Any) -> tuple[Unit, ...]:
    """The units of a language model, sharded or not, in the order in which a forward pass gathers them.

    The root comes first: its weights stay while the others come and go. A layer is what the architecture says must not
    be split (`_no_split_modules`); where it names a module and another inside of it, as Mamba's block and mixer, the
    outer one is the layer, and what holds a table is none. Tied tables are one weight in two modules, and belong to the
    root.
    """
    embeddings, head = _tables(model)
    untied = head is not None and embeddings.weight is not head.weight
    names = set(getattr(model, "_no_split_modules", None) or ())
    first, layers, last = [], [], []
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():  # the outer before the inner
        if module is embeddings and untied:
            first.append(Unit("table", name, module))
        elif module is head and untied:
            last.append(Unit("table", name, module))
        elif _class_name(module) in names and module not in inside and not {embeddings, head} & set(module.modules()):
            layers.append(Unit("layer", name, module))
            inside.update(module.modules())
    return (Unit("root", "", model), *first, *layers, *last)


def _tables(model: Any) -> tuple[Any, Any]:
    """What a model reads its input with, and its head; each None where it has none."""
    try:
        embeddings = model.get_input_embeddings()
    except NotImplementedError:  # of image classifiers
        embeddings = None
    return embeddings, model.get_output_embeddings()


def _class_name(module: nn.Module) -> str:
    """As the architecture calls it: `fully_shard` gives the modules that it wraps a class of their own."""
    name = type(module).__name__
    return name.removeprefix("FSDP") if isinstance(module, FSDPModule) else name
