"""SLURM's own commands, asked; what they refuse is a LaunchError in one line."""

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence

from mezo_scale.errors import LaunchError

_TIMEOUT_S = 60


def is_here() -> bool:
    """Whether this machine can submit jobs."""
    return shutil.which("sbatch") is not None


def partitions() -> list[str]:
    """Their names. Raises LaunchError if the scheduler does not answer."""
    return [name.rstrip("*") for name in _ask("sinfo", "--noheader", "--format=%P").split()]


def sbatch(arguments: Sequence[str]) -> str:
    """Submits a job script and returns the job's id. Raises LaunchError with what sbatch says against it."""
    # A job submitted from within a job would inherit its shape.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
    kept = {name: os.environ[name] for name in ("SLURM_CONF",) if name in os.environ}
    return _ask("sbatch", "--parsable", *arguments, environ=inherited | kept).strip().split(";")[0]


def state(job: str) -> str:
    """A job's state in words, as far as the queue remembers it."""
    if shutil.which("squeue") is None:
        return "no SLURM here to ask"
    try:
        said = _ask("squeue", "--noheader", f"--jobs={job}", "--format=%T %r").split()
    except LaunchError:  # minutes after a job's end its id is called invalid
        said = []
    if not said:
        return "not in the queue"
    return f"pending ({said[1]})" if said[0] == "PENDING" else said[0].lower()


def _ask(*command: str, environ: Mapping[str, str] | None = None) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environ, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise LaunchError(f"{command[0]} did not answer within {_TIMEOUT_S} s: is the scheduler up?") from None
    if done.returncode:
        said = "; ".join(line.removeprefix(f"{command[0]}: error: ") for line in done.stderr.strip().splitlines())
        raise LaunchError(f"{command[0]} refused: {said or f'exit code {done.returncode}'}")
    return done.stdout
