"""Adapters of PEFT: put into a model, which keeps its class and its signature, and kept in PEFT's own folders.

An adapter is put in after the model was sharded: it is small, and whole on every rank.
"""

import copy
import dataclasses
import difflib
import json
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, load_file, save, save_file
from torch import Tensor, nn

from mezo_scale import collectives
from mezo_scale.errors import MezoError, ModelError, RecipeError, one_line
from mezo_scale.models import prefix
from mezo_scale.recipe import TuneSection
from mezo_scale.sharding.fingerprint import local_hash
from mezo_scale.sharding.gather import stored
from mezo_scale.sharding.shard import Shard, memory_of

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_ROUNDING = 1e-3  # what merging may change of a logit, relative to the largest
_OF_THE_FILE = ("peft_type", "task_type", "inference_mode", "auto_mapping", "peft_version")
"""Fields that say how a configuration was written, or whose value follows."""

_WHERE = ("target_modules", "exclude_modules", "fan_in_fan_out")
_FREE: dict[str, tuple[str, ...]] = {
    "LORA": (
        *_WHERE,
        *("r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern"),
        *("layers_to_transform", "layers_pattern"),
    ),
    "IA3": (*_WHERE, "feedforward_modules"),
}
"""Fields that may have any value in a plain adapter (`is_plain`), by method."""

_INSIDE = "base_model.model."  # where PEFT's saved names find the base model


def config_of(section: TuneSection, base: str) -> Any:
    """PEFT's configuration of a new adapter of `base`. Raises RecipeError, in one line."""
    if section.what == "lora":
        targets: Any = "all-linear" if section.target_modules == ("all-linear",) else section.target_modules
        fields = {"r": section.r, "lora_alpha": section.alpha, "target_modules": targets}
        return _config("LORA", fields, base)
    fields = dict(section.peft or {})
    kind = str(fields.pop("peft_type", None)).upper()
    return _config(kind, fields, base)


def _config(kind: str, fields: Mapping[str, Any], base: str) -> Any:
    peft = library()
    kinds = {str(one.value): config for one, config in peft.PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if kind not in kinds:
        raise RecipeError(f"tune.peft.peft_type: found {kind}, expected {_nearest(kind, kinds)}")
    known = {field.name for field in dataclasses.fields(kinds[kind])} - {"task_type", "peft_type", "inference_mode"}
    for name in fields:
        if name not in known:
            raise RecipeError(f"tune.peft.{name}: {kind} has no such field; did you mean {_nearest(name, known)}?")
    try:
        return kinds[kind](**{"base_model_name_or_path": base, **fields, "task_type": "CAUSAL_LM"})
    except Exception as error:  # each method checks its fields in a way of its own
        raise RecipeError(f"tune.peft: {kind} does not take these fields ({one_line(error)})") from None


def library() -> Any:
    """PEFT. Raises RecipeError where it is not installed."""
    try:
        import peft
    except ImportError:
        raise RecipeError(
            "tune: adapters need PEFT, which is not installed: pip install 'mezo-scale[adapters]'"
        ) from None
    return peft


def inject_(model: nn.Module, config: Any, seed: int) -> None:
    """Puts an adapter into a frozen model, on the meta device as well; its weights are drawn from the seed.

    Raises:
        RecipeError: PEFT can't do it in this model, or it would change the base model's weights.
    """
    peft, kind = library(), config.peft_type.value
    is_empty = any(param.is_meta for param in model.parameters())
    if config.is_prompt_learning:
        raise RecipeError(
            f"tune.peft: {kind} puts its tokens before the text in a way that models of this task don't take: set "
            "tune.what to prefix, or take a method that changes modules, like LORA or IA3"
        )
    _suit(config, model)
    with torch.random.fork_rng(devices=[]), _base_kept(model, config):
        torch.manual_seed(seed)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "fan_in_fan_out")  # PEFT sees how weights lie, and says it has
                peft.inject_adapter_in_model(config, model, low_cpu_mem_usage=is_empty)
        except Exception as error:  # each method fails in a way of its own
            raise RecipeError(
                f"tune: PEFT can't put {kind} into this model ({one_line(error)}){_instead(config, model)}"
            ) from None
    model.eval()


