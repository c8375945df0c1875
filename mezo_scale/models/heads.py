"""Which of transformers' classes a model is read with: for causal or masked language models, or image classifiers."""

from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, AutoModelForMaskedLM

from mezo_scale.errors import ModelError

_MASKED, _CAUSAL = AutoModelForMaskedLM._model_mapping, AutoModelForCausalLM._model_mapping
_IMAGES = AutoModelForImageClassification._model_mapping


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


def is_language(config: Any) -> bool:
    """Whether a model is a language model of either kind."""
    return type(config) in _CAUSAL or is_masked(config)


def is_image(config: Any) -> bool:
    """Whether a model is read as an image classifier: a language model is not, though it may have such a class."""
    return type(config) in _IMAGES and not is_language(config)


def check(name: str, config: Any) -> None:
    """Raises ModelError unless the model is a language model of either kind, or an image classifier."""
    if not is_language(config) and not is_image(config):
        raise ModelError(
            f"{name} is a {config.model_type} model, expected a causal or a masked language model, or an image "
            "classifier"
        )


def check_language(name: str, config: Any) -> None:
    """Raises ModelError unless the model is a language model of either kind."""
    if not is_language(config):
        raise ModelError(f"{name} is a {config.model_type} model, expected a causal or a masked language model")


def called(config: Any) -> str:
    """What a model is, for messages."""
    if is_image(config):
        return "an image classifier"
    return f"a {'masked' if is_masked(config) else 'causal'} language model"


def auto_class(config: Any) -> Any:
    """The class of transformers that makes and reads the model."""
    if is_image(config):
        return AutoModelForImageClassification
    return AutoModelForMaskedLM if is_masked(config) else AutoModelForCausalLM


def made(config: Any, **options: Any) -> nn.Module:
    """The model with fresh weights, as `from_config` makes it."""
    model: nn.Module = auto_class(config).from_config(config, **options)
    return model
