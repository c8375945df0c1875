"""What a job is made of, without a scheduler: everything is frozen in the run directory."""

import json
import os
import pathlib
import subprocess

import pytest
import yaml

from mezo_scale.errors import LaunchError, MezoError, RecipeError
from mezo_scale.recipe import load
from mezo_scale.slurm.status import status
from mezo_scale.slurm.submit import Resources, submit
from tests.support import workload

SMALL = Resources(nodes=2, gpus_per_node=2)


@pytest.fixture
def recipe(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    monkeypatch.setenv("PATH", "/usr/bin-without-slurm")
    return workload.make(tmp_path)


def directives(script: pathlib.Path) -> dict[str, str]:
    pairs = [line.split("--", 1)[1].split("=") for line in script.read_text().splitlines() if "#SBATCH --" in line]
    return {name: value[0].strip('"') if value else "" for name, *value in pairs}


def test_a_dry_run_writes_a_job_that_bash_can_read(recipe: pathlib.Path, tmp_path: pathlib.Path) -> None:
    resources = Resources(2, 4, partition="a100", time="1:00:00", launcher="deepspeed", options=("--account=lab",))
    said = submit(str(recipe), ["train.batch_size=8"], None, resources, dry_run=True)
    script = tmp_path / "run/job/job.sbatch"
    assert said == [f"job script: {script}", f"not submitted; to do so: sbatch {script} {tmp_path / 'run'}"]
    found = directives(script)
    assert found["nodes"] == "2"
    assert found["gpus-per-node"] == "4"
    assert found["partition"] == "a100"
    assert found["time"] == "1:00:00"
    assert found["account"] == "lab"
    assert found["signal"] == "B:USR1@180"
    assert found["ntasks-per-node"] == "1"
    assert "requeue" in found
    assert "LAUNCHER=deepspeed PROCESSES=4" in script.read_text()
    assert subprocess.run(["/bin/bash", "-n", script], check=False).returncode == 0


def test_the_job_runs_a_copy_of_the_recipe_and_says_which_code(recipe: pathlib.Path, tmp_path: pathlib.Path) -> None:
    submit(str(recipe), ["train.steps=9", "train.batch_size=4"], None, SMALL, dry_run=True)
    recipe.unlink()
    frozen = load(tmp_path / "run")
    assert (frozen.train.steps, frozen.train.batch_size) == (9, 4)
    job = json.loads((tmp_path / "run/job/job.json").read_text())
    assert job["id"] is None
    assert any(package.startswith("torch==") for package in job["packages"])
    assert job["commit"] is None or len(job["commit"]) == 40
    assert sorted(path.name for path in (tmp_path / "run/job").glob("*.sh")) == [
        "accelerate.sh",
        "deepspeed.sh",
        "torchrun_multinode.sh",
    ]


def test_what_sbatch_reads_is_quoted(recipe: pathlib.Path, tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "a $(touch PWNED) `id` 'b' 50% é"
    resources = Resources(2, 2, partition="a b", options=("--comment=two words #", "-A lab", "--exclusive"))
    submit(str(recipe), [f"output.dir={json.dumps(str(folder))}"], None, resources, dry_run=True)
    script = folder / "job" / "job.sbatch"
    lines = script.read_text().splitlines()
    assert '#SBATCH --partition="a b"' in lines
    assert '#SBATCH --comment="two words #"' in lines
    assert '#SBATCH -A "lab"' in lines
    assert "#SBATCH --exclusive" in lines
    assert f'#SBATCH --output="{str(folder).replace("%", "%%")}/job/slurm-%j.out"' in lines
    exports = "\n".join(line for line in lines if line.startswith("export ") and "LAUNCH=" in line)
    said = subprocess.run(
        ["/bin/bash", "-c", exports + '; printf %s "$LAUNCH"'], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert said.stdout == str(folder / "job")
    assert not (tmp_path / "PWNED").exists()


def test_without_gpus_a_node_has_one_process(recipe: pathlib.Path, tmp_path: pathlib.Path) -> None:
    submit(str(recipe), [], None, Resources(nodes=3, gpus_per_node=0), dry_run=True)
    assert "gpus-per-node" not in directives(tmp_path / "run/job/job.sbatch")
    assert "PROCESSES=1" in (tmp_path / "run/job/job.sbatch").read_text()


def test_an_array_has_a_run_per_value(recipe: pathlib.Path, tmp_path: pathlib.Path) -> None:
    said = submit(str(recipe), [], "optimizer.lr=1e-3,5e-4", SMALL, dry_run=True)
    runs = [tmp_path / "run" / name for name in ("lr-1e-3", "lr-5e-4")]
    assert said[1].endswith(" ".join(map(str, runs)))
    assert [yaml.safe_load((run / "recipe.yaml").read_text())["optimizer"]["lr"] for run in runs] == [1e-3, 5e-4]
    assert directives(tmp_path / "run/job/job.sbatch")["array"] == "0-1"
    assert [(line["run"], line["state"], line["step"]) for line in status(tmp_path / "run")] == [
        (str(run), "not started", f"0/{workload.STEPS}") for run in runs
    ]


@pytest.mark.parametrize(
    ("overrides", "array", "resources", "said"),
    [
        (["train.batch_size=3"], None, SMALL, "batch_size is 3, but 2 nodes x 2 are 4 processes"),
        (["strategy=hsdp", "replicate=3"], None, SMALL, "replicate is 3, but WORLD_SIZE is 4, which 3 does not divide"),
        (["model.name=./nowhere"], None, SMALL, "model.name: there is no folder"),
        ([], "seed", SMALL, "--array: found 'seed', expected a field and different values"),
        ([], "seed=1,1", SMALL, "--array: found 'seed=1,1', expected a field and different values"),
        ([], "sead=1,2", SMALL, "unknown key sead"),
        (["nothing"], None, SMALL, "found 'nothing'"),
        (['output.dir="x\\ntouch PWNED #"'], None, SMALL, "output.dir: found .*, expected a name of printable"),
        (["output.dir='x\"y'"], None, SMALL, "output.dir: found .*, expected no quotes"),
        (["output.dir='x\\y'"], None, SMALL, "output.dir: found .*, expected no quotes"),
        ([], None, Resources(2, 2, partition="a\ntouch PWNED"), "--partition: found .*, expected no quotes"),
        ([], None, Resources(2, 2, partition='a" --wrap="id'), "--partition: found .*, expected no quotes"),
        ([], None, Resources(2, 2, time="1:00\x1b"), "--time: found .*, expected no quotes"),
        ([], None, Resources(2, 2, time="1:00\u2028id"), "--time: found .*, expected no quotes"),
        ([], None, Resources(2, 2, options=("--comment=a\ntouch PWNED",)), "--sbatch: found .*, expected an option"),
        ([], None, Resources(2, 2, options=("--comment=a\rb",)), "--sbatch: found .*, expected no quotes"),
        ([], None, Resources(2, 2, options=('--comment="',)), "--sbatch: found .*, expected no quotes"),
        ([], None, Resources(2, 2, options=("touch PWNED",)), "--sbatch: found .*, expected an option"),
        ([], "template=a{text},a[text]", SMALL, "--array: two of its values would share the folder"),
        ([], "output.dir=/x1,/x2", SMALL, "--array: output.dir=/x2 makes the run that another value makes"),
        ([], "lr=1e-3,0.001", SMALL, "--array: lr=0.001 makes the run that another value makes"),
        ([], f"objective={'x' * 250},b", SMALL, "no part of a path longer than 255 bytes"),
    ],
)
def test_what_the_ranks_would_refuse_is_refused_before_anything_is_written(
    recipe: pathlib.Path, overrides: list[str], array: str | None, resources: Resources, said: str
) -> None:
    before = sorted(os.listdir(recipe.parent))
    with pytest.raises(MezoError, match=said):
        submit(str(recipe), overrides, array, resources, dry_run=True)
    assert sorted(os.listdir(recipe.parent)) == before


def test_without_a_scheduler_nothing_is_submitted(recipe: pathlib.Path) -> None:
    with pytest.raises(LaunchError, match="there is no sbatch on this machine"):
        submit(str(recipe), [], None, SMALL, dry_run=False)
    assert not (recipe.parent / "run").exists()


def test_the_status_of_nothing_is_an_error(tmp_path: pathlib.Path) -> None:
    with pytest.raises(RecipeError, match="holds no run: expected a folder with recipe.yaml"):
        status(tmp_path)
