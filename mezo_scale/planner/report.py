"""A plan, to be read by people and by scripts."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.table import Table
from transformers import PretrainedConfig

from mezo_scale.models.shapes import config_of
from mezo_scale.planner.architecture import architecture
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
    config: PretrainedConfig
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
        config = config_of(model)
        entries = plan(config, cluster, workload, rates)
        for number, entry in enumerate(entries):
            if dry_run is not None and entry.fits and entry.strategy.can_dry_run:
                dry_run(f"dry run: {entry.strategy.layout}, stored in {workload.stored(entry.strategy)}")
                entries[number] = with_dry_run(config, entry, workload)
        return cls(model, config, cluster, workload, rates, recipe, entries)

    @property
    def choice(self) -> Entry | None:
        return recommended(list(self.entries))

    def command(self, entry: Entry) -> str:
        return command(self.recipe, self.model, entry.strategy, self.workload, self.cluster)

    def as_json(self) -> dict[str, Any]:
        """Plain values. Memory is per device at the peak, traffic per rank and step."""
        return {
            "model": self.model,
            "parameters": architecture(self.config).numel,
            "cluster": {**asdict(self.cluster), "nodes": self.cluster.nodes, "usable_gib": self.cluster.usable_gib},
            "workload": asdict(self.workload),
            "rates": asdict(self.rates),
            "formula": FORMULA,
            "strategies": [self._entry_as_json(entry) for entry in self.entries],
        }

    def _entry_as_json(self, entry: Entry) -> dict[str, Any]:
        strategy, moved, choice = entry.strategy, entry.traffic, self.choice
        return {
            "strategy": strategy.name,
            "gpus": strategy.world_size,
            "replicate": strategy.replicate,
            "shard": strategy.shard,
            "offload": strategy.offload,
            "master": strategy.master,
            "stored": self.workload.stored(strategy),
            "fits": entry.fits,
            "recommended": entry is choice,
            "peak_gib": entry.memory.peak / GIB,
            "memory_gib": {part: getattr(entry.memory, part) / GIB for part in _PARTS},
            "host_gib_per_node": entry.host_gib,
            "saving_host_gib": saving(self.config, strategy, self.workload) / GIB,
            "gathered_gib_per_step": moved.gathered / GIB,
            "inside_node_gib_per_step": moved.inside_node / GIB,
            "between_nodes_gib_per_step": moved.between_nodes / GIB,
            "from_host_gib_per_step": moved.host / GIB,
            "scalar_bytes_per_step": moved.scalars,
            "seconds_per_step": entry.seconds,
            "dry_run": None if entry.dry is None else _dry_as_json(entry, entry.dry),
            "note": entry.note,
            "command": self.command(entry),
        }

    def table(self) -> Table:
        """One line per strategy; of hsdp's splits the best."""
        dry = any(entry.dry for entry in self.entries)
        gpus, nodes = self.cluster.gpus, self.cluster.nodes
        table = Table(
            title=f"{self.model}: {architecture(self.config).numel / 1e9:.3g} B parameters on {gpus} x "
            f"{self.cluster.memory_gib:g} GiB ({nodes} node{'s' * (nodes > 1)}), per device {self.workload.rows} x "
            f"{self.workload.tokens} tokens, {self.workload.branches} branches in {self.workload.dtype}\n"
            "GiB per device at the peak of a step; GiB received per rank and step; seconds are an estimate",
            title_style="",
            title_justify="left",
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
        )
        table.add_column("strategy", no_wrap=True)
        table.add_column("stored in")
        heads = ["peak", *(["dry run", "error"] if dry else []), *_PARTS[:-2], "activ.", "logits"]
        heads += ["host/node", "in node", "between", "s/step"]
        for head in heads:
            table.add_column(head, justify="right")
        table.add_column("fits", justify="center")
        choice = self.choice
        for entry in self._shown():
            memory, moved = entry.memory, entry.traffic
            checked = [_gib(entry.dry.peak), f"{entry.dry_error:+.1%}"] if entry.dry else ["", ""]
            table.add_row(
                entry.strategy.layout,
                self.workload.stored(entry.strategy),
                _gib(memory.peak),
                *(checked if dry else []),
                *(_gib(getattr(memory, part)) for part in _PARTS),
                _gib(entry.host_gib * GIB),
                _gib(moved.inside_node),
                _gib(moved.between_nodes),
                f"{entry.seconds:.2f}",
                "yes" if entry.fits else "no",
                style="bold" if entry is choice else "" if entry.fits else "dim",
            )
        return table

    def lines(self) -> list[str]:
        """What goes under the table."""
        cluster, choice = self.cluster, self.choice
        found = [
            f"fits: the peak leaves {cluster.headroom:.0%} of {cluster.memory_gib:g} GiB free, for the device's "
            f"context, communication buffers and fragments: {cluster.usable_gib:.1f} GiB",
            *dict.fromkeys(f"{entry.strategy.layout}: {entry.note}" for entry in self._shown() if entry.note),
            f"without offload, {self._without_offload()}",
            "",
            FORMULA,
            f"  rates: {', '.join(f'{name} {value:g}' for name, value in asdict(self.rates).items())}",
        ]
        if choice is not None:
            about = f"recommended: {choice.strategy.layout}, stored in {self.workload.stored(choice.strategy)}"
            if not choice.strategy.master and self.workload.dtype != "float32":
                about += "; no float32 master fits, and 16-bit storage loses small updates"
            if choice.host_gib:
                about += f"; it takes {choice.host_gib:.0f} GiB of each node's memory"
            found += ["", about, f"  {self.command(choice)}"]
        return found

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
            needed = devices_needed(self.config, self.cluster, self.workload, master=master)
            if needed is not None:
                parts.append(f"stored in {'float32' if master else self.workload.dtype} from {needed} on")
        return f"it fits {kind} {' and '.join(parts)}" if parts else f"it fits no number of {kind}"

    def _shown(self) -> list[Entry]:
        best: dict[tuple[Any, ...], Entry] = {}
        for entry in self.entries:
            strategy = entry.strategy
            key = (strategy.name, strategy.offload, strategy.master)
            rank = (not entry.fits, entry.seconds if entry.fits else 0, entry.memory.peak)
            other = best.get(key)
            if other is None or rank < (not other.fits, other.seconds if other.fits else 0, other.memory.peak):
                best[key] = entry
        return list(best.values())


def _dry_as_json(entry: Entry, dry: Memory) -> dict[str, Any]:
    return {
        "peak_gib": dry.peak / GIB,
        "error": entry.dry_error,
        "memory_gib": {part: getattr(dry, part) / GIB for part in _PARTS},
        "gathered_gib_per_step": entry.dry_gathered / GIB,
    }


def _gib(size: float) -> str:
    return "" if size == 0 else f"{size / GIB:.1f}" if size >= 0.05 * GIB else "0.0"
