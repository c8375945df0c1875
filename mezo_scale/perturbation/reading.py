"""What a module gets when it fetches a trainable parameter that nobody has put a perturbed one in the place of.

While a view is open, ``module.weight`` of a trainable parameter gives a `Reading`: it looks like the parameter, and
turns into the perturbed weight where an operation takes it. So a parameter is perturbed wherever it is read: by the
module that owns it, by a parent that never calls that module, out of a ParameterList or a ParameterDict. Asking for its
shape or dtype is no read.

A `Reading` has no storage. Code that gets hold of one by a road that is not known here finds nothing to compute with:
an error, never the plain weight. Parameters that are kept outside of modules' attributes (`nn.LSTM` has them in a list)
come to operations as they are. While a view learns, `Bypass` sees them there; afterwards each of them is a `Guarded`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_any, tree_map_only

from mezo_scale.errors import ViewError
from mezo_scale.sharding import Site

_PROPERTIES = """
    dtype device shape layout ndim itemsize nbytes names requires_grad is_leaf grad grad_fn output_nr _version
    is_meta is_cuda is_cpu is_xpu is_mps is_mkldnn is_sparse is_sparse_csr is_quantized is_nested
"""
_METHODS = """
    size dim ndimension stride numel nelement element_size is_floating_point is_complex is_signed is_contiguous
    get_device storage_offset is_inference has_names is_shared __len__ __repr__ __hash__ __format__
