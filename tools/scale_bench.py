"""A full sweep of one's own cluster: `mezo-scale bench` with every option that is not given set to "all of them".

    python tools/scale_bench.py                                          this machine's GPUs: 1, 2, 4, ...
    torchrun --nproc-per-node 8 tools/scale_bench.py                     the cells of 8 ranks
    srun --nodes 4 --ntasks-per-node 8 python tools/scale_bench.py       the cells of 32 ranks
    deepspeed --num_gpus 8 tools/scale_bench.py                          the cells of 8 ranks

All of them into one folder (--out), as often as needed: what has its row is not measured again, and the report is made
anew from all rows. The models have random weights, so nothing is downloaded. `mezo-scale bench --help` says what each
option means; any of them replaces the one here.
"""

import os
import sys

import torch

from mezo_scale.cli import main
from mezo_scale.distributed.launcher import detect

MODELS = ["random:opt-1.3b", "random:opt-13b", "random:opt-30b", "random:opt-66b"]


def defaults(world_size: int, devices: int) -> dict[str, list[str]]:
    """Options and their values, for the ranks of a launch or, alone, for a machine with so many GPUs."""
    alone = [str(2**power) for power in range(max(1, devices).bit_length())]
    return {
        "--model": MODELS,
        "--strategy": ["single", "fsdp2", "hsdp", "zero3"],
        "--world-size": [str(world_size)] if world_size > 1 else alone,
        "--method": ["mezo", "published", "naive", "adamw"],
        "--directions": ["1", "4"],
        "--rows": ["16"] if world_size <= 16 else [str(world_size)],
        "--tokens": ["400"],
        "--dtype": ["bfloat16"],
        "--out": ["runs/bench"],
    }


if __name__ == "__main__":
    given = {argument.partition("=")[0] for argument in sys.argv[1:]}
    for option, values in defaults(detect(os.environ).world_size, torch.cuda.device_count()).items():
        if option not in given:
            sys.argv += [word for value in values for word in (option, value)]
    sys.argv.insert(1, "bench")
    main()
