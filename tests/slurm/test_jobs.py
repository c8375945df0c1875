"""Real jobs on a real SLURM: two nodes, each launcher, preemption, arrays, and nodes on which something is wrong."""

import json
import pathlib
import time

import pytest

from mezo_scale.trajectory import Trajectory
from tests.support.cluster import ROOT, Cluster

LONG = "train.steps=250"  # long enough to be stopped on the way
STOP_AT = 40


def output(run: pathlib.Path) -> str:
    """What the job of a run directory printed."""
    return "\n".join(path.read_text(errors="replace") for path in sorted(run.glob("job/slurm-*.out")))


def losses(run: pathlib.Path) -> list[float]:
    return [record.loss for record in Trajectory.open(run / "trajectory.mezo").records]


def steps_done(run: pathlib.Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count('"loss"') if path.is_file() else 0


def await_step(run: pathlib.Path, step: int, timeout_s: float = 240) -> None:
    deadline = time.monotonic() + timeout_s
    while steps_done(run) < step:
        assert time.monotonic() < deadline, output(run)
        time.sleep(0.1)


@pytest.fixture(scope="module")
def alone(cluster: Cluster, recipe: pathlib.Path) -> list[float]:
    """The losses of the recipe on one process, without a launcher."""
    run = cluster.folder / "alone"
    said = cluster.run("mezo-scale", "train", recipe, "sharding.strategy=single", f"output.dir={run}").stdout
    assert said.startswith("started alone: one process\n")
    return losses(run)


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, recipe: pathlib.Path) -> pathlib.Path:
    """A long run on two nodes that was left alone."""
    run = cluster.folder / "undisturbed"
    job = cluster.submit(recipe, "--nodes", "2", LONG, f"output.dir={run}")
    assert cluster.wait(job) == ["COMPLETED"], output(run)
    assert f"SLURM job {job}" in output(run)
    return run


def test_two_nodes_train_over_fsdp2(cluster: Cluster, undisturbed: pathlib.Path, alone: list[float]) -> None:
    said = output(undisturbed)
    assert "started by torchrun: 2 processes on 2 nodes, rendezvous at node1:" in said
    assert [line.split()[1] for line in said.splitlines() if "1 x cpu" in line] == ["node1", "node2"]
    assert losses(undisturbed)[: len(alone)] == pytest.approx(alone, rel=1e-3)
    assert "finished" in cluster.run("mezo-scale", "status", undisturbed).stdout


def test_two_nodes_train_over_zero3_with_the_deepspeed_launcher(
    cluster: Cluster, recipe: pathlib.Path, alone: list[float]
) -> None:
    run = cluster.folder / "zero3"
    options = ("--nodes", "2", "--start", "deepspeed")
    job = cluster.submit(recipe, *options, "sharding.strategy=zero3", f"output.dir={run}")
    assert cluster.wait(job) == ["COMPLETED"], output(run)
    assert "started by deepspeed: 2 processes on 2 nodes" in output(run)
    assert losses(run) == pytest.approx(alone, rel=1e-3)


def test_two_nodes_train_with_accelerate_from_the_plain_job_script(
    cluster: Cluster, recipe: pathlib.Path, alone: list[float]
) -> None:
    run, said = cluster.folder / "accelerate", cluster.folder / "accelerate.out"
    options = ("--nodes=2", "--gpus-per-node=1", f"--output={said}")
    job = cluster.sbatch(*options, ROOT / "launch/slurm.sbatch", recipe, LAUNCHER="accelerate", RUN_DIR=str(run))
    assert cluster.wait(job) == ["COMPLETED"], said.read_text()
    assert "started by accelerate launch: 2 processes on 2 nodes" in said.read_text()
    assert losses(run) == pytest.approx(alone, rel=1e-3)


def test_two_nodes_train_with_deepspeed_over_a_hostfile(
    cluster: Cluster, recipe: pathlib.Path, alone: list[float]
) -> None:
    """The head node starts the other over pdsh and ssh."""
    run, hosts = cluster.folder / "hostfile", cluster.folder / "hosts"
    hosts.write_text("node1 slots=1\nnode2 slots=1\n")
    command = (
        "env",
        "-u",
        "SLURM_NODEID",
        "launch/deepspeed.sh",
        recipe,
        "sharding.strategy=zero3",
        f"output.dir={run}",
    )
    said = cluster.run(
        "srun", "--nodelist=node1", *command, HOSTFILE=str(hosts), PORT="29611", MASTER_ADDR="node1"
    ).stdout
    assert "started by deepspeed: 2 processes on 2 nodes" in said
    assert losses(run) == pytest.approx(alone, rel=1e-3)


