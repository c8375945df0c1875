"""Which of transformers' classes a model is read with: as a causal language model, or as a masked one."""

from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from mezo_scale.errors import ModelError

_MASKED, _CAUSAL = AutoModelForMaskedLM._model_mapping, AutoModelForCausalLM._model_mapping


def is_masked(config: Any) -> bool:
    """Whether a model is a masked language model, which reads both sides of a mask.

    Some architectures, like BERT's and RoBERTa's, have both classes: then it is what its checkpoint was saved as, and a
    causal one only where that or `is_decoder` says so. Encoder-decoders that fill in spans are none.
    """
    kind = type(config)
    if kind not in _MASKED or not _MASKED[kind].__name__.endswith("ForMaskedLM"):
        return False
    if kind not in _CAUSAL:
        return True
    saved_as = getattr(config, "architectures", None) or ()
    return _CAUSAL[kind].__name__ not in saved_as and not getattr(config, "is_decoder", False)


def check(name: str, config: Any) -> None:
    """Raises ModelError unless the model is a language model of either kind."""
    if type(config) not in _CAUSAL and not is_masked(config):
        raise ModelError(f"{name} is a {config.model_type} model, expected a causal or a masked language model")


def called(config: Any) -> str:
    """What a model is, for messages."""
    return f"a {'masked' if is_masked(config) else 'causal'} language model"


def auto_class(config: Any) -> Any:
    """The class of transformers that makes and reads the model."""
    return AutoModelForMaskedLM if is_masked(config) else AutoModelForCausalLM


def made(config: Any, **options: Any) -> nn.Module:
    """The model with fresh weights, as `from_config` makes it."""
    model: nn.Module = auto_class(config).from_config(config, **options)
    return model
