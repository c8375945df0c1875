"""A sweep under way: its rows, what becomes of a rank that fails, and a whole sweep of a tiny model."""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from mezo_scale.bench import running
from mezo_scale.bench.figures import frame
from mezo_scale.bench.sweep import Cell, Places
from mezo_scale.errors import LaunchError, RecipeError
from tests.support.launch import BIN, Launch
from tests.support.material import write_model

HERE = Places()
Run = Callable[..., tuple[int, str, str]]

# srun, for as many tasks on this machine.
SRUN = f"""#!{sys.executable}
import os, subprocess, sys
asked = dict(word[2:].partition("=")[::2] for word in sys.argv[1:] if word.startswith("--"))
command = sys.argv[sys.argv.index(sys.executable):]
tasks = int(asked["ntasks"])
known = dict(SLURM_STEP_ID="0", SLURM_STEP_NUM_TASKS=str(tasks), SLURM_STEP_NODELIST="localhost")
known |= dict(SLURM_GTIDS=",".join(map(str, range(tasks))))
ranks = [
    subprocess.Popen(command, env=os.environ | known | dict(SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank)))
    for rank in range(tasks)
]
sys.exit(max(rank.wait() for rank in ranks))
"""

# A rank in place of the real one: figures at once, in which a cell's rows can be told.
FIGURES = """
import json, sys
cell, rounds = json.loads(sys.argv[1]), json.loads(sys.argv[2])
print("mezo-bench: " + json.dumps({"rank": 0, "figures": {"step_s": [cell["rows"]] * rounds,
    "forwards_s": [1.0] * rounds, "memory_bytes": 4}}))
"""
HANGS = "import time\nprint('mezo-bench: {\"ra', flush=True)\ntime.sleep(60)"
RAISES = "import sys\nsys.exit(3)"
KILLED = "import os, signal, time\nif os.environ['RANK'] == '1': os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(60)"


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """What a cell's ranks run from now on."""
    return lambda text: monkeypatch.setattr(running, "PROGRAM", ("-c", text))


def cells(*rows: int, world_size: int = 1) -> list[Cell]:
    return [Cell("random:opt-125m", "fsdp2", world_size, each, 16) for each in rows]


def test_a_sweep_goes_on_with_the_cells_that_have_no_row(tmp_path: Path, program: Callable[[str], None]) -> None:
    program(FIGURES)
    running.run(cells(1, 2), tmp_path, HERE, rounds=2)
    before = (tmp_path / running.ROWS).read_text()
    with (tmp_path / running.ROWS).open("a") as file:
        file.write('{"cell": {"model"')  # killed while writing
    said: list[str] = []
    rows = running.run(cells(1, 2, 3), tmp_path, HERE, rounds=2, say=said.append)
    assert [one["cell"]["rows"] for one in rows] == [1, 2, 3]
    assert [one["step_s"] for one in rows] == [[1, 1], [2, 2], [3, 3]]
    assert (tmp_path / running.ROWS).read_text().startswith(before)
    assert [line for line in said if line.startswith("[")] == ["[1/1] random:opt-125m, fsdp2, 1 rank, 3 x 16, mezo"]
    assert not list((tmp_path / "logs").iterdir())


def test_a_cell_that_fails_is_a_row_with_its_reason_and_is_measured_again_on_request(
    tmp_path: Path, program: Callable[[str], None]
) -> None:
    program(RAISES)
    (failed,) = running.run(cells(2), tmp_path, HERE)
    (log,) = (tmp_path / "logs").iterdir()
    assert failed["reason"] == f"ended with exit code 3, see {log}"
    program(FIGURES)
    rows = running.run(cells(2, 4), tmp_path, HERE, rounds=1)
    assert ["reason" in one for one in rows] == [True, False]
    rows = running.run(cells(2, 4), tmp_path, HERE, rounds=1, retry_failed=True)
    assert ["reason" in one for one in rows] == [False, False]


