"""Checkpoints: what transformers and DeepSpeed read, checked on the way in.

Only safetensors of the checkpoint's own folder are read, and no code that comes with a model is run. ``random:SHAPE``
names a model that nobody has to download: random weights of a published shape, for rehearsals and measurements.
"""

import json
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoTokenizer, ByT5Tokenizer
from transformers.utils import ADAPTER_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from mezo_scale import noise
from mezo_scale.errors import ModelError, RecipeError, one_line
from mezo_scale.models import heads
from mezo_scale.models.shapes import config_of
from mezo_scale.models.vision import ImageReader
from mezo_scale.recipe import means_disk
from mezo_scale.sharding import discover

RANDOM = "random:"
_SEED = 2**64 - 1  # of random weights; the steps' seeds are hashes


def silence_transformers() -> None:
    """Keep transformers' notices and progress bars out of a command's lines; a library leaves them as they are."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def find(name: str) -> Any:
    """The configuration of a model that could be tuned.

    Raises:
        RecipeError: there is no such model.
        ModelError: it is quantised, an adapter, neither a language model nor an image classifier, or is made of more
            than safetensors.
    """
    if name.startswith(RANDOM):
        return config_of(name.removeprefix(RANDOM))
    if means_disk(name) and not Path(name).is_dir():
        raise RecipeError(f"model.name: there is no folder {name}; expected a Hugging Face checkpoint")
    try:
        adapter = _file(name, ADAPTER_CONFIG_NAME)
        config = None if adapter else AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # the hub's client has roots of its own
        if means_disk(name):
            what, remedy = "holds no checkpoint", "give a folder that does"
        else:
            what = "is neither a folder nor a model that the hub gives"
            remedy = "where there is no way to the hub, copy the model's folder from elsewhere, and give that"
        raise RecipeError(f"model.name: {name} {what} ({one_line(error, 200)}): {remedy}") from None
    if config is None:
        raise ModelError(
            f"model.name: {name} holds an adapter ({ADAPTER_CONFIG_NAME}): to tune it further, set model.name to its "
            f"base model, tune.what to adapter and tune.adapter to {name}; to tune all weights, give what "
            f"`mezo-scale merge {name} OUT` makes"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            f"model.name: {name} is quantised, and quantised weights can't take small updates: give a checkpoint in "
            "float32, bfloat16 or float16"
        )
    heads.check(f"model.name: {name}", config)
    _check_files(name, config)
    return config


def _check_files(name: str, config: Any) -> None:
    """Raises ModelError unless all that transformers would read or run for the weights is safetensors and its own."""
    explicit = getattr(config, "transformers_weights", None)
    for file in _weight_files(name, explicit or SAFE_WEIGHTS_INDEX_NAME):
        path = PurePath(str(file))
        if not str(file).endswith(".safetensors") or path.is_absolute() or ".." in path.parts:
            raise ModelError(
                f"model.name: {name} names {str(file)[:100]!r} as a file of its weights, expected only files in its "
                "own folder that end in .safetensors: save it anew with save_pretrained, or take another copy"
            )
    for part in (config, *(getattr(config, sub, None) for sub in getattr(config, "sub_configs", ()))):
        attention = getattr(part, "_attn_implementation", None)
        if isinstance(attention, str) and "/" in attention:
            raise ModelError(
                f"model.name: {name} asks for the attention kernel {attention[:100]!r}, which is code from the hub, "
                "and no such code is run: take attn_implementation out of its config.json"
            )


def _weight_files(name: str, entry: Any) -> Iterator[Any]:
    """The files that a checkpoint says its weights are in, where `entry` is one of them or their index."""
    if not str(entry).endswith(".index.json"):
        yield entry
        return
    if PurePath(entry).name != entry:
        yield entry  # an index elsewhere is no file of weights either
        return
    path = _file(name, entry)
    if path is None:
        return
    try:
        yield from set(json.loads(path.read_bytes())["weight_map"].values())
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise ModelError(f"model.name: {path} is no index of weights ({one_line(error)})") from None


def weight_files(name: str) -> list[Path]:
    """The files of a model's weights that are there; none of a model with random weights. Errors as of `find`."""
    if name.startswith(RANDOM):
        return []
    explicit = getattr(find(name), "transformers_weights", None)
    for entry in (explicit,) if explicit else (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME):
        paths = [path for file in sorted(_weight_files(name, entry)) if (path := _file(name, file)) is not None]
        if paths:
            return paths
    return []


def _file(name: str, file: str) -> Path | None:
    """A file of a checkpoint, from its folder or the hub; None if it has none of that name."""
    found = cached_file(
        name, file, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
    )
    return None if found is None else Path(found)


def load_processor(name: str) -> Any:
    """What a model's input is made with: its tokenizer, of random weights one of bytes; of an image classifier an
    `ImageReader`. Raises ModelError if it can't be read."""
    if name.startswith(RANDOM):
        masked = heads.is_masked(config_of(name))
        return ByT5Tokenizer(mask_token="<extra_id_0>") if masked else ByT5Tokenizer()
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception:  # a folder with a tokenizer alone is enough to show tokens
        config = None
    if heads.is_image(config):
        return ImageReader.load(name, config)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise anything here
        raise ModelError(f"model.name: the tokenizer of {name} can't be read ({one_line(error)})") from None
    if tokenizer.pad_token_id is None:  # never looked at: padding is masked
        tokenizer.pads_with_text = tokenizer.eos_token_id is None  # then it is not saved, or that token became special
        tokenizer.pad_token_id = tokenizer.eos_token_id or 0
    return tokenizer


def read(name: str, dtype: torch.dtype, **kwargs: Any) -> nn.Module:
    """A checkpoint as transformers reads it, in evaluation mode, on the CPU if `kwargs` say nothing else.

    Raises:
        RecipeError, ModelError: as of `find`.
        ModelError: it can't be read, or lacks weights (transformers would make them up).
    """
    config = find(name)
    if name.startswith(RANDOM):
        random = heads.made(config, dtype=dtype)
        randomise_(random)
        return random.eval()
    model: nn.Module
    try:
        model, report = heads.auto_class(config).from_pretrained(
            name, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True, **kwargs
        )
    except Exception as error:  # safetensors and transformers raise anything here
        raise ModelError(f"model.name: {name} can't be read ({one_line(error)})") from None
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ModelError(
            f"model.name: the checkpoint {name} lacks {len(missing)} weights of {heads.called(config)}, "
            f"{missing[0]} for one: give a complete one"
        )
    return model.eval()


def randomise_(model: nn.Module) -> None:
    """Fills the shards of a model, in any layout, with the same random weights: normal matrices, plain norms.

    The weights are the project's own noise, so each rank makes its part and no rank ever holds the whole.
    """
    layout = discover(model)
    deviation = float(getattr(model.config, "initializer_range", 0.02))
    for shard in layout.shards:
        with shard.storage() as local:
            local.fill_(0.0 if shard.decayed or shard.name.endswith("bias") else 1.0)
            if shard.decayed:
                noise.write_(local, shard.runs, shard.param_id, [[_SEED]], [[deviation]], [1.0])
    layout.refresh()