"""
METADATA = frozenset(
    [getattr(Tensor, name).__get__ for name in _PROPERTIES.split() if hasattr(Tensor, name)]
    + [getattr(Tensor, name) for name in _METHODS.split() if hasattr(Tensor, name)]
    + [torch.is_floating_point, torch.is_complex, torch.numel]
)
"""Functions that ask a tensor what it is, not what it holds."""

_IN_PLACE = "__setitem__ __iadd__ __isub__ __imul__ __itruediv__ __ifloordiv__ __imod__ __ipow__"
_KEEP = ("requires_grad_", "detach_", "share_memory_", "rename_")
WRITES = frozenset(
    [Tensor.data.__set__]  # type: ignore[attr-defined]
    + [getattr(Tensor, name) for name in dir(Tensor) if name.endswith("_") and name[-2] != "_" and name not in _KEEP]
    + [getattr(Tensor, name) for name in _IN_PLACE.split()]
)
"""Functions that change what a tensor holds."""

SAME = frozenset([Tensor.data.__get__, Tensor.detach])  # type: ignore[attr-defined]
"""Functions that give the same values in the same memory, for code that is about to write there."""


class Source(Protocol):
    """Where readings get their values from: a view that is open."""

    def value_of(self, reading: Reading) -> Tensor: ...

    def rows_of(self, reading: Reading, ids: Tensor) -> Tensor: ...


class Reading(Tensor):
    """A trainable parameter as a module fetched it.

    Attributes:
        plain: the parameter.
        site: which one it is.
        reader: the module whose forward was running; None where that was not followed.
        made: its perturbed value, once something has read it.
    """

    plain: Tensor
    site: Site
    reader: nn.Module | None
    source: Source
    made: Tensor | None

    @staticmethod
    def of(plain: Tensor, site: Site, reader: nn.Module | None, source: Source) -> Reading:
        reading: Reading = Tensor._make_wrapper_subclass(
            Reading, plain.shape, strides=plain.stride(), dtype=plain.dtype, device=plain.device
        )
        reading.plain, reading.site, reading.reader, reading.source, reading.made = plain, site, reader, source, None
        reading._is_param = isinstance(plain, nn.Parameter)  # what torch's Parameter asks for
        return reading

    def __getattr__(self, name: str) -> Any:
        """What a DTensor has beside a tensor, of the perturbed one."""
        if name == "plain" or not isinstance(self.plain, DTensor):
            raise AttributeError(f"a parameter has no attribute {name!r}")
        return getattr(self.source.value_of(self), name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in WRITES and type(args[0]) is Reading:
            raise written(args[0].site.name)
        if func in SAME:
            return args[0]
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func is F.embedding and _is_plain_lookup(args, kwargs):
            return args[1].source.rows_of(args[1], args[0])
        args, kwargs = _resolved((args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = _resolved((args, kwargs or {}))
        return func(*args, **kwargs)


def written(name: str) -> ViewError:
    """What is raised where a forward writes a trainable parameter."""
    return ViewError(
        f"{name} is written by the model's own forward, so it has no one value to perturb: freeze it "
        "(requires_grad = False)"
    )


def _is_plain_lookup(args: Any, kwargs: Any) -> bool:
    """``F.embedding(ids, table, ...)`` that renormalises nothing."""
    named = len(args) >= 2 and type(args[1]) is Reading and type(args[0]) is not Reading
    return named and kwargs.get("max_norm") is None and (len(args) < 4 or args[3] is None)


def _resolved(tree: Any) -> Any:
    return tree_map_only(Reading, lambda reading: reading.source.value_of(reading), tree)


def is_called_by(code: tuple[str, ...], depth: int) -> bool:
    """Whether the code that called is in a module whose name begins with one of these. `depth`: frames above."""
    return str(sys._getframe(depth + 1).f_globals.get("__name__", "")).startswith(code)


def memory_of(tensor: Tensor) -> int | None:
    """Which memory a tensor lies in; None: it has none, or no one."""
    with torch._C.DisableTorchFunction():
        try:
            return int(tensor.untyped_storage()._cdata)
        except (NotImplementedError, RuntimeError):  # sparse ones, and those inside vmap, have no one memory
            return None


Fetch = Callable[[nn.Module, str, Tensor], Tensor]
"""(module, name, what is there) -> what the module gets."""

_OPEN: list[Fetch] = []
_PLAIN_GETATTR = nn.Module.__getattr__


def _getattr(module: nn.Module, name: str) -> Any:
    if torch._C._is_torch_function_mode_enabled():
        with torch._C.DisableTorchFunction():  # DeepSpeed gathers in there what is not there yet
            got = _PLAIN_GETATTR(module, name)
    else:
        got = _PLAIN_GETATTR(module, name)
    if isinstance(got, Tensor):
        for fetch in _OPEN:
            got = fetch(module, name, got)
    return got


def _getattribute(module: nn.Module, name: str) -> Any:
    got = object.__getattribute__(module, name)
    if isinstance(got, Tensor) and type(got) is not Reading:
        for fetch in _OPEN:
            got = fetch(module, name, got)
    return got


@contextmanager
def fetching(fetch: Fetch, *, of_instances: bool) -> Iterator[None]:
    """While open, `fetch` sees every tensor that a module looks up among its parameters and buffers.

    `of_instances`: those among its ordinary attributes too, where FSDP1 keeps them. Slower, so not for the others.
    """
    if not _OPEN:
        nn.Module.__getattr__ = _getattr  # type: ignore[method-assign]
    _OPEN.append(fetch)
    if of_instances:
        nn.Module.__getattribute__ = _getattribute  # type: ignore[assignment]
    try:
        yield
    finally:
        _OPEN.remove(fetch)
        if of_instances and "__getattribute__" in nn.Module.__dict__:
            del nn.Module.__getattribute__
        if not _OPEN:
            nn.Module.__getattr__ = _PLAIN_GETATTR  # type: ignore[method-assign]


class Bypass(TorchFunctionMode):
    """Sees parameters that come to an operation without having been fetched from a module, and puts others in their
    place.

    `perturbed(tensor)` gives what takes a tensor's place, or the tensor itself.
    """

    def __init__(self, perturbed: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._perturbed = perturbed

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (func in WRITES or func in SAME) and type(args[0]) is Guarded:
            return Guarded.__torch_function__(func, types, args, kwargs)
        if func not in METADATA and tree_any(_may_be_plain, (args, kwargs)):
            args, kwargs = tree_map_only(Tensor, self._perturbed, (args, kwargs))
        return func(*args, **kwargs)


def _may_be_plain(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and type(leaf) is not Reading


class Guarded(nn.Parameter):
    """A parameter while a view is open: an operation that is given the parameter itself, by whatever road, is seen.

    Costs nothing as long as there is none.
    """

    perturbed: Callable[[Tensor], Tensor]
    name_in_model: str

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in WRITES and type(args[0]) is Guarded:
            raise written(args[0].name_in_model)
        if func in SAME:
            return args[0]
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        args, kwargs = tree_map_only(Guarded, lambda param: param.perturbed(param), (args, kwargs))
        with torch._C.DisableTorchFunctionSubclass() if tree_any(_is_guarded, (args, kwargs)) else nullcontext():
            return func(*args, **kwargs)


def _is_guarded(leaf: Any) -> bool:
    return type(leaf) is Guarded


@contextmanager
def guarding(named: Iterable[tuple[str, Tensor]], perturbed: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Each of the parameters is a `Guarded` inside. A user's own subclass of Parameter stays what it is."""
    plain = {param: name for name, param in named if type(param) is nn.Parameter}  # a tied one comes twice
    for param, name in plain.items():
        param.__class__ = Guarded
        param.perturbed, param.name_in_model = perturbed, name  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for param in plain:
            param.__class__ = nn.Parameter
            del param.perturbed, param.name_in_model  # type: ignore[attr-defined]
