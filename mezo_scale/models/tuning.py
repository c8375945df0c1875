"""Which weights of a model are tuned: all, some of its own by name, or those of an adapter that is put into it."""

import difflib
import fnmatch
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mezo_scale.distributed.world import World
from mezo_scale.errors import ModelError, RecipeError, SharedError, one_line
from mezo_scale.models import adapters, checkpoints, heads, prefix
from mezo_scale.models.shapes import skeleton
from mezo_scale.recipe import Recipe, TuneSection
from mezo_scale.sharding import schemes
from mezo_scale.sharding.discovery import places, shard_of
from mezo_scale.sharding.plain import Plain


def check(recipe: Recipe) -> None:
    """What can be said of `tune` without a weight: tries it on the bare modules. Raises RecipeError, ModelError."""
    section, name = recipe.tune, recipe.model.name
    found = checkpoints.find(name)
    if section.what == "prefix" and heads.is_image(found):
        raise RecipeError(
            f"tune.what is prefix, but {name} is an image classifier, which keeps no keys and values before its input: "
            "set tune.what to lora"
        )
    if section.what in ("full", "prefix"):
        return
    model = skeleton(found)
    model.requires_grad_(False)
    if section.what in ("head", "names"):
        _release_(_names(model, section), model)
        return
    config = adapters.read(Path(str(section.adapter)))[0] if section.adapter else adapters.config_of(section, name)
    if not prefix.is_prefix(config) or section.what == "peft":
        if recipe.sharding.strategy not in ("single", "ddp") and not adapters.is_plain(config):
            raise RecipeError(
                f"tune: with sharding.strategy {recipe.sharding.strategy}, LORA and IA3 in their plain form can be put "
                f"into a model, and this {config.peft_type.value} may read or copy weights that are elsewhere: set "
                "sharding.strategy to single or ddp, or take a plain one"
            )
        adapters.inject_(model, config, seed=0)
        _check_tunes(model)


def tune_(model: Any, recipe: Recipe, world: World) -> None:
    """Freezes what is not tuned, and puts in the adapter, the same on every rank. Every rank calls it.

    The model may be sharded; an adapter is whole on each rank.

    Raises:
        RecipeError, ModelError: as `check`.
        SharedError: the model can't have a prefix, or can't be called with its adapter as tasks call it.
    """
    section = recipe.tune
    if section.what == "full":
        return
    model.requires_grad_(False)
    if section.what in ("head", "names"):
        _release_(_names(model, section), model)
        return
    seed = recipe.optimizer.seed if section.init_seed is None else section.init_seed
    dtype = getattr(torch, recipe.model.dtype)
    compute_dtype = getattr(torch, recipe.model.compute_dtype or recipe.model.dtype)
    if section.what == "prefix":
        adapters.library()
        states = prefix.activations(model, section.num_virtual_tokens, seed, world.device)
        config = prefix.config_for(states, recipe.model.name)
        prefix.attach_(model, config, world.device, dtype, compute_dtype)
        adapters.put_(model, {prefix.SAVED: prefix.flat(states)}, "the prefix")
    elif section.what == "adapter":
        attach_saved_(model, Path(str(section.adapter)), world.device, dtype, compute_dtype)
    else:
        _inject_(model, adapters.config_of(section, recipe.model.name), seed, world.device, dtype)
    adapters.same_on_all_(model)
    _check_tunes(model)
    _check_call(model, world)


def attach_saved_(
    model: Any, folder: Path, device: torch.device, dtype: torch.dtype, compute_dtype: torch.dtype | None = None
) -> None:
    """Puts a saved adapter into a frozen model. Raises RecipeError, ModelError as `adapters.read` and `put_` do."""
    config, tensors = adapters.read(folder)
    if prefix.is_prefix(config):
        own = prefix.config_for(prefix.activations(model, config.num_virtual_tokens, 0, device), str(folder))
        for field in ("num_layers", "num_attention_heads", "token_dim"):
            if getattr(config, field) != getattr(own, field):
                raise ModelError(
                    f"{folder}: {field} is {getattr(config, field)}, expected {getattr(own, field)}: it is a prefix of "
                    "another model"
                )
        config.prefix_projection = False  # what is saved are the keys and values that it gave
        prefix.attach_(model, config, device, dtype, compute_dtype or dtype)
    else:
        _inject_(model, config, 0, device, dtype)
    adapters.put_(model, tensors, str(folder))


