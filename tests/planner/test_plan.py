"""The planner's arithmetic against the dry run of the real step, and what it offers, fits and recommends."""

import importlib
import json
import math
import pathlib
from typing import Any

import pytest
import torch
from transformers import BltConfig, MambaConfig, PretrainedConfig

from mezo_scale import models, recipe
from mezo_scale.distributed.world import World
from mezo_scale.errors import ModelError, RecipeError, ShardingError
from mezo_scale.models.shapes import config_of
from mezo_scale.perturbation import scratch
from mezo_scale.planner import (
    GIB,
    Cluster,
    Rates,
    Report,
    Strategy,
    Workload,
    architecture,
    architecture_of,
    device_counts,
    devices_needed,
    memory,
    plan,
    recommended,
    seconds,
    traffic,
)
from mezo_scale.planner.architecture import KNOWN
from mezo_scale.planner.deepspeed import CONFIGS, zero3_settings
from mezo_scale.planner.dry_run import dry_run
from mezo_scale.planner.memory import ALIGN
from mezo_scale.planner.workload import BYTES
from tools.known_shapes import known

RANKS = (1, 2, 4, 8, 64)


def shortened(name: str, layers: int) -> PretrainedConfig:
    """A model with fewer layers: what is not stored is as large as with all of them, so errors show more."""
    config = config_of(name)
    config.num_hidden_layers = layers
    if hasattr(config, "layer_types"):
        config.layer_types = config.layer_types[:layers]
    return config


def over(ranks: int, *, master: bool) -> Strategy:
    return Strategy("single" if ranks == 1 else "fsdp2", shard=ranks, master=master)


def check(config: PretrainedConfig, strategy: Strategy, workload: Workload, tolerance: float) -> None:
    arch = architecture(config)
    expected, found = memory(arch, strategy, workload), dry_run(config, strategy, workload)
    assert expected.peak == pytest.approx(found[0].peak, rel=tolerance)
    assert expected.shards + expected.master == pytest.approx(found[0].shards + found[0].master, rel=1e-3)
    assert traffic(arch, strategy, workload).gathered == found[1]


@pytest.mark.parametrize("master", [False, True], ids=["16-bit", "master"])
@pytest.mark.parametrize(
    ("name", "ranks"),
    [*(("opt-1.3b", ranks) for ranks in RANKS), ("opt-13b", 4), ("opt-66b", 2), ("opt-66b", 8), ("opt-66b", 64)],
)
def test_the_arithmetic_agrees_with_the_dry_run(name: str, ranks: int, master: bool) -> None:
    check(shortened(name, 2), over(ranks, master=master), Workload(), 0.05)


@pytest.mark.parametrize(("ranks", "gib"), [(8, 24), (4, 42), (2, 72)])
def test_66b_in_16_bits_fits_as_promised(ranks: int, gib: int) -> None:
    assert memory(architecture_of("opt-66b"), over(ranks, master=False), Workload()).peak <= gib * GIB


@pytest.mark.parametrize(
    ("name", "strategy", "workload"),
    [
        ("opt-350m", Strategy("single", master=True), Workload(16, 400)),  # post-norm, and tables narrower than layers
        ("opt-1.3b", Strategy("fsdp2", shard=8, master=True), Workload(16, 400)),
        ("opt-1.3b", Strategy("hsdp", replicate=2, shard=4), Workload(4, 400, branches=4)),
        ("opt-1.3b", Strategy("fsdp2", shard=4), Workload(4, 400, dtype="float32")),
        ("llama-3-8b", Strategy("fsdp2", shard=8, master=True), Workload(16, 400)),  # untied tables, gated
        ("llama-3-8b", Strategy("single"), Workload(16, 400)),
        ("qwen3-0.6b", Strategy("single", master=True), Workload(16, 400)),
        ("qwen2.5-0.5b", Strategy("fsdp2", shard=4), Workload(8, 1000)),
    ],
)
def test_the_arithmetic_holds_for_other_models_and_larger_batches(
    name: str, strategy: Strategy, workload: Workload
) -> None:
    check(shortened(name, 2), strategy, workload, 0.05)


def test_a_dry_run_leaves_no_process_group_and_touches_no_memory() -> None:
    dry_run(shortened("opt-66b", 1), over(4, master=False), Workload())
    assert not torch.distributed.is_initialized()


def test_a_strategy_without_a_dry_run_is_refused() -> None:
    with pytest.raises(ValueError, match="zero3 .*can't be run dry"):
        dry_run(shortened("opt-125m", 1), Strategy("zero3", shard=2), Workload())


def folder_of(name: str, folder: pathlib.Path) -> str:
    config_of(name).save_pretrained(folder)
    return str(folder)


def report(gpus: int, gib: float, name: str = "opt-66b", per_node: int = 8, **rest: Any) -> Report:
    cluster = Cluster(gpus, min(gpus, per_node), gib, host_gib=rest.pop("host_gib", None))
    return Report.make(name, cluster, Workload(**rest), Rates(), "recipe.yaml")