def _instead(config: Any, model: nn.Module) -> str:
    """What could have been named, where none of the modules that are is there; else nothing."""
    wanted = getattr(config, "target_modules", None)
    names = [name for name, _ in model.named_modules() if name]
    if not wanted or isinstance(wanted, str) or any(f".{name}".endswith(f".{one}") for name in names for one in wanted):
        return ""
    owners = {name.rpartition(".")[2] for name, module in model.named_modules() if module._parameters}
    return f": name some of its modules, which are called {', '.join(sorted(owners))}"


def _suit(config: Any, model: Any) -> None:
    """PEFT's class for causal language models takes none that can't write: a masked one has none of its own."""
    if not model.can_generate():
        config.task_type = None


@contextmanager
def _base_kept(model: nn.Module, config: Any) -> Iterator[None]:
    """Raises RecipeError if what is done inside changes the base model's own weights."""
    if is_plain(config) or any(param.is_meta for param in model.parameters()):
        yield
        return
    before = stored(model)[0]
    total = local_hash(before)
    yield
    if local_hash(before) != total or _places(before) - _places(stored(model)[0]):
        raise RecipeError(
            f"tune: this {config.peft_type.value} begins by changing the base model's own weights, so what is saved "
            "would not fit the base model: take another initialisation or method"
        )


def is_plain(config: Any) -> bool:
    """Whether an adapter is known to begin without a look at the base model's weights, and to leave them alone.

    Under sharding those are elsewhere, and most methods would take what is there for the whole.
    """
    free = _FREE.get(config.peft_type.value)
    if free is None:
        return False
    fresh = type(config)()
    return all(
        getattr(config, field.name) == getattr(fresh, field.name)
        for field in dataclasses.fields(config)
        if field.name not in free and field.name not in (*_OF_THE_FILE, "base_model_name_or_path", "revision")
    )


def _places(shards: list[Shard]) -> set[tuple[object, ...]]:
    return {memory_of(shard.local) for shard in shards if shard.paged is None}


def config_in(model: nn.Module) -> Any:
    """The configuration of the adapter that was put into a model; None if none was."""
    return (vars(model).get("peft_config") or {}).get("default")


