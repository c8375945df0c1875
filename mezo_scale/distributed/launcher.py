"""Under which launcher this process runs, and torch.distributed's variables, filled in where it leaves them out.

    launcher            is known by              says who is who in
    torchrun            TORCHELASTIC_RUN_ID      RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT
    accelerate launch   ACCELERATE_...           the same: it starts torchrun
    deepspeed           CROSS_SIZE               the same, and LOCAL_SIZE
    srun                SLURM_STEP_ID            SLURM_PROCID, SLURM_LOCALID, SLURM_STEP_NUM_TASKS, SLURM_STEP_NODELIST
    none                                         nothing: one process, which starts one per device if there are several

The variables win over SLURM's, for the other launchers are often started by srun.
"""

import os
import re
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass

from mezo_scale.errors import LaunchError

_NEEDED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
PARENTS = ("torchrun", "accelerate launch", "deepspeed")
"""Launchers that are their ranks' parent process, and live as long as they do."""
_FIRST_PORT, _PORTS = 20_000, 12_000  # below the ports that the kernel hands out
# torchrun's agents forward these and wait for the ranks; without SIGUSR1 among them, SLURM's warning would kill them.
_FORWARDED = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"


@dataclass(frozen=True)
class Launcher:
    """Who started this process, and as which one of how many.

    Attributes:
        name: the launcher's command; "none" for a process alone.
        world_size, rank, local_rank, local_world_size: torch.distributed's.
        rendezvous: its "host:port"; None for a process alone.
        job: SLURM's job id, wherever a job is around, and how often it was requeued.
    """

    name: str
    world_size: int = 1
    rank: int = 0
    local_rank: int = 0
    local_world_size: int = 1
    rendezvous: str | None = None
    job: str | None = None
    restarts: int = 0

    def __str__(self) -> str:
        processes = f"{self.world_size} processes" if self.world_size > 1 else "one process"
        nodes = -(-self.world_size // self.local_world_size)
        where = f" on {nodes} nodes" if nodes > 1 else ""
        how = "started alone" if self.name == "none" else f"started by {self.name}"
        rendezvous = f", rendezvous at {self.rendezvous}" if self.rendezvous else ""
        times = f" (requeued {self.restarts}x)" if self.restarts else ""
        job = f", SLURM job {self.job}{times}" if self.job else ""
        return f"{how}: {processes}{where}{rendezvous}{job}"


def detect(environ: Mapping[str, str]) -> Launcher:
    """Reads the environment of a process; changes nothing.

    Raises:
        LaunchError: variables that say half of what is needed, or that are not numbers.
    """
    job, restarts = environ.get("SLURM_JOB_ID"), _number(environ, "SLURM_RESTART_COUNT", 0)
    if "WORLD_SIZE" in environ or "RANK" in environ:
        missing = [name for name in _NEEDED if name not in environ]
        if missing and _number(environ, "WORLD_SIZE", 2) > 1:
            found = ", ".join(name for name in _NEEDED if name in environ)
            raise LaunchError(
                f"the environment has {found}, but not {', '.join(missing)}: start the processes with torchrun, "
                "deepspeed, accelerate launch or srun, or unset RANK and WORLD_SIZE"
            )
        address, port = environ.get("MASTER_ADDR"), environ.get("MASTER_PORT")
        return Launcher(
            name=_name(environ),
            world_size=_number(environ, "WORLD_SIZE", 1),
            rank=_number(environ, "RANK", 0),
            local_rank=_number(environ, "LOCAL_RANK", 0),
            local_world_size=_number(environ, "LOCAL_WORLD_SIZE", _number(environ, "LOCAL_SIZE", 1)),
            rendezvous=f"{address}:{port}" if address and port else None,
            job=job,
            restarts=restarts,
        )
    if "SLURM_STEP_ID" in environ and _number(environ, "SLURM_STEP_NUM_TASKS", 1) > 1:
        step = _number(environ, "SLURM_STEP_ID", 0)
        own_port = _FIRST_PORT + (_number(environ, "SLURM_JOB_ID", 0) * 31 + step) % _PORTS
        address = environ.get("MASTER_ADDR") or first_host(environ.get("SLURM_STEP_NODELIST", "localhost"))
        return Launcher(
            name="srun",
            world_size=_number(environ, "SLURM_STEP_NUM_TASKS", 1),
            rank=_number(environ, "SLURM_PROCID", 0),
            local_rank=_number(environ, "SLURM_LOCALID", 0),
            local_world_size=len(environ.get("SLURM_GTIDS", "0").split(",")),
            rendezvous=f"{address}:{environ.get('MASTER_PORT', own_port)}",
            job=job,
            restarts=restarts,
        )
    return Launcher("none", job=job, restarts=restarts)


def adopt(environ: MutableMapping[str, str] = os.environ) -> Launcher:
    """`detect`, and torch.distributed's variables set accordingly. Raises LaunchError as `detect` does."""
    launcher = detect(environ)
    if launcher.rendezvous is not None:
        address, _, port = launcher.rendezvous.rpartition(":")
        environ.update(
            RANK=str(launcher.rank),
            WORLD_SIZE=str(launcher.world_size),
            LOCAL_RANK=str(launcher.local_rank),
            LOCAL_WORLD_SIZE=str(launcher.local_world_size),
            MASTER_ADDR=address,
            MASTER_PORT=port,
        )
    return launcher


def relaunch(module: str, arguments: Sequence[str], processes: int) -> None:
    """Replaces this process by torchrun with `processes` of `python -m module arguments...`. Does not return."""
    environ = {"PET_SIGNALS_TO_HANDLE": _FORWARDED, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "120", "OMP_NUM_THREADS": "1"}
    for name, value in environ.items():
        os.environ.setdefault(name, value)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    os.execv(sys.executable, [sys.executable, *torchrun, "-m", module, *arguments])


def first_host(nodelist: str) -> str:
    """The first host of a list in SLURM's notation: "node[03-04,7],gpu1" -> "node03"."""
    outside = re.match(r"(?:[^\[,]|\[[^\]]*\])*", nodelist)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", outside[0] if outside else nodelist)


def _name(environ: Mapping[str, str]) -> str:
    if any(name.startswith("ACCELERATE_") for name in environ):
        return "accelerate launch"
    if "TORCHELASTIC_RUN_ID" in environ:
        return "torchrun"
    return "deepspeed" if "CROSS_SIZE" in environ else "variables set by hand"


def _number(environ: Mapping[str, str], name: str, default: int) -> int:
    text = environ.get(name, str(default))
    if not text.isdecimal():
        raise LaunchError(f"{name} is {text!r}, expected a number: it is set by the launcher, unset it to run alone")
    return int(text)