def test_a_preempted_run_goes_on_by_itself_and_ends_with_the_same_weights(
    cluster: Cluster, recipe: pathlib.Path, undisturbed: pathlib.Path
) -> None:
    run = cluster.folder / "preempted"
    job = cluster.submit(recipe, "--nodes", "2", "--partition", "preempt", LONG, f"output.dir={run}")
    await_step(run, STOP_AT)
    urgent = cluster.sbatch("--nodes=2", "--gpus-per-node=4", "--output=/dev/null", "--wrap=sleep 1")
    assert cluster.wait(urgent) == ["COMPLETED"]
    interrupted = json.loads((run / "interrupted.json").read_text())
    assert STOP_AT <= interrupted["step"] < 250
    assert "stopped by" in cluster.run("mezo-scale", "status", run).stdout
    assert cluster.wait(job) == ["COMPLETED"], output(run)
    assert "(requeued 1x)" in output(run)
    assert f"continuing {run}: {interrupted['step']} steps" in output(run)
    assert not (run / "interrupted.json").exists()
    logs = [Trajectory.open(folder / "trajectory.mezo").records for folder in (run, undisturbed)]
    assert logs[0] == logs[1]
    name = "checkpoint/model.safetensors"
    assert (run / name).read_bytes() == (undisturbed / name).read_bytes()


def test_a_requeued_run_goes_on_with_fewer_nodes(
    cluster: Cluster, recipe: pathlib.Path, undisturbed: pathlib.Path
) -> None:
    run = cluster.folder / "fewer"
    job = cluster.submit(recipe, "--nodes", "2", LONG, f"output.dir={run}")
    await_step(run, STOP_AT)
    cluster.run("scancel", "--batch", "--signal=USR1", job)  # as SLURM does before the time limit
    cluster.wait(job, "PENDING")
    before = (run / "trajectory.mezo").read_bytes()
    cluster.run("scontrol", "update", f"JobId={job}", "NumNodes=1", "NumTasks=1", "NumCPUs=1")
    assert cluster.wait(job) == ["COMPLETED"], output(run)
    assert output(run).count("started by torchrun: one process") == 1
    assert (run / "trajectory.mezo").read_bytes().startswith(before)
    assert losses(run) == pytest.approx(losses(undisturbed), rel=0.05)


def test_a_run_signalled_before_its_first_step_is_not_requeued(cluster: Cluster, recipe: pathlib.Path) -> None:
    """Or a job whose warning comes before it has started up would go round for ever."""
    run = cluster.folder / "early"
    job = cluster.submit(recipe, f"output.dir={run}")
    cluster.wait(job, "RUNNING")
    time.sleep(1)  # bash has set its trap
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    assert cluster.wait(job) == ["FAILED"]
    assert "goes back in the queue" not in output(run)


def test_a_cancelled_run_stays_cancelled(cluster: Cluster, recipe: pathlib.Path) -> None:
    run = cluster.folder / "cancelled"
    job = cluster.submit(recipe, LONG, f"output.dir={run}")
    await_step(run, 5)
    cluster.run("scancel", job)
    assert cluster.wait(job) == ["CANCELLED"]
    time.sleep(10)  # longer than a requeued job is held back
    assert cluster.states(job) == ["CANCELLED"]


def test_an_array_runs_a_seed_each(cluster: Cluster, recipe: pathlib.Path) -> None:
    run = cluster.folder / "sweep"
    job = cluster.submit(recipe, "--array", "optimizer.seed=13,42", f"output.dir={run}")
    assert set(cluster.wait(job)) == {"COMPLETED"}, output(run)
    assert losses(run / "seed-13") != losses(run / "seed-42")
    status = cluster.run("mezo-scale", "status", run).stdout
    assert status.count("finished") == 2
    assert "seed-42" in status


def test_a_model_missing_on_one_node_is_reported_with_its_name(cluster: Cluster, recipe: pathlib.Path) -> None:
    model, run = cluster.private / "model", cluster.folder / "half"
    cluster.run("srun", "--nodelist=node1", "cp", "-r", recipe.parent / "model", model)
    command = ("mezo-scale", "train", recipe, f"output.dir={run}", f"model.name={model}")
    failed = cluster.run("srun", "--nodes=2", "--ntasks=2", *command, check=False)
    assert failed.returncode != 0
    assert f"error: on node2, but not on node1: model.name: there is no folder {model}" in failed.stdout
    assert "Traceback" not in failed.stdout


