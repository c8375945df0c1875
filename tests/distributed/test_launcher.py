"""Who started a process, read from its environment."""

import pytest

from mezo_scale.distributed.launcher import adopt, detect, first_host
from mezo_scale.errors import LaunchError

TORCH = {
    "RANK": "5",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "8",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "head",
    "MASTER_PORT": "29500",
}
STEP = {
    "SLURM_JOB_ID": "712",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "0",
    "SLURM_GTIDS": "4,5",
    "SLURM_STEP_NODELIST": "gpu[03,07-08]",
}


@pytest.mark.parametrize(
    ("mark", "name"),
    [
        ({"TORCHELASTIC_RUN_ID": "none"}, "torchrun"),
        ({"TORCHELASTIC_RUN_ID": "none", "ACCELERATE_MIXED_PRECISION": "no"}, "accelerate launch"),
        ({"CROSS_SIZE": "2", "CROSS_RANK": "1"}, "deepspeed"),
        ({}, "variables set by hand"),
    ],
)
def test_launchers_that_set_torch_s_variables_are_told_apart(mark: dict[str, str], name: str) -> None:
    found = detect(TORCH | mark)
    assert (found.name, found.rank, found.world_size) == (name, 5, 8)
    assert str(found) == f"started by {name}: 8 processes on 2 nodes, rendezvous at head:29500"


def test_deepspeed_s_count_of_local_processes_becomes_torch_s() -> None:
    environ = {name: value for name, value in TORCH.items() if name != "LOCAL_WORLD_SIZE"}
    environ |= {"CROSS_SIZE": "4", "LOCAL_SIZE": "2"}
    assert adopt(environ).local_world_size == 2
    assert environ["LOCAL_WORLD_SIZE"] == "2"


def test_a_task_of_srun_gets_torch_s_variables() -> None:
    environ = dict(STEP)
    assert adopt(environ).name == "srun"
    port = environ.pop("MASTER_PORT")
    assert 20_000 <= int(port) < 32_768
    assert environ == STEP | {
        "RANK": "4",
        "WORLD_SIZE": "6",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "gpu03",
    }


def test_all_tasks_of_a_step_agree_on_the_rendezvous_and_other_steps_have_another() -> None:
    places = {detect(STEP | {"SLURM_PROCID": str(rank)}).rendezvous for rank in range(6)}
    assert len(places) == 1
    assert detect(STEP | {"SLURM_STEP_ID": "3"}).rendezvous not in places


def test_a_launcher_inside_a_task_of_srun_wins() -> None:
    found = detect(STEP | TORCH | {"TORCHELASTIC_RUN_ID": "712", "SLURM_RESTART_COUNT": "2"})
    assert str(found) == (
        "started by torchrun: 8 processes on 2 nodes, rendezvous at head:29500, SLURM job 712 (requeued 2x)"
    )


@pytest.mark.parametrize("environ", [{}, {"SLURM_JOB_ID": "712", "SLURM_PROCID": "0", "SLURM_NTASKS": "6"}])
def test_a_shell_and_a_batch_script_start_one_process(environ: dict[str, str]) -> None:
    found = adopt(environ)
    assert (found.name, found.world_size, found.rendezvous) == ("none", 1, None)
    assert "RANK" not in environ
    assert str(found).startswith("started alone: one process")


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "has RANK, WORLD_SIZE, but not LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        (TORCH | {"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', expected a number"),
    ],
)
def test_half_an_environment_is_refused(environ: dict[str, str], said: str) -> None:
    with pytest.raises(LaunchError, match=said):
        detect(environ)


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("node1", "node1"),
        ("node[03-04,7],gpu1", "node03"),
        ("a,b[1-2]", "a"),
        ("rack[2-3]node[01-04]-ib", "rack2node01-ib"),
    ],
)
def test_the_first_host_of_a_list(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host
