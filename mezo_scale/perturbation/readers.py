"""Who reads which parameter: learned by running the model, never guessed from which module owns it.

The module that is given a perturbed weight must be the one that fetches it. Most modules fetch their own; state-space
mixers fetch their convolution's, attention blocks a table of another module's, adapters the entries of a ParameterDict.
Where an outer module and one inside it both fetch a parameter, both are its readers: inside the outer one the inner one
finds what was put in its place, and elsewhere it is given the parameter itself.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType

from torch import nn

from mezo_scale.sharding import Site, schemes

READS_CHILDREN = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
"""Torch modules with a fast path that fetches their children's parameters, taken only where nobody looks."""

_CONTAINERS = (nn.ParameterList, nn.ParameterDict)


class Readers:
    """The readers of a model's trainable parameters, as far as its runs have shown them."""

    def __init__(self, model: nn.Module, sites: Iterable[Site]) -> None:
        self.model = model
        self.sites = list(sites)
        self.seen: dict[Site, set[nn.Module]] = defaultdict(set)
        self.by_module: dict[nn.Module, list[Site]] = {}
        seeds: dict[nn.Module, nn.Module] = {}
        for module in model.modules():
            if isinstance(module, READS_CHILDREN):
                seeds.update((child, module) for child in module.modules())
        for site in self.sites:
            if site.module in seeds:
                self.seen[site].add(seeds[site.module])
        self.settle()

    def add(self, site: Site, reader: nn.Module | None) -> None:
        """A read that happened; None: by a module that was not followed."""
        if reader is not None:
            self.seen[site].add(reader)

    def settle(self) -> None:
        """Brings `by_module`, what each reader is to be given, up to date with what was seen."""
        given: dict[nn.Module, list[Site]] = defaultdict(list)
        for site in self.sites:
            for reader in self.seen.get(site, ()):
                given[reader].append(site)
        self.by_module = dict(given)


class Running:
    """Which module's forward is running, while `follow` is open.

    What a module's hooks do (FSDP and DeepSpeed gather there) happens between its call and its forward: `in_hooks`.
    """

    def __init__(self) -> None:
        self._stack: list[nn.Module | None] = []  # None: a module that was called, and whose hooks run

    @property
    def module(self) -> nn.Module | None:
        return next((module for module in reversed(self._stack) if module is not None), None)

    @property
    def in_hooks(self) -> bool:
        return bool(self._stack) and self._stack[-1] is None

    @contextmanager
    def follow(self, model: nn.Module) -> Iterator[None]:
        """Hooks on every module: the first and the last ones before its forward, and after it."""
        before, self._stack = self._stack, []
        with ExitStack() as hooks:
            for module in model.modules():
                for handle in (
                    module.register_forward_pre_hook(self._called, prepend=True),
                    module.register_forward_pre_hook(self._starts),
                    module.register_forward_hook(self._ended, prepend=True, always_call=True),
                    module.register_forward_hook(self._returned, always_call=True),
                ):
                    hooks.callback(handle.remove)
            try:
                yield
            finally:
                self._stack = before

    def _called(self, module: nn.Module, args: object) -> None:
        self._stack.append(None)

    def _starts(self, module: nn.Module, args: object) -> None:
        if schemes.unwrap(module) is None:  # a wrapper's forward gathers: it is a hook in all but name
            self._stack[-1] = module

    def _ended(self, module: nn.Module, args: object, output: object) -> None:
        if self._stack:
            self._stack[-1] = None

    def _returned(self, module: nn.Module, args: object, output: object) -> None:
        if self._stack:
            self._stack.pop()


def caller() -> nn.Module | None:
    """The module whose method is fetching an attribute just now, read off the call stack: for messages alone."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        module = frame.f_locals.get("self")
        named = frame.f_code.co_name not in ("_getattr", "__getattr__", "_getattribute", "__getitem__")
        if named and isinstance(module, nn.Module) and not isinstance(module, _CONTAINERS):
            return module
        frame = frame.f_back
    return None
