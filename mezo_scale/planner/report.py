"""A plan, to be read by people and by scripts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.table import Table

from mezo_scale.planner.architecture import Architecture, architecture_of
from mezo_scale.planner.command import command
from mezo_scale.planner.memory import Memory, saving
from mezo_scale.planner.plan import Cluster, Entry, devices_needed, plan, recommended, with_dry_run
from mezo_scale.planner.rates import FORMULA, Rates
from mezo_scale.planner.workload import GIB, Workload

_PARTS = ("shards", "master", "gathered", "scratch", "activations", "logits")


@dataclass(frozen=True)
class Report:
    """A plan and what it was made from.

    Attributes:
        model: as the user calls it.
        recipe: the file that the command lines name.
    """

    model: str
    arch: Architecture
    cluster: Cluster
    workload: Workload
    rates: Rates
    recipe: str
    entries: Sequence[Entry]

    @classmethod
    def make(
        cls,
        model: str,
        cluster: Cluster,
        workload: Workload,
        rates: Rates,
        recipe: str,
        *,
        dry_run: Callable[[str], None] | None = None,
    ) -> "Report":
        """The plan of a model by name. With `dry_run` what fits is run dry, seconds to a minute each, and `dry_run` is
        told before each what is run.

        Raises:
            RecipeError, ModelError, ShardingError: no such model, or devices that can't be.
        """
        arch = architecture_of(model)
        entries = plan(arch, cluster, workload, rates)
        for number, entry in enumerate(entries):
            if dry_run is not None and entry.fits and entry.strategy.can_dry_run and workload.positions == 1:
                from mezo_scale.models.shapes import config_of  # seconds to import

                dry_run(f"dry run: {entry.strategy.layout}, stored in {workload.stored(entry.strategy)}")
                entries[number] = with_dry_run(config_of(model), entry, workload)
        return cls(model, arch, cluster, workload, rates, recipe, entries)

    @property
    def choice(self) -> Entry | None:
        return recommended(list(self.entries))

    def command(self, entry: Entry) -> str:
        random = self.model.startswith("random:")
        name = self.model if random or self.arch.hub is None else self.arch.hub
        return command(self.recipe, name, entry.strategy, self.workload, self.cluster)

    def as_json(self) -> dict[str, Any]:
        """Plain values. Memory is per device at the peak, traffic per rank and step."""
        return {
            "model": self.model,
            "parameters": self.arch.numel,
            "cluster": {**asdict(self.cluster), "nodes": self.cluster.nodes, "usable_gib": self.cluster.usable_gib},
            "workload": asdict(self.workload),
            "rates": asdict(self.rates),
            "formula": FORMULA,
            "strategies": [self._entry_as_json(entry) for entry in self.entries],
        }

    def _entry_as_json(self, entry: Entry) -> dict[str, Any]:
        strategy, moved = entry.strategy, entry.traffic
        dry = {"error": entry.dry_error, "gathered_gib_per_step": entry.dry_gathered / GIB}
        return {
            "strategy": strategy.name,
            "gpus": strategy.world_size,
            "replicate": strategy.replicate,
            "shard": strategy.shard,
            "offload": strategy.offload,
            "master": strategy.master,
            "stored": self.workload.stored(strategy),
            "fits": entry.fits,
            "recommended": entry is self.choice,
            **_memory_as_json(entry.memory),
            "host_gib_per_node": entry.host_gib,
            "saving_host_gib": saving(self.arch, strategy, self.workload) / GIB,
            "gathered_gib_per_step": moved.gathered / GIB,
            "inside_node_gib_per_step": moved.inside_node / GIB,
            "between_nodes_gib_per_step": moved.between_nodes / GIB,
            "from_host_gib_per_step": moved.host / GIB,
            "scalar_bytes_per_step": moved.scalars,
            "seconds_per_step": entry.seconds.step,
            "seconds": asdict(entry.seconds),
            "tokens_per_second": self.tokens_s(entry),
            "dry_run": None if entry.dry is None else _memory_as_json(entry.dry) | dry,
            "note": entry.note,
            "command": self.command(entry),
        }

    def tokens_s(self, entry: Entry) -> float:
        """Of all devices together, each token once however many branches see it."""
        return self.workload.rows * self.workload.tokens * entry.strategy.world_size / entry.seconds.step

    def table(self) -> Table:
        """One line per strategy; of hsdp's splits the best."""
        gpus, nodes = self.cluster.gpus, self.cluster.nodes
        title = (
            f"{self._about()} on {gpus} x {self.cluster.memory_gib:g} GiB ({nodes} node{'s' * (nodes > 1)}), "
            f"{self._step()}\n"
            "GiB per device at the peak of a step; GiB received per rank and step; seconds are an estimate"
        )
        return _table(title, [(self._row(entry), entry.fits, entry is self.choice) for entry in self.shown()])

    def _row(self, entry: Entry) -> dict[str, str]:
        memory, moved = entry.memory, entry.traffic
        row = {"strategy": entry.strategy.layout, "stored in": self.workload.stored(entry.strategy)}
        row["peak"] = _gib(memory.peak)
        if any(other.dry for other in self.entries):
            row["dry run"] = _gib(entry.dry.peak) if entry.dry else ""
            row["error"] = f"{entry.dry_error:+.1%}" if entry.dry else ""
        row |= {part.replace("activations", "activ."): _gib(getattr(memory, part)) for part in _PARTS}
        row |= {"host/node": _gib(entry.host_gib * GIB), "in node": _gib(moved.inside_node)}
        row |= {"between": _gib(moved.between_nodes), "s/step": f"{entry.seconds.step:.2f}"}
        return row | {"fits": "yes" if entry.fits else "no"}

    def _about(self) -> str:
        return f"{self.model}: {self.arch.numel / 1e9:.3g} B parameters"

    def _step(self) -> str:
        step = self.workload
        return f"per device {step.rows} x {step.tokens} tokens, {step.branches} branches in {step.dtype}"

    def lines(self) -> list[str]:
        """What goes under the table."""
        cluster, choice = self.cluster, self.choice
        found = [
            f"fits: the peak leaves {cluster.headroom:.0%} of {cluster.memory_gib:g} GiB free, for the device's "
            f"context, communication buffers and fragments: {cluster.usable_gib:.1f} GiB",
            *dict.fromkeys(f"{entry.strategy.layout}: {entry.note}" for entry in self.shown() if entry.note),
            f"without offload, {self._without_offload()}",
            "",
            *self.formula(),
        ]
        if choice is not None:
            about = f"recommended: {choice.strategy.layout}, stored in {self.workload.stored(choice.strategy)}"
            if not choice.strategy.master and self.workload.dtype != "float32":
                about += "; no float32 master fits, and 16-bit storage loses small updates"
            if choice.host_gib:
                about += f"; it takes {choice.host_gib:.0f} GiB of each node's memory"
            found += ["", about, f"  {self.command(choice)}"]
        return found

    def formula(self) -> list[str]:
        """How seconds are estimated, and with which rates."""
        return [FORMULA, f"  rates: {', '.join(f'{name} {value:g}' for name, value in asdict(self.rates).items())}"]

    def nothing_fits(self) -> str:
        """Why, and what would."""
        cluster = self.cluster
        least = min((entry for entry in self.entries if not entry.note), key=lambda entry: entry.memory.peak)
        stored = self.workload.stored(least.strategy)
        return (
            f"nothing fits: {self.model} takes at least {_gib(least.memory.peak)} GiB per device on {cluster.gpus} "
            f"({least.strategy.layout}, stored in {stored}), and {cluster.memory_gib:g} GiB leave "
            f"{cluster.usable_gib:.1f}; take devices of {least.memory.peak / GIB / (1 - cluster.headroom):.1f} GiB, or "
            f"fewer rows and tokens; without offload, {self._without_offload()}"
        )

    def _without_offload(self) -> str:
        """On how many devices of this kind the model fits."""
        kind, parts = f"devices of {self.cluster.memory_gib:g} GiB", []
        for master in (False, True) if self.workload.dtype == "bfloat16" else (False,):
            needed = devices_needed(self.arch, self.cluster, self.workload, master=master)
            if needed is not None:
                parts.append(f"stored in {'float32' if master else self.workload.dtype} from {needed} on")
        return f"it fits {kind} {' and '.join(parts)}" if parts else f"it fits no number of {kind}"

    def shown(self) -> list[Entry]:
        """Of each kind of strategy the best split: one that fits, then the fastest, then the smallest."""
        best: dict[tuple[Any, ...], Entry] = {}
        for entry in sorted(
            self.entries, key=lambda one: (not one.fits, one.seconds.step * one.fits, one.memory.peak), reverse=True
        ):
            best[entry.strategy.name, entry.strategy.offload, entry.strategy.master] = entry
        return [entry for entry in self.entries if entry in best.values()]


