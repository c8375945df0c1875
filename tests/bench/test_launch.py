"""The benchmark under a launcher: each of its processes runs the rank that it is."""

import signal
import time
from pathlib import Path

from mezo_scale.bench import sweep
from tests.support.launch import BIN, Launch
from tests.support.material import write_model


def test_under_torchrun_the_cells_of_that_world_size_are_measured(launch: Launch, tmp_path: Path) -> None:
    model, out = write_model("llama", tmp_path / "llama"), tmp_path / "out"
    bench = ["-m", "mezo_scale.cli", "bench", "--model", str(model), "--rows", "4", "--tokens", "8", "--rounds", "1"]
    bench += ["--scaling", "strong", "--world-size", "1", "--world-size", "2", "--project", "opt-125m"]
    done = launch(BIN / "torchrun", "--nproc-per-node", "2", *bench, "--out", str(out))
    assert done.code == 0, done.output
    assert "started by torchrun: 2 processes" in done.output
    assert done.output.count("/llama, fsdp2, 2 ranks, 4 x 8, mezo") == 1
    (row,) = sweep.read(out)
    assert row["cell"]["world_size"] == 2
    assert [one["ranks"] for one in row["step_collectives"]] == [2, 2]


def test_a_sweep_that_is_stopped_ends_its_ranks(launch: Launch, tmp_path: Path) -> None:
    model, out = write_model("llama", tmp_path / "llama"), tmp_path / "out"
    bench = ["bench", "--model", model, "--world-size", "1", "--rounds", "1000000", "--out", out]
    running = launch.start(BIN / "mezo-scale", *bench)
    running.await_output("[1/1]")
    deadline = time.monotonic() + 30
    while not running.ranks() and time.monotonic() < deadline:
        time.sleep(0.1)
    (rank,) = running.ranks()
    running.send(signal.SIGTERM)
    assert running.wait().code == 128 + signal.SIGTERM
    assert not rank.is_running()
    assert sweep.read(out) == []