def test_a_rank_that_is_killed_is_the_reason_of_its_cell(tmp_path: Path, program: Callable[[str], None]) -> None:
    program(KILLED)
    (failed,) = running.run(cells(2, world_size=2), tmp_path, HERE)
    assert failed["reason"] == "rank 1: killed by SIGKILL (out of memory, if the kernel did it)"


def reason_of(*said: str, code: int | None = 1, world_size: int = 2) -> str:
    (cell,) = cells(2, world_size=world_size)
    return str(running._answer("\n".join(said), cell, code, "took longer than 9 s", Path("x.log"))["reason"])


def test_the_reason_of_a_cell_is_what_happened_first_and_not_what_followed() -> None:
    followed = 'mezo-bench: {"rank": 0, "reason": "RuntimeError: [gloo] Connection closed by peer"}'
    own = 'mezo-bench: {"rank": 1, "reason": "out of memory: 9"}'
    killed = ("  rank      : 1 (local_rank: 1)", "  exitcode  : -9 (pid: 12)")
    ended = ("  rank      : 0 (local_rank: 0)", "  exitcode  : -15 (pid: 11)")
    assert reason_of(followed, own) == "rank 1: out of memory: 9"
    assert reason_of(followed, *ended, *killed) == "rank 1: killed by SIGKILL (out of memory, if the kernel did it)"
    assert reason_of(followed, *ended) == "rank 0: RuntimeError: [gloo] Connection closed by peer"
    assert reason_of(own, code=None) == "rank 1: out of memory: 9"
    assert reason_of(code=None) == "took longer than 9 s"
    assert reason_of("srun: error: n1: task 1: Out Of Memory", code=137) == (
        "ended with exit code 137 (n1: task 1: Out Of Memory), see x.log"
    )
    assert reason_of(code=-9, world_size=1) == "killed by SIGKILL (out of memory, if the kernel did it)"


def test_figures_of_a_launch_that_failed_all_the_same_are_none() -> None:
    assert reason_of('mezo-bench: {"rank": 0, "figures": {"memory_bytes": 4}}') == "ended with exit code 1, see x.log"


def test_a_cell_that_hangs_is_ended_and_says_so(tmp_path: Path, program: Callable[[str], None]) -> None:
    program(HANGS)
    (failed,) = running.run(cells(2), tmp_path, HERE, timeout_s=0.5)
    assert failed["reason"] == "took longer than 0.5 s"


def test_no_cell_is_started_when_the_budget_is_spent(tmp_path: Path, program: Callable[[str], None]) -> None:
    program(FIGURES)
    said: list[str] = []
    assert running.run(cells(1, 2), tmp_path, HERE, budget_s=1, say=said.append) == []
    assert said == ["no time left for 2 cells; the same command goes on with them"]


@pytest.mark.parametrize(
    "text",
    [
        "hello\n",
        '{"cell": {"model": "m", "strategy": "fsdp2", "world_size": 1, "rows": 1, "tokens": 2}, "peak_bytes": 1}\n',
        "3\n",
    ],
)
def test_rows_that_are_none_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / running.ROWS).write_text(text)
    with pytest.raises(RecipeError, match=r"rows.jsonl, line 1 is no row of a sweep: take the line out"):
        running.read(tmp_path)


def test_in_a_slurm_allocation_srun_starts_the_ranks_of_a_cell() -> None:
    cluster = Places(gpus=8, nodes=4, slurm=True)
    (cell,) = cells(16, world_size=16)
    command = running.command(cell, 3, cluster)
    assert command[:4] == ["srun", "--nodes=2", "--ntasks=16", "--ntasks-per-node=8"]
    assert command[-4:] == ["-m", "mezo_scale.bench.measure", cell.key, "3"]
    (small,) = cells(16, world_size=4)
    assert running.command(small, 3, cluster)[:4] == ["srun", "--nodes=1", "--ntasks=4", "--ntasks-per-node=4"]
    assert "torch.distributed.run" in running.command(small, 3, HERE)


