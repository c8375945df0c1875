"""A sweep file and its cells: what is shipped, what multiplies out, and what is refused in one line."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from mezo_scale.bench.sweep import SHIPPED, Cell, Places, cells, fields, load

Run = Callable[..., tuple[int, str, str]]
CPU = Places()


def of(folder: Path, *overrides: str, places: Places = CPU, **tree: object) -> list[Cell]:
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({"models": "m"} | tree))
    return cells(load(path, overrides), places)


def test_on_one_rank_strong_and_weak_scaling_are_one_cell(tmp_path: Path) -> None:
    found = of(tmp_path, world_sizes=[1, 2, 4], scalings=["strong", "weak"], rows=8)
    assert [(cell.world_size, cell.rows) for cell in found] == [(1, 8), (2, 8), (2, 16), (4, 8), (4, 32)]


def test_a_method_runs_only_where_it_can(tmp_path: Path) -> None:
    methods, strategies = ["mezo", "published", "naive", "adamw"], ["single", "fsdp2", "hsdp", "zero3"]
    found = of(tmp_path, methods=methods, strategies=strategies, directions=[1, 4])
    places = {method: {(c.strategy, c.world_size) for c in found if c.method == method} for method in methods}
    assert places["published"] == {("single", 1)}
    assert places["naive"] == places["adamw"] == {("fsdp2", 1), ("fsdp2", 2)}
    assert ("hsdp", 2) in places["mezo"]
    assert ("hsdp", 1) not in places["mezo"]
    assert {c.num_directions for c in found if c.method != "mezo"} == {1}


def test_the_first_look_has_every_method_and_both_kinds_of_scaling() -> None:
    found = cells(load("quick", ["models=a"]), CPU)
    assert {cell.model for cell in found} == {"a"}
    assert {cell.method for cell in found} == {"mezo", "published", "naive", "adamw"}
    assert {(cell.strategy, cell.world_size) for cell in found} >= {("fsdp2", 1), ("fsdp2", 2), ("zero3", 2)}
    assert {cell.rows for cell in found if cell.world_size == 2} == {4, 8}
    assert len(found) == 8


def test_the_sweep_of_one_gpu_caps_memory_up_to_30b_and_gives_66b_the_whole_device() -> None:
    sweep = load("one-gpu")
    found = cells(sweep, Places(gpus=1))
    assert [cell.method for cell in found] == ["mezo"] * 4 + ["adamw"] * 4 + ["published"] * 3
    assert {cell.memory_cap_gib for cell in found if cell.model != "random:opt-66b"} == {74.5}
    assert {cell.memory_cap_gib for cell in found if cell.model == "random:opt-66b"} == {None}
    assert sweep.budget_s == 510
    assert sweep.published_s["random:opt-13b"] == 2.702


@pytest.mark.parametrize("name", [path.stem for path in SHIPPED.glob("*.yaml")])
def test_every_sweep_that_is_shipped_is_one(name: str) -> None:
    for places in (CPU, Places(gpus=8, nodes=4)):
        assert cells(load(name), places)


def test_ranks_are_as_many_as_gpus_unless_the_sweep_says_so(tmp_path: Path) -> None:
    cluster = Places(gpus=8, nodes=2, slurm=True)
    assert [cell.world_size for cell in of(tmp_path, rows=16, places=cluster)] == [1, 2, 4, 8, 16]
    (cell,) = of(tmp_path, rows=16, strategies="hsdp", world_sizes=16, places=cluster)
    assert cell.replicate == 2  # a copy per node
    assert [cell.world_size for cell in of(tmp_path, places=CPU)] == [1, 2]


@pytest.mark.parametrize("said", [{"SLURM_GPUS_ON_NODE": "8"}, {"SLURM_GPUS_PER_NODE": "a100:8"}])
def test_in_an_allocation_there_are_the_gpus_that_slurm_says(tmp_path: Path, said: dict[str, str]) -> None:
    (tmp_path / "srun").touch(mode=0o755)
    environ = {"PATH": str(tmp_path), "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "4"}
    assert Places.here(environ | said) == Places(gpus=8, nodes=4, slurm=True)
    assert Places.here(environ) == Places(gpus=0, nodes=4, slurm=True)
    assert not Places.here({"PATH": str(tmp_path)} | said).slurm


def test_a_grid_takes_what_is_common_and_an_override_holds_for_all(tmp_path: Path) -> None:
    grids = [{"rows": 4}, {"strategies": "zero3", "tokens": 32}]
    found = of(tmp_path, world_sizes=1, tokens=16, grids=grids)
    assert [(c.strategy, c.rows, c.tokens) for c in found] == [("fsdp2", 4, 16), ("zero3", 8, 32)]
    found = of(tmp_path, "tokens=64", "rows=2", world_sizes=1, tokens=16, grids=grids)
    assert [(c.strategy, c.rows, c.tokens) for c in found] == [("fsdp2", 2, 64), ("zero3", 2, 64)]


def test_the_help_of_bench_explains_every_field(run: Run) -> None:
    code, out, _ = run("bench", "--help")
    assert code == 0
    words = " ".join(out.split())
    for name, about in fields():
        assert about
        assert f"{name}: {' '.join(about.split())}" in words


@pytest.mark.parametrize(
    ("tree", "overrides", "said"),
    [
        ({}, [], "sweep.yaml: models is missing: it has no default"),
        ({"models": []}, [], "models: found [] (a list), expected at least 1 item"),
        ({"models": "m", "row": 3}, [], "sweep.yaml: unknown key row; did you mean rows?"),
        ({"models": "m", "grids": [{"stratgies": "fsdp2"}]}, [], "unknown key stratgies; did you mean strategies?"),
        ({"models": "m", "grids": [3]}, [], "grids: found [3], expected a list of fields"),
        ({"models": "m", "strategies": ["fsdp2", "ddp"]}, [], "strategies.1: found 'ddp' (text), expected 'single'"),
        ({"models": "m", "rounds": 0}, [], "rounds: found 0 (an integer), expected greater than or equal to 1"),
        ({"models": "m"}, ["method=mezo"], "method=mezo: unknown key method; did you mean methods?"),
        ({"models": "m"}, ["xyz=1"], "xyz=1: unknown key xyz; expected models, strategies, world_sizes"),
        ({"models": "m"}, ["quick"], "found 'quick' after the sweep, expected key=value"),
        (
            {"models": "random:opt-125m", "world_sizes": [1, 2]},
            ["rows=3"],
            "rows is 3, which 2 ranks can't share evenly",
        ),
        ({"models": "m", "methods": "adamw"}, ["strategies=zero3"], "no cell is left"),
        ({"models": "./nowhere"}, [], "there is no nowhere"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_in_one_line(
    run: Run, tmp_path: Path, tree: dict[str, object], overrides: list[str], said: str
) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(tree))
    code, out, err = run("bench", path, *overrides, "--out", tmp_path / "out")
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_no_sweep_is_refused_in_one_line(run: Run, tmp_path: Path) -> None:
    code, _, err = run("bench", "nowhere", "--out", tmp_path)
    assert (code, err) == (
        2,
        "error: there is no file nowhere: give a sweep (YAML), or one of one-gpu, quick, scaling\n",
    )
    (tmp_path / "list.yaml").write_text("- 3\n")
    assert "holds [3] (a list), expected the fields of a sweep" in run("bench", tmp_path / "list.yaml")[2]
