"""One module's forward under the view: in the one branch that is in force, or in all branches of a tall batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules import linear

from mezo_scale.noise.parts import Branches
from mezo_scale.perturbation import broadcast, low_rank, pairing, rows
from mezo_scale.perturbation.broadcast import Broadcast
from mezo_scale.perturbation.pairing import Pairing
from mezo_scale.perturbation.substitute import in_float32, is_half, shadowed
from mezo_scale.perturbation.weights import Branch, Weights, check_unwritten, is_wide, stored
from mezo_scale.sharding import Site

Forward = Callable[..., Any]
_LINEAR = nn.Linear.forward if nn.Linear.forward.__code__.co_filename == linear.__file__ else None  # torch's own


class Runner:
    """Runs modules with perturbed weights in the place of their own.

    Attributes:
        branches: of the view that is open.
        active: positions of those in force: all of them, or the one whose rows are being run.
        rows: of one branch, in the call under way.
        held: sites whose weight has been put in place by a module further out; those inside leave them.
    """

    def __init__(self, weights: Weights, pairs: Pairing) -> None:
        self.weights = weights
        self.pairing = pairs
        self.branches: Sequence[Branch] = []
        self.active: tuple[int, ...] = ()
        self.rows = 0
        self.held: set[Site] = set()
        self._broadcast = Broadcast()

    def run_one(self, module: nn.Module, sites: Sequence[Site], original: Forward, args: Any, kwargs: Any) -> Any:
        """A module in the one branch that is in force."""
        if self.held:
            sites = [site for site in sites if site not in self.held]
        if not sites:
            return original(*args, **kwargs)
        if self._takes_factors(module) and self._is_plain_linear(module, original, sites, args, kwargs):
            return self._low_rank_linear(module, sites, args[0])
        with self.weights.scratch.frame():
            made = {site: parts[0] for site, parts in self._perturb(module, sites, self.active).items()}
            return self.weights.outlive(self._with(made, module, original, args, kwargs))

    def run_all(self, module: nn.Module, sites: Sequence[Site], original: Forward, args: Any, kwargs: Any) -> Any:
        """A unit in all branches: its rows of each with that branch's weights."""
        if sites and self._is_plain_linear(module, original, sites, args, kwargs) and self._is_divided(module, args[0]):
            if self._takes_factors(module):
                return self._low_rank_linear(module, sites, args[0])
            if not torch.is_autocast_enabled(args[0].device.type):
                return self._linear(module, sites, args[0])
        elif self._may_broadcast(module, sites, args, kwargs):
            result = self._run_at_once(module, sites, original, args[0])
            if result is not None:
                return result
        active, count = self.active, len(self.active)
        parts = rows.split(module, self.pairing.inputs[module], args, kwargs, count, self.rows * len(self.branches))
        results: list[Any] = []
        try:
            for group in _by_seed(self.branches, active):
                results += self._run_group(
                    module, sites, original, [(branch, parts[active.index(branch)]) for branch in group]
                )
        finally:
            self.active = active
        return rows.merge(results, self.rows)

    def _run_group(
        self, module: nn.Module, sites: Sequence[Site], original: Forward, group: Sequence[tuple[int, Any]]
    ) -> list[Any]:
        """A module in neighbouring branches, one after the other. group: (branch, (its args, its kwargs))."""
        results = []
        with self.weights.scratch.frame():
            made = self._perturb(module, sites, [branch for branch, _ in group])
            for position, (branch, (args, kwargs)) in enumerate(group):
                self.active = (branch,)
                given = {site: weight[position] for site, weight in made.items()}
                results.append(self.weights.outlive(self._with(given, module, original, args, kwargs)))
        return results

    def _may_broadcast(self, module: nn.Module, sites: Sequence[Site], args: Any, kwargs: Any) -> bool:
        if not sites or self.held or not self._is_all_of(module, sites):
            return False
        return broadcast.is_candidate(module, args, kwargs) and self._is_divided(module, args[0])

    def _run_at_once(self, module: nn.Module, sites: Sequence[Site], original: Forward, x: Tensor) -> Tensor | None:
        """A normalisation in all branches by one call; None: it is not one that takes their weights together."""
        branches, wide = self.neighbours(self.active), is_wide(module)
        own = {site.attr: site for site in sites}

        def run(given: Mapping[str, Tensor], blocks: Tensor) -> Any:
            weights = {own[name]: weight for name, weight in given.items()}
            return self._with(weights, module, original, (blocks,), {})

        with torch._C.DisableTorchFunction():
            dtypes = {name: self.weights.dtype_of(stored(site), wide=wide) for name, site in own.items()}
        if not self._broadcast.takes(module, original, len(branches), dtypes, x, run):
            return None
        with self.weights.scratch.frame():
            made = {name: self.weights.together(site, branches, wide=wide) for name, site in own.items()}
            given = {name: broadcast.per_branch(weight, x.dim()) for name, weight in made.items()}
            result: Tensor = self.weights.outlive(run(given, broadcast.blocks(x, len(branches))))
            return result.flatten(0, 1)

    def _perturb(self, module: nn.Module, sites: Sequence[Site], group: Sequence[int]) -> dict[Site, list[Tensor]]:
        branches, wide = self.neighbours(group), is_wide(module)
        return {site: self.weights.perturb(site, branches, wide=wide and site.module is module) for site in sites}

    def neighbours(self, group: Sequence[int]) -> Branches:
        branches = self.branches[group[0] : group[-1] + 1]
        assert isinstance(branches, Branches), "of a view that is open"
        return branches

    def _with(self, made: dict[Site, Tensor], module: nn.Module, original: Forward, args: Any, kwargs: Any) -> Any:
        """A module's forward with other weights in their place; in float32 if it normalises in 16 bits."""
        if not made:
            return original(*args, **kwargs)
        if type(module) is nn.Linear and len(args) == 1 and not kwargs:
            args = (args[0].contiguous(),)  # torch copies the weight for each row of an input that is not
        own = [site for site in made if site.module is module]
        wide = bool(own) and is_wide(module) and any(is_half(stored(site)) for site in own)
        outer, self.held = self.held, self.held | made.keys()
        try:
            with shadowed(made):
                result = in_float32(original, args, kwargs) if wide else original(*args, **kwargs)
            for site, weight in made.items():
                check_unwritten(site, weight)
            return result
        finally:
            self.held = outer

    def _linear(self, module: Any, sites: Sequence[Site], x: Tensor) -> Tensor:
        """y = x W^T + b per branch, each written straight to its rows of the result."""
        active = self.active
        inner = x.shape[-1]
        blocks = x.reshape(len(active), -1, inner)
        own = {site.attr: site for site in sites}
        held = module._parameters
        weight = held["weight"]
        with torch._C.DisableTorchFunction():
            dtype = self.weights.dtype_of(weight) if "weight" in own else weight.dtype
            width = weight.shape[0]
        result = x.new_empty(len(active), blocks.shape[1], width, dtype=dtype)
        for group in _by_seed(self.branches, active):
            at = slice(active.index(group[0]), active.index(group[0]) + len(group))
            self._multiply(held, own, group, blocks[at], result[at])
        return result.view(*x.shape[:-1], result.shape[-1])

    def _multiply(
        self, held: Mapping[str, Any], own: Mapping[str, Site], group: Sequence[int], blocks: Tensor, result: Tensor
    ) -> None:
        """The same in neighbouring branches. blocks: [branches, rows, n]; result: [branches, rows, m], written."""
        with self.weights.scratch.frame():
            branches = self.neighbours(group)
            made = {attr: self.weights.perturb(site, branches) for attr, site in own.items()}
            for position in range(len(group)):
                weight = made["weight"][position] if "weight" in made else held["weight"]
                bias = made["bias"][position] if "bias" in made else held["bias"]
                if bias is None:
                    torch.mm(blocks[position], weight.t(), out=result[position])
                else:
                    torch.addmm(bias, blocks[position], weight.t(), out=result[position])

    def _low_rank_linear(self, module: nn.Module, sites: Sequence[Site], x: Tensor) -> Tensor:
        branches = [self.branches[branch] for branch in self.active]
        return low_rank.linear(self.weights, module._parameters, {site.attr: site for site in sites}, x, branches)

    def _takes_factors(self, module: nn.Module) -> bool:
        """Whether the noise has factors of a module's weight, and the weight is tuned."""
        with torch._C.DisableTorchFunction():  # a look at a guarded parameter is a call otherwise
            weight = module._parameters.get("weight")
            if weight is None or not weight.requires_grad:
                return False
            return self.weights.noise.rank_of(weight.shape) is not None

    def _is_plain_linear(
        self, module: nn.Module, original: Forward, sites: Sequence[Site], args: Any, kwargs: Any
    ) -> bool:
        """torch's own Linear, called the ordinary way."""
        if type(module) is not nn.Linear or kwargs or len(args) != 1 or self.held:
            return False
        if _LINEAR is None or getattr(original, "__func__", None) is not _LINEAR:
            return False  # somebody has put a forward of theirs in its place
        if not self._is_all_of(module, sites):
            return False  # what it is not given it reads as it is, and that must not be here
        weight = module._parameters.get("weight")
        return weight is not None and not isinstance(args[0], DTensor) and not isinstance(weight, DTensor)

    def _is_all_of(self, module: nn.Module, sites: Sequence[Site]) -> bool:
        """Whether the sites are a module's own trainable parameters, all of them and no other."""
        with torch._C.DisableTorchFunction():
            tuned = {name for name, param in module._parameters.items() if param is not None and param.requires_grad}
        return {site.attr for site in sites if site.module is module} == tuned and len(sites) == len(tuned)

    def _is_divided(self, module: nn.Module, x: Tensor) -> bool:
        """Whether the rows of a module's only argument are those of the tall batch."""
        batched = next(iter(self.pairing.inputs[module].values())) == pairing.BATCHED
        return batched and x.dim() >= 2 and x.shape[0] % len(self.active) == 0


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