@pytest.mark.parametrize("gpus", [1, 2, 8, 16])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_command_that_is_printed_passes_the_checks_of_a_run(
    tmp_path: pathlib.Path, gpus: int, dtype: str
) -> None:
    (tmp_path / "recipe.yaml").write_text("model: {name: x}\ntask: {data: x.csv}\n")
    found = report(gpus, 80, folder_of("opt-125m", tmp_path / "model"), dtype=dtype, branches=4)
    world = World(0, 0, min(gpus, 8), gpus, torch.device("cpu"))
    commands = 0
    for entry in found.entries:
        command = found.command(entry)
        overrides = [word for word in command.split() if "=" in word and not word.startswith("--")]
        parsed = recipe.load(tmp_path / "recipe.yaml", overrides)
        models.check(parsed, world)
        asked = Strategy.of(parsed.sharding, gpus, world.nodes)
        assert asked.name == parsed.sharding.strategy == entry.strategy.name
        assert asked.axes == entry.strategy.axes
        assert parsed.model.dtype == found.workload.stored(entry.strategy)
        assert parsed.optimizer.num_directions == 2
        assert str(gpus if gpus < 8 else 8) in command.split()
        commands += 1
    assert commands > 0


def test_the_json_holds_every_strategy_with_its_figures() -> None:
    found = report(8, 80)
    tree = json.loads(json.dumps(found.as_json()))
    kinds = {(one["strategy"], one["offload"], one["master"]) for one in tree["strategies"]}
    for master in (True, False):
        for strategy, offload in [("ddp", None), ("fsdp2", None), ("hsdp", None), ("zero3", None)]:
            assert (strategy, offload, master) in kinds
        for strategy in ("fsdp2", "hsdp", "zero3"):
            assert (strategy, "cpu", master) in kinds
    assert ("zero3", "nvme", True) in kinds
    for one in tree["strategies"]:
        assert one["gpus"] == one["shard"] * one["replicate"] == 8
        assert one["peak_gib"] == pytest.approx(sum(one["memory_gib"].values()))
        assert one["fits"] == (one["peak_gib"] <= 72 and not one["note"])
        assert one["gathered_gib_per_step"] >= one["inside_node_gib_per_step"] + one["between_nodes_gib_per_step"]
    (choice,) = [one for one in tree["strategies"] if one["recommended"]]
    assert (choice["strategy"], choice["offload"], choice["master"]) == ("fsdp2", None, True)
    assert "torchrun" in choice["command"]


def test_weights_move_once_whatever_the_number_of_branches() -> None:
    arch = architecture_of("opt-13b")
    one, four = (traffic(arch, Strategy("fsdp2", shard=8), Workload(branches=branches)) for branches in (2, 8))
    assert one.gathered == four.gathered
    assert four.scalars - one.scalars == 3 * 16


def test_hsdp_in_nodes_sends_no_weights_between_them() -> None:
    arch = architecture_of("opt-13b")
    inside, across = (
        traffic(arch, strategy, Workload(), 8)
        for strategy in (Strategy("hsdp", replicate=4, shard=8), Strategy("fsdp2", shard=32))
    )
    assert inside.between_nodes == 0
    assert across.between_nodes * 8 == pytest.approx(across.gathered * 31 / 32, rel=1e-6)
    slow = Rates(between_gbit_s=10)
    hsdp, fsdp2 = Strategy("hsdp", replicate=4, shard=8), Strategy("fsdp2", shard=32)
    assert seconds(arch, hsdp, Workload(), slow).step < seconds(arch, fsdp2, Workload(), slow).step


def test_one_small_device_is_told_to_offload_and_how_many_would_do_without() -> None:
    found = report(1, 40)
    assert found.choice is not None
    assert found.choice.strategy.offload == "cpu"
    text = "\n".join(found.lines())
    arch, cluster = found.arch, found.cluster
    for master in (False, True):
        needed = devices_needed(arch, cluster, Workload(), master=master)
        assert needed is not None
        assert f"from {needed} on" in text
        for gpus, fits in ((needed, True), (needed - 1, False)):
            peak = memory(arch, Strategy("fsdp2", shard=gpus, master=master), Workload()).peak
            assert (peak <= 36 * GIB) == fits


def test_host_memory_that_is_too_small_is_said() -> None:
    enough, short = report(8, 40, host_gib=256), report(8, 40, host_gib=64)
    assert enough.choice is not None
    assert short.choice is not None
    assert (enough.choice.strategy.offload, short.choice.strategy.offload) == ("cpu", "nvme")
    assert any("takes 245 GiB of each node's memory, which has 64" in line for line in short.lines())


def test_a_shard_that_is_larger_than_the_buffers_of_the_disk_is_said() -> None:
    (entry,) = [entry for entry in report(1, 40).entries if entry.strategy.offload == "nvme"]
    assert not entry.fits
    assert "463 M elements, does not fit the buffers of ds_configs/zero3_offload_nvme.json" in entry.note


