"""`mezo-scale plan`: a table for people, JSON for scripts, one line and exit code 2 for what can't be."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mezo_scale.models.shapes import config_of

Run = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize("device", [("--gpus", 8, "--gpu-memory", 80), ("--gpus", 2, "--gpu-memory", 80)])
def test_the_table_names_the_peak_the_parts_and_the_command(run: Run, device: tuple[object, ...]) -> None:
    code, out, err = run("plan", "--model", "opt-66b", *device)
    assert (code, err) == (0, "")
    assert "65.7 B parameters on" in out
    for word in (
        "peak",
        "shards",
        "gathered",
        "scratch",
        "activ.",
        "logits",
        "between",
        "s/step",
        "fits",
        "zero3 + nvme",
    ):
        assert word in out
    assert "step = max(gather, compute) + update" in out
    assert f"torchrun --standalone --nproc-per-node {device[1]} -m mezo_scale.cli train recipe.yaml" in out
    assert "model.name=facebook/opt-66b" in out


def test_json_is_json_and_nothing_else(run: Run) -> None:
    code, out, _ = run("plan", "--model", "opt-66b", "--gpus", 16, "--gpu-memory", 80, "--json")
    assert code == 0
    tree = json.loads(out)
    assert tree["cluster"]["nodes"] == 2
    keys = {"strategy", "gpus", "master", "fits", "peak_gib", "gathered_gib_per_step", "command"}
    assert all(keys <= set(one) for one in tree["strategies"])
    (choice,) = [one for one in tree["strategies"] if one["recommended"]]
    assert choice["command"].startswith("mezo-scale submit recipe.yaml")
    assert "--nodes 2 --gpus-per-node 8" in choice["command"]


def test_a_dry_run_shows_both_figures(run: Run, tmp_path: Path) -> None:
    config = config_of("opt-125m")
    config.num_hidden_layers = 2  # each takes its time, and is as large as the others
    config.save_pretrained(tmp_path)
    code, out, _ = run("plan", "--model", tmp_path, "--gpus", 2, "--gpu-memory", 8, "--dry-run", "--json")
    assert code == 0
    dry = [one["dry_run"] for one in json.loads(out)["strategies"] if one["dry_run"]]
    assert len(dry) == 4  # single and fsdp2, with and without a master
    assert all(abs(one["error"]) < 0.05 for one in dry)


def test_a_configuration_on_disk_will_do(run: Run, model_folder: Path) -> None:
    code, out, _ = run("plan", "--model", model_folder, "--gpus", 1, "--gpu-memory", 1, "--dtype", "float32")
    assert code == 0
    assert f"model.name={model_folder}" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--model", "opt-66", "--gpus", 8, "--gpu-memory", 80), "there is no model opt-66; did you mean opt-66b?"),
        (("--model", "./nowhere", "--gpus", 8, "--gpu-memory", 80), "there is no nowhere: expected a model's folder"),
        (("--model", "opt-13b", "--gpus", 12, "--gpu-memory", 80), "12 devices do not fill nodes of 8: take 8 or 16"),
        (("--model", "opt-13b", "--gpus", 0, "--gpu-memory", 80), "0 devices"),
        (("--model", "opt-13b", "--gpus", 8, "--gpu-memory", 0), "the memory per device is 0.0 GiB"),
        (("--model", "opt-13b", "--gpus", 8, "--gpu-memory", 80, "--rows", 0), "rows is 0: expected at least 1"),
        (("--model", "opt-13b", "--gpus", 8, "--gpu-memory", 80, "--dtype", "int4"), "the dtype is 'int4'"),
        (
            ("--model", "opt-13b", "--gpus", 8, "--gpu-memory", 80, "--rate", "pcie=1"),
            "found the rate 'pcie=1'; did you mean pcie_gb_s?",
        ),
    ],
)
def test_what_cannot_be_is_said_in_one_line(run: Run, arguments: tuple[object, ...], said: str) -> None:
    code, out, err = run("plan", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {said}")
    assert err.count("\n") == 1


def test_several_numbers_of_devices_make_a_projection_that_says_so(run: Run) -> None:
    arguments = ("plan", "--model", "opt-66b", "--gpus", "1,2,4..64", "--gpu-memory", 80, "--rows", 4)
    code, out, err = run(*arguments)
    assert (code, err) == (0, "")
    assert out.startswith("PROJECTED, not measured: opt-66b: 65.7 B parameters on devices of 80 GiB")
    lines = [line.split() for line in out.splitlines() if " fsdp2 " in line or " hsdp " in line]
    assert {int(line[0]) for line in lines} == {2, 4, 8, 16, 32, 64}  # on one device there is no room for it
    assert any(line[:5] == ["64", "hsdp", "8", "x", "8"] for line in lines)
    assert "step = max(gather, compute) + update" in out
    code, out, _ = run(*arguments, "--json")
    trees = json.loads(out)
    assert [tree["cluster"]["gpus"] for tree in trees] == [1, 2, 4, 8, 16, 32, 64]
    one = next(one for one in trees[-1]["strategies"] if one["recommended"])
    assert one["tokens_per_second"] == pytest.approx(64 * 4 * 400 / one["seconds_per_step"])


def test_a_published_shape_is_planned_without_torch() -> None:
    program = (
        "import sys\nfrom mezo_scale import cli\n"
        "sys.argv = ['mezo-scale', 'plan', '--model', 'opt-66b', '--gpus', '8', '--gpu-memory', '80']\n"
        "try: cli.main()\nexcept SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'transformers', 'numpy', 'pandas'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "recommended: fsdp2" in done.stdout


def test_where_nothing_fits_the_table_is_followed_by_what_would(run: Run) -> None:
    code, out, err = run("plan", "--model", "opt-66b", "--gpus", 1, "--gpu-memory", 4)
    assert code == 2
    assert "fsdp2 + cpu" in out
    assert "recommended" not in out
    assert err.startswith("error: nothing fits: opt-66b takes at least 4.7 GiB per device on 1 (")
    assert "take devices of 5.2 GiB" in err
