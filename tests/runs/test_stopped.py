"""A run that a signal stops: its step ends, one line says where it is and how it goes on, and nothing is lost."""

import json
import re
import signal
import time
from pathlib import Path

import pytest

from mezo_scale.trajectory import Trajectory
from tests.support.launch import Launch

TORCHRUN = ("torchrun", "--standalone", "--nproc-per-node", "2", "-m", "mezo_scale.cli")
HOW = {"alone": ("mezo-scale",), "torchrun": TORCHRUN}


def lines_of_ours(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("stopped ")]


@pytest.mark.parametrize(
    ("how", "number"),
    [
        ("alone", signal.SIGINT),
        ("alone", signal.SIGTERM),
        ("alone", signal.SIGUSR1),
        ("torchrun", signal.SIGINT),
        ("torchrun", signal.SIGTERM),
    ],
)
def test_a_signal_ends_the_step_and_one_line_says_how_the_run_goes_on(
    launch: Launch, recipe_file: Path, tmp_path: Path, how: str, number: signal.Signals
) -> None:
    running = launch.start(*HOW[how], "train", recipe_file, "train.steps=100000", "train.eval_every=0")
    running.await_output("step 3/100000")
    running.send(number)
    done = running.wait(60)
    (line,) = lines_of_ours(done.output)
    said = re.fullmatch(rf"stopped by {number.name} after step (\d+); to go on from there: (.*) train (.*)", line)
    assert said is not None, line
    assert said[3] == str(tmp_path / "run")
    assert said[2].startswith(HOW[how][0])
    assert len(Trajectory.open(tmp_path / "run" / "trajectory.mezo")) == int(said[1])
    assert json.loads((tmp_path / "run" / "interrupted.json").read_text())["step"] == int(said[1])
    if how == "alone":  # torchrun has an exit code and a traceback of its own
        assert done.code == 128 + number
        assert "Traceback" not in done.output


def test_a_second_signal_ends_a_long_step_at_once_and_loses_no_other(
    launch: Launch, recipe_file: Path, tmp_path: Path
) -> None:
    options = ("train.steps=100000", "num_directions=500", "train.eval_every=0", "train.micro_batch=1")
    running = launch.start("mezo-scale", "train", recipe_file, *options)
    running.await_output("step 1/100000")
    log = tmp_path / "run" / "trajectory.mezo"
    before = log.read_bytes()
    time.sleep(0.5)
    running.send(signal.SIGINT)
    time.sleep(1.5)
    running.send(signal.SIGINT)
    done = running.wait(20)
    assert done.code == 130
    assert [line.split(":")[0] for line in lines_of_ours(done.output)] == ["stopped at once by SIGINT"]
    assert "Traceback" not in done.output
    assert log.read_bytes()[: len(before)] == before
    assert len(Trajectory.open(log)) >= 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_the_first_step_ends_the_run_with_a_line(
    launch: Launch, recipe_file: Path, number: signal.Signals
) -> None:
    running = launch.start("mezo-scale", "train", recipe_file)
    running.await_output("started alone")
    running.send(number)
    done = running.wait(60)
    assert done.code == 128 + number
    assert lines_of_ours(done.output) == [
        f"stopped at once by {number.name}: what is in the log is written, and the same command goes on after it"
    ]
    assert "Traceback" not in done.output
