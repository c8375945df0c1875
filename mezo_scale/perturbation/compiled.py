"""Compiled modules: dynamo would trace into what the view puts in their place, so inside a view they run eagerly."""

from __future__ import annotations

import sys
import warnings
import weakref
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

_SAID: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def run_eagerly(model: nn.Module) -> AbstractContextManager[object]:
    """While open, what `torch.compile` has wrapped runs as it was written; its compiled code is kept for later."""
    if "torch._dynamo" not in sys.modules:  # nothing was compiled, and importing it is slow
        return nullcontext()
    if model not in _SAID and any(map(_is_compiled, model.modules())):
        _SAID.add(model)
        warnings.warn("the model is compiled; with perturbed weights it runs eagerly", stacklevel=4)
    eager: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return eager


def _is_compiled(module: nn.Module) -> bool:
    return module._compiled_call_impl is not None or "_orig_mod" in module._modules