def scaling_table(reports: Sequence[Report]) -> Table:
    """A projection: the same rows on every device, over numbers of devices. One line per layout without offload that
    fits: over all devices, or a copy on each node."""
    first = reports[0]
    rows = []
    for report in reports:
        cluster = report.cluster
        for entry in report.entries:
            strategy, layers = entry.strategy, max(1, report.arch.layers)
            spread = cluster.gpus if not strategy.is_hybrid else cluster.gpus_per_node
            if entry.fits and strategy.offload is None and strategy.shard in (1, spread) and not strategy.is_deepspeed:
                row = {"devices": str(cluster.gpus), "strategy": strategy.layout}
                row |= {"stored in": report.workload.stored(strategy), "peak": _gib(entry.memory.peak)}
                row |= {"s/step": f"{entry.seconds.step:.2f}", "tokens/s": f"{report.tokens_s(entry):,.0f}"}
                row["ms compute/layer"] = f"{entry.seconds.compute / layers * 1e3:.1f}"
                row["ms gather/layer"] = f"{entry.seconds.gather / layers * 1e3:.1f}"
                rows.append((row, True, entry is report.choice))
    title = (
        f"PROJECTED, not measured: {first._about()} on devices of {first.cluster.memory_gib:g} GiB, {first._step()}\n"
        "GiB per device at the peak of a step; tokens per second of all devices together; bold: recommended"
    )
    return _table(title, rows)


def _table(title: str, rows: Sequence[tuple[Mapping[str, str], bool, bool]]) -> Table:
    """Rows by the names of their columns; whether each fits, and whether it is recommended."""
    table = Table(title=title, title_style="", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for head in rows[0][0] if rows else ():
        centre = {"strategy": "left", "stored in": "left", "fits": "center"}
        table.add_column(head, no_wrap=head == "strategy", justify=centre.get(head, "right"))  # type: ignore[arg-type]
    for row, fits, chosen in rows:
        table.add_row(*row.values(), style="bold" if chosen else "" if fits else "dim")
    return table


def _memory_as_json(memory: Memory) -> dict[str, Any]:
    return {"peak_gib": memory.peak / GIB, "memory_gib": {part: getattr(memory, part) / GIB for part in _PARTS}}


def _gib(size: float) -> str:
    return "" if size == 0 else f"{size / GIB:.1f}" if size >= 0.05 * GIB else "0.0"