def state(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's own tensors, by the names that PEFT saves them under."""
    config = config_in(model)
    if prefix.is_prefix(config):
        return {prefix.SAVED: prefix.weight(model).detach()}
    found = library().get_peft_model_state_dict(model, model.state_dict(), save_embedding_layers=False)
    return {_INSIDE + name: tensor for name, tensor in found.items()}


def put_(model: nn.Module, tensors: Mapping[str, Tensor], origin: str) -> None:
    """Gives the adapter in a model other values. Raises ModelError unless they are just what it has places for."""
    own = state(model)
    if odd := sorted(own.keys() ^ tensors.keys()):
        which = "lacks" if odd[0] in own else "has a place in this model for all but"
        raise ModelError(f"{origin} {which} {odd[0]} ({len(odd)} in all): it is an adapter of another model or method")
    for name, tensor in tensors.items():
        if own[name].shape != tensor.shape:
            raise ModelError(
                f"{origin}: {name} is {list(tensor.shape)}, expected {list(own[name].shape)}: it is an adapter of "
                "another model"
            )
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
    now = state(model)
    if lost := next((name for name, tensor in own.items() if not torch.equal(now[name], tensor)), None):
        raise ModelError(f"{origin}: {lost} can't be set, as this method saves it in another form than it keeps it")


def write(model: nn.Module, folder: Path) -> list[Path]:
    """Writes an adapter as `PeftModel.from_pretrained` reads it, into a folder that is there. Returns the files."""
    tensors = {name: tensor.cpu().clone().contiguous() for name, tensor in state(model).items()}
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    config = copy.copy(config_in(model))
    for name, value in vars(config).items():
        if isinstance(value, set):
            setattr(config, name, sorted(value))  # the same file every time
    config.inference_mode = True
    config.save_pretrained(str(folder))
    return [folder / WEIGHTS_FILE, folder / CONFIG_FILE]


def read(folder: Path) -> tuple[Any, dict[str, Tensor]]:
    """The configuration and the tensors of a saved adapter; only JSON and safetensors are read.

    Raises:
        RecipeError: the folder holds none.
        ModelError: it can't be read, or its configuration has what this PEFT does not know.
    """
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / file).is_file():
            raise RecipeError(f"{folder} has no {file}: expected an adapter as PEFT's save_pretrained leaves it")
    try:
        fields = dict(json.loads((folder / CONFIG_FILE).read_bytes()))
        tensors = load_file(folder / WEIGHTS_FILE)
    except Exception as error:  # safetensors has errors of its own
        raise ModelError(f"the adapter {folder} can't be read ({one_line(error)})") from None
    kind = str(fields.get("peft_type")).upper()
    fields = {name: value for name, value in fields.items() if name not in _OF_THE_FILE}
    mapping = {str(one.value): config for one, config in library().PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    known = {field.name for field in dataclasses.fields(mapping[kind])} if kind in mapping else set(fields)
    # What another version of PEFT knows and does not use here may be left out.
    fields = {name: value for name, value in fields.items() if name in known or value}
    try:
        return _config(kind, fields, str(fields.get("base_model_name_or_path") or "")), tensors
    except RecipeError as error:
        raise ModelError(f"{folder / CONFIG_FILE}: {error}") from None


def base_of(folder: Path) -> str:
    """The name of the model that a saved adapter says it belongs to; empty if it says none. Errors as of `read`."""
    return str(read(folder)[0].base_model_name_or_path or "")


def merged(model: Any, folder: Path) -> nn.Module:
    """A base model in float32 with an adapter added to its weights; it is changed in place.

    Raises:
        RecipeError, ModelError: as `read`; or the adapter is another model's, or of a kind that can't be merged.
    """
    config, tensors = read(folder)
    kind = config.peft_type.value
    if config.is_prompt_learning:
        raise ModelError(
            f"{folder} is a {kind}, which adds tokens or keys and values and changes no weight, so there is nothing to "
            "merge: load it with PEFT beside its base model"
        )
    probe = torch.arange(8)[None] % model.config.get_text_config().vocab_size
    with torch.no_grad():
        try:
            _suit(config, model)
            with _base_kept(model, config):
                wrapped = library().get_peft_model(model, config).eval()
            put_(model, tensors, str(folder))
            apart = model(input_ids=probe).logits
            found: nn.Module = wrapped.merge_and_unload(safe_merge=True)
        except MezoError:
            raise
        except Exception as error:  # a method that can't be merged says so in a way of its own
            raise ModelError(f"{folder} is a {kind}, which can't be merged ({one_line(error)})") from None
        difference = (found(input_ids=probe).logits - apart).abs().max() / apart.abs().max()
    if not difference < _ROUNDING:
        raise ModelError(
            f"{folder} is a {kind}, and merged it computes something else (logits differ by {float(difference):.2g}): "
            "it can't be merged; load it with PEFT beside its base model"
        )
    return found


def same_on_all_(model: nn.Module) -> None:
    """Gives every rank rank 0's adapter. Every rank calls it."""
    if not collectives.is_distributed():
        return
    mine = {name: tensor.cpu().clone().contiguous() for name, tensor in state(model).items()}
    data = collectives.broadcast_bytes(save(mine) if collectives.rank() == 0 else None)
    put_(model, load(data), "rank 0's adapter")


def _nearest(name: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.3)
    return close[0] if close else f"one of {', '.join(sorted(known))}"