@pytest.mark.parametrize(("stored", "offload"), CONFIGS)
def test_the_plan_counts_with_the_numbers_of_the_configuration_that_a_run_is_given(
    monkeypatch: pytest.MonkeyPatch, stored: str, offload: str | None
) -> None:
    tree = json.loads((pathlib.Path(models.__file__).parents[2] / CONFIGS[stored, offload]).read_text())
    assert zero3_settings(stored, offload) == tree["zero_optimization"]
    arch = architecture_of("opt-66b")
    strategy = Strategy("zero3", shard=8, offload=offload, master=stored == "float32")
    before = memory(arch, strategy, Workload()).gathered
    fewer = tree["zero_optimization"] | {"stage3_max_live_parameters": 10**8}
    monkeypatch.setattr(importlib.import_module("mezo_scale.planner.memory"), "zero3_settings", lambda *asked: fewer)
    assert before - memory(arch, strategy, Workload()).gathered == 9 * 10**8 * BYTES[stored]


def test_published_shapes_are_what_their_models_are() -> None:
    assert json.loads(KNOWN.read_text()) == json.loads(json.dumps(known()))


def test_scratch_is_counted_in_the_pieces_that_it_is_taken_in() -> None:
    assert ALIGN == scratch.ALIGN


def test_numbers_of_devices_are_a_list_that_may_double() -> None:
    assert device_counts("8") == [8]
    assert device_counts("1,2,4..64") == [1, 2, 4, 8, 16, 32, 64]
    assert device_counts("3..12, 16") == [3, 6, 12, 16]


def test_the_projection_keeps_weights_off_the_network_under_hsdp_alone() -> None:
    arch, workload = architecture_of("opt-66b"), Workload(rows=4, tokens=400)
    fast, slow = Rates(between_gbit_s=100), Rates(between_gbit_s=10)
    layouts = Strategy("hsdp", replicate=8, shard=8), Strategy("fsdp2", shard=64)
    times = [seconds(arch, layout, workload, rates).step for layout in layouts for rates in (fast, slow)]
    assert times[0] == times[1] == seconds(arch, Strategy("fsdp2", shard=8), workload, fast).step
    assert times[3] > 5 * times[2] > 5 * times[0]


def test_16_bits_are_recommended_only_where_no_master_fits() -> None:
    arch = architecture_of("opt-66b")
    both = plan(arch, Cluster(8, 8, 80), Workload())
    choice = recommended(both)
    assert choice is not None
    assert choice.strategy.master
    only = recommended([entry for entry in both if not entry.strategy.master])
    assert only is not None
    assert not only.strategy.master


@pytest.mark.parametrize(
    ("config", "field"),
    [(MambaConfig(num_hidden_layers=2), "num_attention_heads None"), (BltConfig(), "hidden_size None")],
    ids=["mamba", "blt"],
)
def test_a_model_without_one_width_for_all_layers_is_refused_by_the_name_of_the_field(
    config: PretrainedConfig, field: str
) -> None:
    with pytest.raises(
        ModelError, match=f"a {config.model_type} model can't be planned: its configuration has {field}"
    ):
        architecture(config)


def test_padding_of_uneven_shards_is_counted() -> None:
    arch = architecture_of("opt-125m")
    exact = memory(arch, Strategy("fsdp2", shard=2), Workload()).shards * 2
    padded = memory(arch, Strategy("fsdp2", shard=7), Workload()).shards * 7
    assert exact == 2 * 125_239_296
    assert exact < padded < 1.01 * exact


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Cluster(12, 8, 80), ShardingError, "12 devices do not fill nodes of 8: take 8 or 16"),
        (lambda: Cluster(0, 8, 80), ShardingError, "0 devices"),
        (lambda: Cluster(8, 8, 0), RecipeError, "0 GiB: expected more than 0"),
        (lambda: Cluster(8, 8, math.nan), RecipeError, "nan GiB: expected more than 0"),
        (lambda: Cluster(8, 8, 80, 1.0), RecipeError, "headroom is 1.0"),
        (lambda: Workload(rows=0), RecipeError, "rows is 0"),
        (lambda: Workload(dtype="int8"), RecipeError, "'int8': expected float32"),
        (lambda: device_counts("8,"), RecipeError, "--gpus is '8,': expected a number, or numbers like 1,2,4..64"),
        (lambda: device_counts("four"), RecipeError, "--gpus is 'four': expected a number"),
        (lambda: device_counts("4..60"), RecipeError, "doubling 4 does not come to 60"),
        (lambda: device_counts("0..8"), RecipeError, "doubling 0 does not come to 8"),
        (lambda: device_counts("8,4"), RecipeError, "expected rising numbers, each once"),
        (lambda: Rates.parse(["between_gbit=10"]), RecipeError, "did you mean between_gbit_s"),
        (lambda: Rates.parse(["pcie_gb_s=fast"]), RecipeError, "'fast': expected a number"),
        (lambda: Rates.parse(["pcie_gb_s=-1"]), RecipeError, "finite number above 0"),
    ],
)
def test_bad_input_is_named(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