def test_more_ranks_than_gpus_and_a_launcher_around_a_sweep_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(LaunchError, match="world_sizes has 16, but there are 8 GPUs"):
        running.run(cells(16, world_size=16), tmp_path / "out", Places(gpus=8))
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "x", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(LaunchError, match="started 2 processes, but a sweep starts the ranks of each cell itself"):
        running.run(cells(1), tmp_path / "out", HERE)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "in it"):
        with pytest.raises(
            RecipeError, match=rf"^--out: {out} can't be made \(Not a directory\): give another folder$"
        ):
            running.run(cells(1), out, HERE)


def sweep_file(folder: Path, **tree: object) -> Path:
    model = write_model("llama", folder / "llama")
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({"models": str(model), "rows": 4, "tokens": 16, "rounds": 2} | tree))
    return path


def test_a_sweep_of_a_tiny_model_on_two_ranks_ends_in_a_report(launch: Launch, tmp_path: Path) -> None:
    path, out = sweep_file(tmp_path, world_sizes=2), tmp_path / "out"
    bench = (BIN / "python", "-m", "mezo_scale", "bench", path, "--out", out)
    done = launch(*bench)
    assert done.code == 0, done.output
    assert done.output.count("/llama, fsdp2, 2 ranks, 4 x 16, mezo") == 1
    assert f"report: {out / 'report.md'}" in done.output
    (row,) = running.read(out)
    (ours,) = frame([row]).itertuples()
    assert (ours.gathered, ours.reduced) == (ours.planned_gathered, ours.planned_reduced)
    assert (ours.gathers, ours.rounds, row["layers"]) == (1.0, 2, 2)
    assert ours.step_s > 0
    assert [one["ranks"] for one in row["step_collectives"]] == [2, 2]
    assert not list((out / "logs").iterdir())


def test_a_cell_for_which_there_is_no_memory_is_a_row(run: Run, tmp_path: Path) -> None:
    path, out = sweep_file(tmp_path, world_sizes=1, tokens=10**13), tmp_path / "out"
    assert run("bench", path, "--out", out)[0] == 0
    assert running.read(out)[0]["reason"].startswith("out of memory: can't allocate memory")
    assert "out of memory" in (out / "report.md").read_text()


def test_in_an_allocation_the_ranks_that_srun_starts_answer(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out, tools = sweep_file(tmp_path, world_sizes=2, rounds=1), tmp_path / "out", tmp_path / "tools"
    tools.mkdir()
    (tools / "srun").write_text(SRUN)
    (tools / "srun").chmod(0o755)
    for name, value in {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NUM_NODES": "1",
    }.items():
        monkeypatch.setenv(name, value)
    assert run("bench", path, "--out", out)[0] == 0
    (row,) = running.read(out)
    assert [one["ranks"] for one in row["step_collectives"]] == [2, 2], row


def test_mezo_and_its_rivals_are_measured_side_by_side(run: Run, tmp_path: Path) -> None:
    grids = [{"strategies": "single", "methods": ["mezo", "published"]}, {"methods": "adamw"}]
    path, out = sweep_file(tmp_path, world_sizes=1, rounds=1, memory_cap_gib=74.5, grids=grids), tmp_path / "out"
    assert run("bench", path, "--out", out)[0] == 0
    rows = running.read(out)
    assert [one["cell"]["method"] for one in rows] == ["mezo", "published", "adamw"]
    assert all("reason" not in one for one in rows)
    assert (out / "report.md").read_text().count("/llama | ") >= 3


def test_a_sweep_that_is_stopped_ends_its_ranks(launch: Launch, tmp_path: Path) -> None:
    path, out = sweep_file(tmp_path, world_sizes=2, rounds=1_000_000), tmp_path / "out"
    running_sweep = launch.start(BIN / "python", "-m", "mezo_scale", "bench", path, "--out", out)
    running_sweep.await_output("[1/1]")
    deadline = time.monotonic() + 60
    while len(running_sweep.ranks()) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    ranks = running_sweep.ranks()
    assert len(ranks) == 2
    running_sweep.send(signal.SIGTERM)
    assert running_sweep.wait().code == 128 + signal.SIGTERM
    assert not any(rank.is_running() for rank in ranks)
    assert running.read(out) == []
