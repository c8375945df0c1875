"""Every launch script for one machine, run for a few steps; the others run on a cluster in tests/slurm."""

import pathlib
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable

import pytest

from mezo_scale.recipe import load
from mezo_scale.runs.session import train
from mezo_scale.runs.verify import verify
from mezo_scale.trajectory import Trajectory
from tests.support import workload
from tests.support.launch import ROOT, Launch

FOLDER = ROOT / "launch"
PROGRAMS = sorted([*FOLDER.glob("*.sh"), *FOLDER.glob("*.sbatch"), *(ROOT / "tests/slurm").glob("*.sh")])


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return workload.make(tmp_path_factory.mktemp("work"))


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.fixture(scope="module")
def alone(recipe: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    folder = tmp_path_factory.mktemp("alone")
    train(load(recipe, ["sharding.strategy=single", f"output.dir={folder / 'run'}"]))
    return losses(folder / "run")


def losses(run: pathlib.Path) -> list[float]:
    return [record.loss for record in Trajectory.open(run / "trajectory.mezo").records]


@pytest.mark.parametrize(
    ("script", "arguments", "launcher", "strategy"),
    [
        ("torchrun_multinode.sh", ("localhost",), "torchrun", "hsdp"),
        ("deepspeed.sh", (), "deepspeed", "zero3"),
        ("accelerate.sh", (), "accelerate launch", "fsdp2"),
    ],
)
def test_a_launch_script_trains(
    launch: Launch,
    recipe: pathlib.Path,
    tmp_path: pathlib.Path,
    alone: list[float],
    script: str,
    arguments: tuple[str, ...],
    launcher: str,
    strategy: str,
) -> None:
    run = tmp_path / "run"
    command = (FOLDER / script, *arguments, recipe, f"sharding.strategy={strategy}", f"output.dir={run}")
    finished = launch(*command, env={"PROCESSES": "2", "NNODES": "1", "PORT": free_port()})
    assert finished.code == 0, finished.output
    assert f"started by {launcher}: 2 processes, rendezvous at " in finished.output
    assert losses(run) == pytest.approx(alone, rel=1e-3)
    assert "Warning" not in finished.output
    assert finished.output.count("continue this run: ") == 1
    # The saved checkpoint is what one process gets from the trajectory alone, bit for bit.
    assert len(list(verify(load(run)))) == 3


def test_mezo_scale_starts_ranks_by_itself(
    launch: Launch, recipe: pathlib.Path, tmp_path: pathlib.Path, alone: list[float]
) -> None:
    run = tmp_path / "run"
    finished = launch("mezo-scale", "train", recipe, "--processes", "2", f"output.dir={run}")
    assert finished.code == 0, finished.output
    assert "started by torchrun: 2 processes" in finished.output
    assert losses(run) == pytest.approx(alone, rel=1e-3)


def test_a_signal_to_the_launcher_ends_the_step_and_the_run_goes_on(
    launch: Launch, recipe: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    run = tmp_path / "run"
    command = (FOLDER / "torchrun.sh", recipe, f"output.dir={run}")
    running = launch.start(*command, "train.steps=2000", env={"PROCESSES": "2"})
    running.await_output("started by torchrun: 2 processes, rendezvous at ")
    running.await_output("step 20/2000")
    running.send(signal.SIGUSR1)
    finished = running.wait(60)
    assert finished.code != 0
    assert "stopped by SIGUSR1 after step " in finished.output
    assert (run / "interrupted.json").is_file()
    before = losses(run)
    train(load(run, [f"train.steps={len(before) + 2}", "sharding.strategy=single"]))
    assert losses(run)[: len(before)] == before
    assert len(losses(run)) == len(before) + 2
    assert not (run / "interrupted.json").exists()


def by_hand(rank: int, port: str) -> dict[str, str]:
    variables = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
    return variables | {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "JOIN_TIMEOUT_S": "3"}


def test_a_port_that_is_taken_is_one_line(
    monkeypatch: pytest.MonkeyPatch, run: Callable[..., tuple[int, str, str]], recipe: pathlib.Path
) -> None:
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        for name, value in by_hand(0, str(port)).items():
            monkeypatch.setenv(name, value)
        code, out, err = run("train", recipe)
    assert code == 2
    assert f"the port of the rendezvous at localhost:{port} is taken, by an earlier run perhaps" in err
    assert "Traceback" not in out + err


def test_a_rendezvous_where_nobody_is_ends_in_time(
    monkeypatch: pytest.MonkeyPatch, run: Callable[..., tuple[int, str, str]], recipe: pathlib.Path
) -> None:
    port = free_port()
    for name, value in by_hand(1, port).items():
        monkeypatch.setenv(name, value)
    code, out, err = run("train", recipe)
    assert code == 2
    assert f"(rank 1) can't reach the rendezvous at localhost:{port} within 3 s" in err
    assert "Traceback" not in out + err


def test_a_script_without_a_recipe_says_how_it_is_used() -> None:
    for program in PROGRAMS:
        if program.name.startswith("cluster"):
            continue
        done = subprocess.run(["bash", program], capture_output=True, text=True, check=False)
        assert done.returncode != 0
        assert "usage: " in done.stderr
        assert "RECIPE.yaml" in done.stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing() -> None:
    done = subprocess.run(["shellcheck", *PROGRAMS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_scripts_are_short_and_stop_at_the_first_error() -> None:
    for program in PROGRAMS:
        text = program.read_text()
        assert "set -euo pipefail" in text
        assert text.count("\n") < 50 or program.parent != FOLDER
