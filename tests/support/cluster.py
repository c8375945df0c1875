"""A real SLURM cluster of virtual nodes, for as long as the tests here run. Needs root and Debian's packages.

Off unless MEZO_TEST_SLURM is set, as `make test-launch` does: it installs packages and makes network namespaces.
"""

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

ROOT = pathlib.Path(__file__).parents[2]
NODES = 2
JOB_TIMEOUT_S = 300


@dataclass(frozen=True)
class Cluster:
    """The cluster as its login node sees it.

    Attributes:
        folder: shared by all nodes.
        private: a folder of the same name on each node, with contents of its own.
    """

    folder: pathlib.Path
    private: pathlib.Path

    @property
    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        return kept | {
            "SLURM_CONF": str(self.private.parent / "slurm.conf"),
            "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "CUDA_VISIBLE_DEVICES": "",
            "DS_ACCELERATOR": "cpu",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "JOIN_TIMEOUT_S": "120",
        }

    def run(self, *command: str | pathlib.Path, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
        """A command on the login node, standard error among its output."""
        done = subprocess.run(
            [str(part) for part in command],
            cwd=ROOT,
            env=self.environment | env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=JOB_TIMEOUT_S,
            check=False,
        )
        assert not check or done.returncode == 0, done.stdout
        return done

    def submit(self, recipe: pathlib.Path, *arguments: str) -> str:
        """`mezo-scale submit`, one GPU per node, which is none here; returns the job's id."""
        said = self.run("mezo-scale", "submit", recipe, "--gpus-per-node", "1", *arguments).stdout
        return said.split("SLURM job ")[1].split(",")[0]

    def sbatch(self, *arguments: str | pathlib.Path, **env: str) -> str:
        return self.run("sbatch", "--parsable", *arguments, **env).stdout.strip()

    def states(self, job: str) -> list[str]:
        """Of a job, or of an array's elements: RUNNING, PENDING, COMPLETED, FAILED..."""
        shown = self.run("scontrol", "show", "job", job).stdout
        return [word.split("=")[1] for word in shown.split() if word.startswith("JobState=")]

    def wait(self, job: str, *wanted: str, timeout_s: float = JOB_TIMEOUT_S) -> list[str]:
        """Waits until all of a job's states are among `wanted`; by default for its end."""
        wanted = wanted or ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        deadline = time.monotonic() + timeout_s
        while not {*(states := self.states(job))} <= {*wanted}:
            if time.monotonic() > deadline:
                pytest.fail(f"job {job} is {states} after {timeout_s} s, not {wanted}")
            time.sleep(0.5)
        return states


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("slurm")
    # munge insists on folders that everyone may enter, which pytest's are not.
    top = pathlib.Path(tempfile.mkdtemp(prefix="mezo-slurm-"))
    top.chmod(0o755)
    state = top / "cluster"
    environment = os.environ | {"CLUSTER_DIR": str(state), "CLUSTER_NODES": str(NODES)}
    here = pathlib.Path(__file__).parent
    try:
        subprocess.run([here / "cluster_up.sh"], env=environment, check=True, stdin=subprocess.DEVNULL)
        yield Cluster(folder, state / "local")
    finally:
        subprocess.run([here / "cluster_down.sh"], env=environment, check=True, stdin=subprocess.DEVNULL)
        shutil.rmtree(top)