def only_(model: nn.Module, names: Collection[str]) -> None:
    """Tunes the parameters of these names, as a trajectory lists them, and no other."""
    for name, param in model.named_parameters():
        param.requires_grad_(name in names)


def virtual_tokens(section: TuneSection) -> int:
    """How many positions before every text a prefix takes. Raises RecipeError, ModelError as `adapters.read` does."""
    if section.what == "prefix":
        return section.num_virtual_tokens
    config: Any = adapters.read(Path(section.adapter))[0] if section.adapter else None
    return config.num_virtual_tokens if prefix.is_prefix(config) else 0


def sizes(model: nn.Module) -> tuple[int, int]:
    """How many elements of the whole model are tuned, and how many are frozen."""
    counts = {True: 0, False: 0}
    for place in {place.identity: place for place in places(model)}.values():
        counts[place.trainable] += shard_of(place).numel
    return counts[True], counts[False]


def _inject_(model: nn.Module, config: Any, seed: int, device: torch.device, dtype: torch.dtype) -> None:
    adapters.inject_(model, config, seed)
    for tensor in (*model.parameters(), *model.buffers()):
        if isinstance(schemes.find(tensor), Plain):  # what is sharded stays where it is
            tensor.data = tensor.data.to(device, dtype if tensor.requires_grad else None)


def _names(model: Any, section: TuneSection) -> list[str]:
    """Of the parameters that head or names stand for. Raises RecipeError."""
    every = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    if section.what == "head":
        return _head(model, every)
    found: list[str] = []
    for pattern in section.names or ():
        matches = fnmatch.filter(every, pattern)
        if not matches:
            near = difflib.get_close_matches(pattern, every, n=3, cutoff=0)
            raise RecipeError(f"tune.names: no parameter is called {pattern}; the nearest are {', '.join(near)}")
        found += matches
    return found


def _head(model: Any, every: Iterable[str]) -> list[str]:
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None:
        raise RecipeError("tune.what is head, but this model has no output embedding: set tune.what to names")
    inside = {id(param) for param in head.parameters()}
    owners = dict(model.named_parameters(remove_duplicate=False))
    names = [name for name in every if id(owners[name]) in inside]
    if embeddings is not None and head.weight is embeddings.weight:
        raise RecipeError(
            "tune.what is head, but this model's is tied to its input embedding, which would move with it: to tune "
            f"both, set tune.what to names and tune.names to [{names[0]}]"
        )
    return names


def _release_(names: Collection[str], model: nn.Module) -> None:
    for name, param in model.named_parameters(remove_duplicate=False):
        if name in names:
            param.requires_grad_(True)


def _check_tunes(model: nn.Module) -> None:
    """Raises RecipeError unless the adapter in the model has something to tune, and PEFT saves all of that."""
    tuned = {name: param for name, param in model.named_parameters() if param.requires_grad}
    if not tuned:
        raise RecipeError("tune: this adapter has nothing to tune: give it modules that the model has")
    if any(param.is_meta for param in tuned.values()):
        return
    kept = {tensor.data_ptr() for tensor in adapters.state(model).values()}
    if lost := [name for name, param in tuned.items() if param.data_ptr() not in kept]:
        raise RecipeError(f"tune.peft: the method tunes {lost[0]}, which PEFT does not save: take another method")


def _check_call(model: nn.Module, world: World) -> None:
    config: Any = model.config
    try:
        with torch.no_grad():
            if heads.is_image(config):
                size = config.image_size
                sides = (size, size) if isinstance(size, int) else tuple(size)
                dtype = next(model.parameters()).dtype
                model(pixel_values=torch.zeros(2, config.num_channels, *sides, device=world.device, dtype=dtype))
            else:
                ids = torch.zeros(2, 4, dtype=torch.long, device=world.device)
                model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    except Exception as error:  # a method may ask for arguments of its own
        raise SharedError(
            f"tune: with this adapter the model can't be called as a task does ({one_line(error)})"
        ) from None
