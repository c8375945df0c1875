"""Compiled modules: dynamo would trace into what the view puts in their place, so inside a view they run eagerly."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext

import torch


def run_eagerly() -> AbstractContextManager[object]:
    """While open, what `torch.compile` has wrapped runs as it was written; its compiled code is kept for later."""
    if "torch._dynamo" not in sys.modules:  # nothing was compiled, and importing it is slow
        return nullcontext()
    eager: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return eager
