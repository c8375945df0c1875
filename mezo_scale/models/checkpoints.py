"""Checkpoints: what transformers and DeepSpeed read and write, checked on the way in and whole on the way out.

Only safetensors are read, and no code that comes with a model is run. ``random:SHAPE`` names a model that nobody has to
download: random weights of a published shape, for rehearsals and measurements.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer

from mezo_scale import collectives, noise
from mezo_scale.errors import ModelError, RecipeError
from mezo_scale.models.shapes import config_of
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
        ModelError: it is quantised, or no causal language model.
    """
    if name.startswith(RANDOM):
        return config_of(name.removeprefix(RANDOM))
    if means_disk(name) and not Path(name).is_dir():
        raise RecipeError(f"model.name: there is no folder {name}; expected a Hugging Face checkpoint")
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # the hub's client has roots of its own
        what = "holds no checkpoint" if means_disk(name) else "is neither a folder nor a model that the hub gives"
        raise RecipeError(f"model.name: {name} {what} ({_one_line(error)})") from None
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            f"model.name: {name} is quantised, and quantised weights can't take small updates: give a checkpoint in "
            "float32, bfloat16 or float16"
        )
    if type(config) not in transformers.AutoModelForCausalLM._model_mapping:
        raise ModelError(f"model.name: {name} is a {config.model_type} model, expected a causal language model")
    return config


def load_tokenizer(name: str) -> Any:
    """The model's tokenizer; of random weights: bytes. Raises ModelError if it can't be read."""
    if name.startswith(RANDOM):
        return ByT5Tokenizer()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise anything here
        raise ModelError(f"model.name: the tokenizer of {name} can't be read ({_one_line(error)})") from None
    if tokenizer.pad_token_id is None:  # never looked at: padding is masked
        tokenizer.pad_token_id = tokenizer.eos_token_id or 0
    return tokenizer


def read(name: str, dtype: torch.dtype, **kwargs: Any) -> nn.Module:
    """A checkpoint as transformers reads it, in evaluation mode, on the CPU if `kwargs` say nothing else.

    Raises:
        ModelError: it can't be read, or lacks weights (transformers would make them up).
    """
    if name.startswith(RANDOM):
        random: nn.Module = AutoModelForCausalLM.from_config(find(name), dtype=dtype)
        randomise_(random)
        return random.eval()
    model: nn.Module
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True, **kwargs
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"model.name: {name} can't be read ({_one_line(error)})") from None
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ModelError(
            f"model.name: the checkpoint {name} lacks {len(missing)} weights of a causal language model, "
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


def write(model: Any, tokenizer: Any, directory: Path) -> None:
    """Writes an ordinary Hugging Face checkpoint (safetensors, configuration, tokenizer); every rank calls it.

    It is complete or not there: written beside, then renamed. An older one is replaced.
    """
    state = full_state(model)
    if collectives.rank() == 0:
        beside = directory.with_name(directory.name + ".partial")
        old = directory.with_name(directory.name + ".old")
        if old.exists() and not directory.exists():  # a process died between the two renames: it is the only one
            old.rename(directory)
        for leftover in (beside, old):
            shutil.rmtree(leftover, ignore_errors=True)
        model.save_pretrained(beside, state_dict=state)
        tokenizer.save_pretrained(beside)
        if directory.exists():
            directory.rename(old)
        beside.rename(directory)
        shutil.rmtree(old, ignore_errors=True)
    if dist.is_initialized():
        dist.barrier()


def full_state(model: nn.Module) -> dict[str, Tensor]:
    """The whole state dict, on the CPU of rank 0; empty on the others. Every rank calls it."""
    if not dist.is_initialized():
        return model.state_dict()
    if any(hasattr(param, "ds_id") for param in model.parameters()):
        state = _full_state_zero3(model)
    else:
        state = _full_state_dtensors(model)
    if dist.get_rank() > 0:
        return {}
    names: dict[int, str] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        state[name] = state[names.setdefault(id(param), name)]  # tied weights are one tensor again, and saved once
    return state


def _full_state_dtensors(model: nn.Module) -> dict[str, Tensor]:
    """Gathered one by one, tied weights once: a rank other than 0 holds its shards and one parameter at a time."""
    for unit in model.modules():
        if isinstance(unit, FSDPModule):
            unit.reshard()
    state = model.state_dict()
    for name, held in [*model.named_parameters(), *model.named_buffers()]:
        if name in state:
            tensor: Any = held.detach()
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            state[name] = whole.cpu() if dist.get_rank() == 0 else whole.new_empty(0)
            del tensor, whole
    return state


def _full_state_zero3(model: nn.Module) -> dict[str, Tensor]:
    from deepspeed import zero

    state = model.state_dict()  # buffers, and placeholders of the parameters
    for name, param in model.named_parameters():
        with zero.GatheredParameters([param]):
            if dist.get_rank() == 0:
                state[name] = param.detach().cpu().clone()
    return state


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
