"""The processes behind `pool.Ranks`: nurseries, which fork a worker for each rank of a world.

A nursery pays for imports and kernels once and starts no thread, so a fork of it is a ready worker in milliseconds.
There are two, because a hash seed belongs to an interpreter and no rank shall have its neighbour's. They end when the
test process does: a nursery reads end-of-file, kills its workers by their ids and leaves.

Run by the pool as: python -m tests.support.worker CONTROL_FD
"""

import contextlib
import datetime
import faulthandler
import gc
import importlib
import os
import pickle
import signal
import sys
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle

COLLECTIVE_TIMEOUT_S = 60
NEEDED = (
    "matplotlib.pyplot",
    "mezo_scale.runs.publish",
    "mezo_scale.runs.session",
    "mezo_scale.runs.verify",
    "pytest",
    "tests.support.layouts",
    "tests.support.models",
    "torch.utils.tensorboard",
)


@dataclass(frozen=True)
class Fork:
    """Start a rank of a world. The worker's end of its connection follows as a file descriptor."""

    rank: int
    world_size: int
    store: str
    log: str


@dataclass(frozen=True)
class Kill:
    """End a worker if it still runs. The answer is its wait status."""

    pid: int


def nursery(control: Connection) -> None:
    _prepare()
    gc.collect()
    gc.freeze()  # a worker collects after each call, and a session often: to walk all that is imported takes 0.3 s
    children: set[int] = set()
    try:
        while True:
            match control.recv():
                case Fork() as order:
                    fd = recv_handle(control)
                    pid = os.fork()
                    if pid == 0:
                        control.close()
                        with contextlib.suppress(KeyboardInterrupt):
                            _serve(order, Connection(fd))
                        os._exit(0)
                    os.close(fd)
                    children.add(pid)
                    control.send(pid)
                case Kill(pid):
                    os.kill(pid, signal.SIGKILL)
                    control.send(os.waitpid(pid, 0)[1])
                    children.remove(pid)
    except EOFError:
        pass
    finally:
        for pid in children:
            os.kill(pid, signal.SIGKILL)
        os._exit(0)  # taking down an interpreter this full takes seconds


def _prepare() -> None:
    """Import and load what every worker of every world would otherwise import and load in its first call."""
    for name in NEEDED:
        importlib.import_module(name)
    from tools import compile_kernels

    compile_kernels.main()


def _serve(order: Fork, calls: Connection) -> None:
    """Answer (function, kwargs) with (True, result) or (False, traceback) until the pool hangs up."""
    with open(order.log, "wb", buffering=0) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    faulthandler.register(signal.SIGUSR1, file=sys.stderr)
    try:
        _join(order)
        joined = None
    except Exception:
        joined = traceback.format_exc()
    while True:
        try:
            call = calls.recv_bytes()
        except EOFError:
            return
        try:
            if joined is not None:
                raise RuntimeError(f"the world of {order.world_size} did not form:\n{joined}")
            function, kwargs = pickle.loads(call)
            answer = pickle.dumps((True, function(**kwargs)))
        except BaseException:
            answer = pickle.dumps((False, traceback.format_exc()))
        gc.collect()  # sharded models are full of cycles, and hold process groups
        gc.freeze()  # anew: a session's end unfreezes all
        sys.stdout.flush()
        calls.send_bytes(answer)


def _join(order: Fork) -> None:
    import deepspeed
    import torch.distributed as dist

    world = str(order.world_size)
    os.environ.update(RANK=str(order.rank), LOCAL_RANK=str(order.rank), WORLD_SIZE=world, LOCAL_WORLD_SIZE=world)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(order.store, order.world_size),
        rank=order.rank,
        world_size=order.world_size,
        timeout=datetime.timedelta(seconds=COLLECTIVE_TIMEOUT_S),
    )
    # Its shared-memory op would be compiled on the first start, for a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)


if __name__ == "__main__":
    # Under its real name, so that orders unpickle to the classes that are matched here.
    from tests.support import worker

    worker.nursery(Connection(int(sys.argv[1])))
