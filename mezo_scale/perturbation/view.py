"""The perturbed view of one model: opened for a step's branches, learning on the way who reads what.

A view is in one of three states while it is open:

    LEARNING   one branch is in force, and every fetch of a trainable parameter is followed to the module that uses it
    ONE        one branch is in force: readers that are known are given their perturbed weights before they run
    ALL        all branches are in force: units divide their rows, and are in ONE for each part

In every state a trainable parameter that is fetched in any other way is a `Reading`: perturbed where it is used if one
branch is in force, an error that names it and its reader if several are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only

from mezo_scale import collectives
from mezo_scale.errors import ViewError
from mezo_scale.noise import NORMAL, Noise
from mezo_scale.noise.parts import Branches
from mezo_scale.perturbation import pairing
from mezo_scale.perturbation.compiled import run_eagerly
from mezo_scale.perturbation.forward import Runner
from mezo_scale.perturbation.pairing import PairingError, in_words
from mezo_scale.perturbation.readers import Readers, Running, caller
from mezo_scale.perturbation.reading import Bypass, Reading, fetching, guarding, is_called_by, memory_of
from mezo_scale.perturbation.scratch import Scratch
from mezo_scale.perturbation.substitute import in_float32, is_half, standing_in
from mezo_scale.perturbation.weights import Branch, Weights, check_rank, check_unwritten, is_lookup, is_wide, stored
from mezo_scale.sharding import Layout, Site, discover, schemes


class View:
    """One model's perturbed view: its layout, its readers, its pairing and its scratch, kept from step to step.

    Args:
        model: as for `mezo_scale.shards`.
        dtype: of perturbed matrices; None: the weights' own.
        noise: how z is drawn.
        scratch: memory to use; None: its own.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        dtype: torch.dtype | None = None,
        noise: Noise = NORMAL,
        scratch: Scratch | None = None,
    ) -> None:
        self.model = model
        self.layout: Layout = discover(model)
        check_rank(noise, self.layout.shards)
        self.weights = Weights(dtype, noise, scratch if scratch is not None else Scratch())
        self.read: set[str] = set()
        self._at = {(site.module, site.attr): site for site in self.layout.sites}
        self._owned: dict[nn.Module, list[Site]] = defaultdict(list)
        for site in self.layout.sites:
            self._owned[site.module].append(site)
        self._parents = {child: module for module in model.modules() for child in module.children()}
        self._callable = {model, *self._owned}  # what may be called outermost and read a parameter
        for module in list(self._callable):
            while (parent := self._parents.get(module)) is not None and parent not in self._callable:
                self._callable.add(parent)
                module = parent
        self._readers = Readers(model, self.layout.sites)
        self._running = Running()
        self._pairing = pairing.Pairing(self._parents)
        self._runner = Runner(self.weights, self._pairing)
        self.gathers = self.layout.gathers
        self._in_instances = self.layout.in_attributes
        self._movers = schemes.movers()
        self._learning = self._watching = False
        self._settled = False  # whether an evaluation has shown who reads what
        self._bypassed: set[Site] = set()
        self._memory: dict[int | None, Site] = {}  # while learning, where the parameters lie
        self._made: list[Reading] = []  # where no reader was known, until the module under way has run
        self._counted: set[nn.Module] = set()
        self._entry: nn.Module | None = None
        self._opened = ExitStack()
        self._given: set[nn.Module] = set()

    @property
    def is_pairing(self) -> bool:
        """Whether the calls of the model under way are the two small ones that show how its rows divide."""
        return self._learning and len(self._runner.branches) > 1

    @property
    def never_ran(self) -> list[str]:
        """Trainable parameters that nothing has read in any evaluation so far, in the model's order."""
        return [shard.name for shard in self.layout.shards if shard.name not in self.read] if self.read else []

    def branches(self, branches: Sequence[Branch]) -> AbstractContextManager[None]:
        """The view, open: see `perturbed`. Raises ViewError also where the model is no longer what was looked at."""
        if not self._runner.branches and not self.layout.is_current():
            raise ViewError("the model was wrapped, cast, loaded or frozen since this View was made: make another")
        return self.opened(branches)

    @contextmanager
    def opened(self, branches: Sequence[Branch]) -> Iterator[None]:
        """As `branches`, of a model that was just compared with what was looked at."""
        if not branches:
            raise ValueError("branches is empty: expected at least one (seed, scale)")
        if self._runner.branches:
            raise ViewError("a perturbed view of this model is open already: views do not nest")
        self._runner.branches = Branches([(int(seed), float(scale)) for seed, scale in branches])
        self._runner.active = tuple(range(len(branches)))
        with ExitStack() as stack:
            stack.callback(self._close)
            self._opened, self._given, self._watching = stack, set(), False
            stack.enter_context(run_eagerly(self.model))
            stack.enter_context(fetching(self._fetch, of_instances=self._in_instances))
            if not self.gathers:
                named = ((site.name, stored(site)) for site in self._readers.sites)
                stack.enter_context(guarding(named, self._instead_of))
            self._give_to([*self._owned, *self._readers.by_module, *self._pairing.units])
            if len(branches) > 1:
                self._watch_entries()
            elif not self._settled:
                stack.enter_context(self._learn())
            self._watch_bypasses()
            with torch.no_grad():
                yield
            self._check_made(0)

    def _watch_bypasses(self) -> None:
        """From now on in this opening, if there are parameters that come to operations without being fetched."""
        if self._bypassed and not self._watching:
            self._watching = True
            self._opened.enter_context(Bypass(self._instead_of))

    def _close(self) -> None:
        self._runner.branches, self._runner.active, self._runner.held, self._entry = [], (), set(), None
        while self._made:
            self._made.pop().made = None

    # -- learning --------------------------------------------------------------------------------------------------

    @contextmanager
    def _learn(self) -> Iterator[None]:
        """Inside, every read is followed to its reader; afterwards those are known."""
        self._learning = True
        if not self.gathers:
            self._memory = {memory_of(stored(site)): site for site in self._readers.sites}
        try:
            with self._running.follow(self.model), Bypass(self._instead_of):
                yield
            self._settled = True
        finally:
            self._learning = False
            self._memory = {}
            self._readers.settle()

    def _watch_entries(self) -> None:
        """Before an outermost call: learn how it pairs. Around the whole call, not its forward: FSDP's hooks come in
        between. (Hooks would do, if to register hundreds of them did not take as long as to run a layer.)"""
        # Given first: a call has looked up its forward before it is learned that the module is a unit.
        self._give_to(self._callable)
        calls = [(module, *self._watched(module)) for module in self._callable]
        self._opened.enter_context(standing_in(calls))

    def _watched(self, module: nn.Module) -> tuple[str, Callable[..., Any]]:
        """What a call of a module comes to, by its name in torch's Module, and what takes its place."""
        name = "_call_impl" if module._compiled_call_impl is None else "_compiled_call_impl"
        original: Callable[..., Any] = getattr(module, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if self._entry is not None or self._learning or len(self._runner.active) == 1:
                return original(*args, **kwargs)
            self._entry = module
            try:
                self._learn_call(module, args, kwargs)
                return original(*args, **kwargs)
            finally:
                self._entry = None

        return name, call

    def _learn_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Rows of an outermost call and, the first time, what divides in it. Where weights are gathered in a forward,
        ranks make the two small runs together: one that meets a new kind of call alone would gather alone."""
        rows = pairing.batch_rows(args, kwargs, getattr(module, "main_input_name", None))
        self._runner.rows, rest = divmod(rows, len(self._runner.active))
        error: Exception | None = None
        if rest or self._runner.rows == 0:
            error = ViewError(
                f"the batch has {rows} rows for {len(self._runner.active)} branches: repeat its rows once per branch "
                "along dim 0"
            )
        new = error is None and not self._pairing.knows(module, args, kwargs)
        news = self._most(2 if error is not None else int(new))
        if news == 1:
            try:
                self._learn_pairing(module, args, kwargs, rows)
            except Exception as met:
                error = met
            news = 2 * self._most(int(error is not None))
        if error is not None:
            raise PairingError(in_words(error)) from error
        if news == 2:
            raise PairingError("another rank's batch can't be evaluated in several branches at once")

    def _most(self, value: int) -> int:
        return collectives.max_integer(value) if self.gathers else value

    def _learn_pairing(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], rows: int) -> None:
        active, self._runner.active = self._runner.active, (0,)
        try:
            with self._learn():
                calls = self._pairing.run(module, args, kwargs, rows)
        finally:
            self._runner.active = active
        self._pairing.settle(module, args, kwargs, calls, self._readers.by_module)
        self._give_to([*self._readers.by_module, *self._pairing.units])
        self._watch_bypasses()

    # -- running modules -------------------------------------------------------------------------------------------

    def _give_to(self, modules: Iterable[nn.Module]) -> None:
        """Shadows the forwards of those modules for as long as the view is open."""
        new = [module for module in dict.fromkeys(modules) if module not in self._given]
        self._given.update(new)
        forwards = [(module, "forward", self._shadow_of(module)) for module in new]
        self._opened.enter_context(standing_in(forwards))

    def _shadow_of(self, module: nn.Module) -> Callable[..., Any]:
        # Inside `forward`, after the hooks that gather; an instance's own, when another library has put one there.
        original = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._run(module, original, args, kwargs)

        forward.__wrapped__ = original  # type: ignore[attr-defined]  # callers look at a model's signature
        return forward

    def _run(self, module: nn.Module, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        begun = len(self._made)
        if self._learning:
            wide = is_wide(module) and any(is_half(stored(site)) for site in self._owned.get(module, ()))
            result = in_float32(original, args, kwargs) if wide else original(*args, **kwargs)
            self._check_made(begun)
            return tree_map_only(Reading, self.value_of, result)  # while it is there: ZeRO-3 lets go of it now
        sites = self._readers.by_module.get(module, [])
        if sites and (is_lookup(module) or self._bypassed):
            sites = [] if is_lookup(module) else [site for site in sites if site not in self._bypassed]
        sites = [site for site in sites if not self._is_put_there(stored(site))]
        if module not in self._counted:
            self._counted.add(module)
            self.read.update(site.name for site in sites)
        if len(self._runner.active) == 1:
            result = self._runner.run_one(module, sites, original, args, kwargs)
            self._check_made(begun)
            return result
        if module not in self._pairing.units:
            return original(*args, **kwargs)  # what it reads itself, it reads as a `Reading`: an error
        return self._runner.run_all(module, sites, original, args, kwargs)

    # -- reads -----------------------------------------------------------------------------------------------------

    def _fetch(self, module: nn.Module, name: str, got: Tensor) -> Tensor:
        """What a module gets that asks for a tensor of its own or of another module."""
        site = self._at.get((module, name))
        if site is None or site in self._runner.held or is_called_by(self._movers, 2) or self._is_put_there(got):
            return got
        reading = Reading.of(got, site, self._running.module if self._learning else None, self)
        return reading if not isinstance(got, FakeTensor) else self.value_of(reading)

    def value_of(self, reading: Reading) -> Tensor:
        """What is computed with where a reading is used: the parameter as it is in the branch in force.

        Raises:
            ViewError: several branches are in force.
        """
        if not self._runner.branches:
            return reading.plain  # kept beyond the view
        if reading.made is None:
            self._note(reading)
            wide = is_wide(reading.site.module) and reading.reader is reading.site.module
            branch = self._runner.neighbours(self._runner.active[:1])
            reading.made = self.weights.perturb(reading.site, branch, keep=True, wide=wide)[0]
            self._made.append(reading)
        return reading.made

    def rows_of(self, reading: Reading, ids: Tensor) -> Tensor:
        """As `value_of`, of the rows of a table that are looked up."""
        if not self._runner.branches or reading.made is not None or isinstance(reading.plain, DTensor):
            return nn.functional.embedding(ids, self.value_of(reading))
        self._note(reading)
        return self.weights.rows(reading.site, self._runner.branches[self._runner.active[0]], ids)

    def _is_put_there(self, found: Tensor) -> bool:
        """Whether it is no parameter, but what ``functional_call`` has made of one that was read, and so perturbed."""
        return not isinstance(found, nn.Parameter) and not self._in_instances

    def _check_made(self, begun: int) -> None:
        """Lets go of the weights made since then. Raises a ViewError if one was written."""
        while len(self._made) > begun:
            reading = self._made.pop()
            made, reading.made = reading.made, None  # a model may keep the reading for its next call
            assert made is not None, "it was noted when it was made"
            check_unwritten(reading.site, made)

    def _note(self, reading: Reading) -> None:
        site = reading.site
        if len(self._runner.active) > 1:
            reader = caller()
            by = f" by {type(reader).__name__}" if reader is not None else ""
            raise ViewError(
                f"{site.name} is read{by} with several branches in force, which was not so when the model was first "
                "looked at: it takes different paths from call to call. Evaluate one branch at a time (paired=False)"
            )
        self._readers.add(site, reading.reader)
        self.read.add(site.name)
        if not self._learning and not is_lookup(site.module):
            self._settled = False  # the next evaluation of one branch finds out by whom

    def _instead_of(self, tensor: Tensor) -> Tensor:
        """What takes the place of a tensor that comes to an operation and was fetched from no module."""
        if isinstance(tensor, DTensor) or not self._runner.branches or (self.gathers and self._running.in_hooks):
            return tensor  # hooks that gather and let go take the parameters themselves
        site = self._identified(tensor)
        if site is None or site in self._runner.held:
            return tensor
        self._bypassed.add(site)
        return self.value_of(Reading.of(tensor, site, self._running.module if self._learning else None, self))

    def _identified(self, tensor: Tensor) -> Site | None:
        """The site of a tensor that is a trainable parameter itself.

        Raises:
            ViewError: it is none, but lies in a trainable parameter's memory.
        """
        if isinstance(tensor, nn.Parameter):
            return next((site for site in self._readers.sites if stored(site) is tensor), None)
        site = self._memory.get(memory_of(tensor)) if self._memory and type(tensor) is Tensor else None
        if site is not None and site not in self._runner.held:
            raise ViewError(
                f"{site.name} is read through another tensor that shares its memory, which can't be perturbed: read it "
                "as an attribute of its module"
            )
        return None