def test_a_run_directory_that_is_not_shared_is_refused(cluster: Cluster, recipe: pathlib.Path) -> None:
    run = cluster.private / "run"
    command = ("srun", "--nodes=2", "--ntasks=2", "mezo-scale", "train", recipe, f"output.dir={run}")
    failed = cluster.run(*command, check=False)
    assert failed.returncode != 0
    assert f"error: output.dir: {run} is not shared: what node1 writes there, node2 can't see" in failed.stdout
    left = cluster.run("srun", "--nodelist=node1", "ls", "-A", cluster.private).stdout
    assert "run" not in left.split()
    assert ".mezo-scale" not in left


def test_versions_that_differ_between_nodes_are_refused(cluster: Cluster, recipe: pathlib.Path) -> None:
    other = cluster.private / "site"
    metadata = other / "mezo_scale-0.0.1.dist-info/METADATA"
    write = (
        f"mkdir -p {metadata.parent}; printf 'Metadata-Version: 2.1\nName: mezo-scale\nVersion: 0.0.1\n' > {metadata}"
    )
    cluster.run("srun", "--nodelist=node2", "bash", "-c", write)
    command = (
        "srun",
        "--nodes=2",
        "--ntasks=2",
        "mezo-scale",
        "train",
        recipe,
        f"output.dir={cluster.folder / 'mixed'}",
    )
    failed = cluster.run(*command, check=False, PYTHONPATH=f"{other}:{ROOT}")
    assert failed.returncode != 0
    assert "on node1 (rank 0), but 0.0.1 on node2 (rank 1): give all nodes the same environment" in failed.stdout


def test_a_node_that_can_t_reach_the_rendezvous_says_so(cluster: Cluster, recipe: pathlib.Path) -> None:
    """node2 is told another port, on which nothing answers: to it the head is as good as behind a firewall."""
    script = 'PORT=$((29700 + SLURM_NODEID)) exec launch/torchrun_multinode.sh node1 "$@"'
    command = ("srun", "--nodes=2", "--ntasks=2", "--kill-on-bad-exit=1", "bash", "-c", script, "bash", recipe)
    began = time.monotonic()
    failed = cluster.run(*command, check=False, NNODES="2", PROCESSES="1", JOIN_TIMEOUT_S="10")
    assert failed.returncode != 0
    assert "node2: can't reach the rendezvous at node1:29701" in failed.stdout
    assert time.monotonic() - began < 60


def test_a_port_that_an_earlier_run_still_holds_is_named(cluster: Cluster, recipe: pathlib.Path) -> None:
    script = (
        "python -m http.server --bind 0.0.0.0 29800 >/dev/null 2>&1 & sleep 2; "
        'PORT=29800 launch/torchrun_multinode.sh node1 "$@"; code=$?; kill $!; exit $code'
    )
    failed = cluster.run("srun", "--nodelist=node1", "bash", "-c", script, "bash", recipe, check=False, NNODES="1")
    assert failed.returncode != 0
    assert "node1: port 29800 is taken, by an earlier run perhaps" in failed.stdout


def test_srun_starts_the_ranks_itself_even_where_a_host_name_means_loopback(
    cluster: Cluster, recipe: pathlib.Path, alone: list[float]
) -> None:
    """Debian maps a machine's own name to 127.0.1.1: gloo would offer that address to the other nodes."""
    run = cluster.folder / "loopback"
    hosts = cluster.private / "hosts"
    script = (
        f"sed 's/^.* '$(hostname)'$/127.0.1.1 '$(hostname)'/' /etc/hosts > {hosts}; mount --bind {hosts} /etc/hosts; "
        'exec mezo-scale train "$@"'
    )
    command = ("srun", "--nodes=2", "--ntasks=2", "unshare", "--mount", "bash", "-c", script, "bash")
    said = cluster.run(*command, recipe, f"output.dir={run}").stdout
    assert "started by srun: 2 processes on 2 nodes, rendezvous at node1:" in said
    assert losses(run) == pytest.approx(alone, rel=1e-3)


def test_a_partition_that_does_not_exist_is_named(cluster: Cluster, recipe: pathlib.Path) -> None:
    run = cluster.folder / "nowhere"
    failed = cluster.run("mezo-scale", "submit", recipe, "--partition", "gpus", f"output.dir={run}", check=False)
    assert failed.returncode == 2
    assert failed.stdout == "error: --partition: there is no partition gpus; the cluster has main, preempt\n"
    assert not run.exists()


def test_what_sbatch_refuses_is_one_line(cluster: Cluster, recipe: pathlib.Path) -> None:
    options = ("--nodes", "3", "--gpus-per-node", "1", "train.batch_size=8")
    run = cluster.folder / "refused"
    failed = cluster.run("mezo-scale", "submit", recipe, *options, f"output.dir={run}", check=False)
    assert failed.returncode == 2
    assert failed.stdout.startswith("error: sbatch refused: ")
    assert failed.stdout.count("\n") == 1
