"""How a module is made to run with perturbed weights: its ``forward`` is shadowed while the view is open.

A module's parameter is looked up by name, and a name in the instance's ``__dict__`` is found before ``_parameters``: so
a scratch tensor put there is what ``self.weight`` returns, whatever FSDP, DeepSpeed or a tied module keep below, and
taking it out restores everything. The shadowing happens inside ``forward``, after the hooks that gather.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import keystr, tree_flatten, tree_flatten_with_path, tree_unflatten

from mezo_scale import noise
from mezo_scale.errors import ViewError
from mezo_scale.perturbation import pairing
from mezo_scale.perturbation.scratch import Scratch
from mezo_scale.perturbation.substitute import RowsOf, in_float32, is_half, shadowed
from mezo_scale.sharding import Layout, Runs, Site, discover
from mezo_scale.sharding.dtensor import runs_of
from mezo_scale.sharding.shard import is_normalisation

Branch = tuple[int, float]
"""(seed, scale): the weights are theta + scale * z(seed)."""

READS_CHILDREN = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
"""Torch modules whose forward reads their children's parameters without calling the children."""

Forward = Callable[..., Any]


class View:
    """One model's perturbed view: its layout, its pairing and its scratch, kept from step to step."""

    def __init__(self, model: nn.Module, *, dtype: torch.dtype | None = None, distribution: str = "normal") -> None:
        self.layout: Layout = discover(model)
        self.dtype = dtype
        self.distribution = distribution
        self.scratch = Scratch()
        self._sites = self._sites_by_module(model)
        self._parents = {child: module for module in model.modules() for child in module.children()}
        self._pairing = pairing.Pairing(self._sites, self._parents)
        self._runs: dict[tuple[nn.Module, str], Runs] = {}
        self._branches: list[Branch] = []
        self._active: tuple[int, ...] = ()
        self._entry: nn.Module | None = None
        self._rows = 0  # of one branch, in the call under way
        self._muted = False

    @property
    def never_ran(self) -> list[str]:
        """Trainable parameters whose module no paired evaluation has called: their noise has no effect on the loss."""
        called = self._pairing.called
        if not called:
            return []
        ran = {site.name for module, sites in self._sites.items() if module in called for site in sites}
        return [shard.name for shard in self.layout.shards if shard.name not in ran]

    @contextmanager
    def branches(self, branches: Sequence[Branch]) -> Iterator[None]:
        """The view, open: see `perturbed`."""
        if not branches:
            raise ValueError("branches is empty: expected at least one (seed, scale)")
        if self._branches:
            raise ViewError("a perturbed view of this model is open already: views do not nest")
        self._branches = [(int(seed), float(scale)) for seed, scale in branches]
        self._active = tuple(range(len(self._branches)))
        with ExitStack() as stack:
            stack.callback(self._close)
            if len(self._branches) > 1:
                self._watch_entries(stack)
            for module in dict.fromkeys([*self._sites, *self._pairing.units]):
                self._shadow_forward(stack, module)
            with torch.no_grad():
                yield

    def _close(self) -> None:
        self._branches, self._active, self._entry = [], (), None

    def _sites_by_module(self, model: nn.Module) -> dict[nn.Module, list[Site]]:
        readers = {
            child: module
            for module in model.modules()
            if isinstance(module, READS_CHILDREN)
            for child in module.modules()
        }
        for module in list(readers):  # the outermost reader, should one contain another
            while readers[module] is not readers.get(readers[module], readers[module]):
                readers[module] = readers[readers[module]]
        sites: dict[nn.Module, list[Site]] = defaultdict(list)
        for site in self.layout.sites:
            sites[readers.get(site.module, site.module)].append(site)
        return dict(sites)

    # -- opening ---------------------------------------------------------------------------------------------------

    def _watch_entries(self, stack: ExitStack) -> None:
        """Before an outermost call: learn how it pairs. A hook, not a shadowed forward: it must precede FSDP's own."""
        modules = set(self._sites)
        for module in list(modules):
            while (parent := self._parents.get(module)) is not None and parent not in modules:
                modules.add(parent)
                module = parent
        for module in modules:
            before = module.register_forward_pre_hook(self._enter, prepend=True, with_kwargs=True)
            after = module.register_forward_hook(self._leave, always_call=True)
            stack.callback(before.remove)
            stack.callback(after.remove)

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._entry is not None or self._muted:
            return
        self._entry = module
        rows = pairing.batch_rows(args, kwargs, getattr(module, "main_input_name", None))
        self._rows, rest = divmod(rows, len(self._active))
        if rest or self._rows == 0:
            self._entry = None
            raise ViewError(
                f"the batch has {rows} rows for {len(self._active)} branches: repeat its rows once per branch "
                "along dim 0"
            )
        known = set(self._pairing.units)
        self._muted = True
        try:
            self._pairing.learn(module, args, kwargs, rows)
        except BaseException:
            self._entry = None
            raise
        finally:
            self._muted = False
        for unit in self._pairing.units - known - set(self._sites):
            self._shadow_forward(self._late, unit)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if module is self._entry and not self._muted:
            self._entry = None

    def _shadow_forward(self, stack: ExitStack, module: nn.Module) -> None:
        self._late = stack
        original = module.forward  # an instance's own, when another library has put one there
        missing = object()
        saved = module.__dict__.get("forward", missing)

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._muted:
                return original(*args, **kwargs)
            if len(self._active) == 1:
                return self._run_one(module, original, args, kwargs)
            return self._run_all(module, original, args, kwargs)

        def restore() -> None:
            if saved is missing:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = saved

        module.__dict__["forward"] = forward
        stack.callback(restore)

    # -- running ---------------------------------------------------------------------------------------------------

    def _run_one(self, module: nn.Module, original: Forward, args: Any, kwargs: Any) -> Any:
        """A module in the one branch that is in force."""
        sites = self._sites.get(module)
        if not sites:
            return original(*args, **kwargs)
        with self.scratch.frame():
            if _is_lookup(module, sites):
                return self._lookup(module, original, args, kwargs, self._active[0])
            weights = {site: self._perturb(site, self._active)[0] for site in sites}
            return self._outlive(self._with(weights, module, original, args, kwargs))

    def _run_all(self, module: nn.Module, original: Forward, args: Any, kwargs: Any) -> Any:
        """A unit in all branches: its rows of each with that branch's weights."""
        if module not in self._pairing.units:
            raise ViewError(
                f"{type(module).__name__} ran under several branches but not when the model was first looked at: the "
                "model takes different paths from call to call. Evaluate one branch at a time (paired=False)"
            )
        if self._is_plain_linear(module, args, kwargs):
            return self._linear(module, args[0])
        active, sites = self._active, self._sites.get(module, [])
        parts = self._split(module, args, kwargs, len(active))
        results: list[Any] = []
        try:
            for group in _by_seed(self._branches, active):
                with self.scratch.frame():
                    lookup = _is_lookup(module, sites)
                    weights = {} if lookup else {site: self._perturb(site, group) for site in sites}
                    for position, branch in enumerate(group):
                        self._active = (branch,)
                        branch_args, branch_kwargs = parts[active.index(branch)]
                        if lookup:
                            result = self._lookup(module, original, branch_args, branch_kwargs, branch)
                        else:
                            made = {site: weight[position] for site, weight in weights.items()}
                            result = self._outlive(self._with(made, module, original, branch_args, branch_kwargs))
                        results.append(result)
        finally:
            self._active = active
        return self._merge(module, results)

    def _with(self, weights: dict[Site, Tensor], module: nn.Module, original: Forward, args: Any, kwargs: Any) -> Any:
        """A module's forward with other weights in their place; in float32 if it normalises in 16 bits."""
        if type(module) is nn.Linear and len(args) == 1 and not kwargs:
            args = (args[0].contiguous(),)  # torch copies the weight for each row of an input that is not
        wide = _is_wide(module) and any(is_half(getattr(site.module, site.attr)) for site in weights)
        with shadowed(weights):
            return in_float32(original, args, kwargs) if wide else original(*args, **kwargs)

    def _linear(self, module: Any, x: Tensor) -> Tensor:
        """y = x W^T + b per branch, each written straight to its rows of the result."""
        active = self._active
        inner = x.shape[-1]
        blocks = x.reshape(len(active), -1, inner)
        sites = {site.attr: site for site in self._sites[module]}
        dtype = self._dtype(module.weight) if "weight" in sites else module.weight.dtype
        result = x.new_empty(len(active), blocks.shape[1], module.weight.shape[0], dtype=dtype)
        for group in _by_seed(self._branches, active):
            with self.scratch.frame():
                made = {attr: self._perturb(site, group) for attr, site in sites.items()}
                for position, branch in enumerate(group):
                    weight = made["weight"][position] if "weight" in made else module.weight
                    bias = made["bias"][position] if "bias" in made else module.bias
                    target = result[active.index(branch)]
                    if bias is None:
                        torch.mm(blocks[active.index(branch)], weight.t(), out=target)
                    else:
                        torch.addmm(bias, blocks[active.index(branch)], weight.t(), out=target)
        return result.view(*x.shape[:-1], result.shape[-1])

    def _is_plain_linear(self, module: nn.Module, args: Any, kwargs: Any) -> bool:
        """torch's own Linear, called the ordinary way on rows of the tall batch."""
        if type(module) is not nn.Linear or module not in self._sites or kwargs or len(args) != 1:
            return False
        x = args[0]
        if (
            isinstance(x, DTensor)
            or isinstance(module.weight, DTensor)
            or x.dim() < 2
            or x.shape[0] % len(self._active)
        ):
            return False
        batched = next(iter(self._pairing.inputs[module].values())) == pairing.BATCHED
        return batched and not torch.is_autocast_enabled(x.device.type)

    def _lookup(self, module: nn.Module, original: Forward, args: Any, kwargs: Any, branch: int) -> Any:
        """A table: perturb only the rows that are looked up, where ``F.embedding`` looks them up."""
        (site,) = self._sites[module]
        table = getattr(module, site.attr)
        with RowsOf(table, site.param_id, self._branches[branch], self._dtype(table), self.distribution) as rows:
            result = original(*args, **kwargs)
        if rows.used:
            return result
        with shadowed({site: self._perturb(site, (branch,))[0]}):  # the table was read in some other way
            return self._outlive(original(*args, **kwargs))

    def _perturb(self, site: Site, group: Sequence[int]) -> list[Tensor]:
        """The site's weight in each branch of ``group``, in scratch; branches with one seed share one generation."""
        weight = getattr(site.module, site.attr)
        branches = [self._branches[branch] for branch in group]
        local, runs = weight.detach(), None
        if isinstance(weight, DTensor):
            local = weight._local_tensor.detach()
            runs = self._runs_of(site, weight)
        local = local.contiguous()
        dtype = torch.float32 if _is_wide(site.module) else self._dtype(local)
        out = self.scratch.take((len(branches), *local.shape), dtype, local.device)
        noise.view(local, site.param_id, branches, out, runs=runs, distribution=self.distribution)
        if not isinstance(weight, DTensor):
            return list(out)
        return [
            DTensor.from_local(
                part, weight.device_mesh, weight.placements, run_check=False, shape=weight.shape, stride=weight.stride()
            )
            for part in out
        ]

    def _runs_of(self, site: Site, weight: DTensor) -> Runs:
        key = (site.module, site.attr)
        if key not in self._runs:
            coordinate = weight.device_mesh.get_coordinate()
            assert coordinate is not None, "a rank outside the mesh holds no shard, and discover() has refused it"
            self._runs[key] = runs_of(
                tuple(weight.shape), tuple(weight.device_mesh.shape), tuple(coordinate), weight.placements
            )
        return self._runs[key]

    def _dtype(self, weight: Tensor) -> torch.dtype:
        return self.dtype if self.dtype is not None and weight.dim() > 1 else weight.dtype

    def _outlive(self, result: Any) -> Any:
        """A module may return its parameter (a prompt, a token): copied, for the scratch is reused."""
        if isinstance(result, Tensor):
            return result.clone() if not isinstance(result, DTensor) and self.scratch.holds(result) else result
        leaves, spec = tree_flatten(result)
        return tree_unflatten([self._outlive(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)

    # -- dividing and joining --------------------------------------------------------------------------------------

    def _split(self, module: nn.Module, args: Any, kwargs: Any, count: int) -> list[tuple[Any, Any]]:
        """The arguments of each branch."""
        kinds = self._pairing.inputs[module]
        if not args and not kwargs:
            return [(args, kwargs)] * count
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):  # nearly every call, without the bookkeeping
            if not self._is_batched(module, next(iter(kinds.values())), args[0]):
                return [(args, kwargs)] * count
            return [((part,), kwargs) for part in _rows_of(module, args[0], count)]
        if pairing.has_cache((args, kwargs)):
            raise ViewError(
                f"{type(module).__name__} needs its rows divided among the branches but keeps a cache of all of them: "
                "call the model with use_cache=False, or evaluate one branch at a time (paired=False)"
            )
        leaves, spec = tree_flatten_with_path((args, kwargs))
        split = [
            _rows_of(module, leaf, count)
            if isinstance(leaf, Tensor) and self._is_batched(module, kinds.get(keystr(path)), leaf)
            else [leaf] * count
            for path, leaf in leaves
        ]
        return [tree_unflatten(list(part), spec) for part in zip(*split, strict=True)]

    def _is_batched(self, module: nn.Module, kind: str | None, leaf: Tensor) -> bool:
        """Whether a unit's argument is divided. One row made to broadcast may have become each branch's rows
        upstream."""
        if kind == pairing.ONE or (kind is None and leaf.dim() > 0 and leaf.shape[0] in (1, self._tall)):
            return leaf.shape[0] != 1
        if kind is None and leaf.dim() > 0:
            raise ViewError(
                f"{type(module).__name__} got an argument of shape {tuple(leaf.shape)} that was not there when the "
                "model was first looked at. Evaluate one branch at a time (paired=False)"
            )
        return kind == pairing.BATCHED

    @property
    def _tall(self) -> int:
        return self._rows * len(self._branches)

    def _merge(self, module: nn.Module, results: list[Any]) -> Any:
        """The branches' results as one tall result; a shared single row becomes each branch's own rows."""
        if isinstance(results[0], Tensor):
            return self._join(results)
        flat = [tree_flatten(result) for result in results]
        joined = [
            self._join(list(leaves)) if isinstance(leaves[0], Tensor) else leaves[0]
            for leaves in zip(*(leaves for leaves, _ in flat), strict=True)
        ]
        return tree_unflatten(joined, flat[0][1])

    def _join(self, parts: list[Tensor]) -> Tensor:
        if parts[0].shape[0] == 1 and self._rows > 1:
            parts = [part.expand(self._rows, *part.shape[1:]) for part in parts]
        first = parts[0]
        if isinstance(first, DTensor):  # locally: their placements, partial sums included, stay as they are
            local = torch.cat([part._local_tensor for part in parts])  # type: ignore[attr-defined]
            return DTensor.from_local(local, first.device_mesh, first.placements, run_check=False)
        return torch.cat(parts)


def _is_lookup(module: nn.Module, sites: Sequence[Site]) -> bool:
    if not isinstance(module, nn.Embedding) or len(sites) != 1 or module.max_norm is not None:
        return False
    return not isinstance(getattr(module, sites[0].attr), DTensor)


def _is_wide(module: nn.Module) -> bool:
    """Whether a module's perturbed weights are float32 whatever they are stored in.

    Normalisation weights lie near 1, where bfloat16 numbers are 0.004 to 0.008 apart: in 16 bits a perturbation of
    0.001 hardly moves them (docs/decisions/0005). Statistics that a module keeps in 16 bits tie it to 16 bits.
    """
    return is_normalisation(module) and not any(map(is_half, module.buffers(recurse=False)))


def _by_seed(branches: Sequence[Branch], active: Sequence[int]) -> list[tuple[int, ...]]:
    """Neighbouring branches of one seed, two at most: one generation of z serves both signs, and scratch stays at
    two."""
    groups: list[tuple[int, ...]] = []
    for branch in active:
        if groups and len(groups[-1]) == 1 and branches[groups[-1][0]][0] == branches[branch][0]:
            groups[-1] = (groups[-1][0], branch)
        else:
            groups.append((branch,))
    return groups


def _rows_of(module: nn.Module, tensor: Tensor, count: int) -> list[Tensor]:
    """Equal blocks of dim 0, one per branch."""
    size, rest = divmod(int(tensor.shape[0]), count)
    if rest:
        raise ViewError(
            f"{type(module).__name__} got {tensor.shape[0]} rows for {count} branches, which do not divide: its rows "
            "depend on the data. Evaluate one branch at a time (paired=False)"
        )
    if isinstance(tensor, DTensor):
        if any(placement.is_shard(0) for placement in tensor.placements):
            raise ViewError("a tensor-parallel plan shards the batch dim of an activation: shard hidden dims instead")
        local = tensor._local_tensor
        return [
            DTensor.from_local(part, tensor.device_mesh, tensor.placements, run_check=False)
            for part in torch.split(local, size)
        ]
    return list(torch.split(tensor, size))
