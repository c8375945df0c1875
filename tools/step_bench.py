"""What a step costs over two bare forwards, with dense and with low-rank directions, and beside the published step.

    python -m tools.step_bench --model .demo/model [--rounds 7] [--tokens 48 128] [--rank 1] [--groups 16]
                               [--clock processor] [--out tools/results]

On a CPU, in bfloat16, 16 rows. All contenders run once a round, as in `tools.kernel_bench`, and a ratio is taken within
each round; the write of a step is timed apart as well. Processor time is that of all threads. It leaves out that a
thread waits for another, as in the published step, whose normals come from one thread: `--clock wall` on a machine
that does nothing else. The load of the machine before and after is printed: other work on it takes from caches and
memory, so then trust the fastest rounds, and those little. Scratch is what the view keeps for perturbed weights.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn

import mezo_scale as ms
from mezo_scale.bench.rivals import Published
from mezo_scale.distributed.memory import keep_freed_memory
from mezo_scale.noise import Noise
from tools.kernel_bench import Contender, Figure, figure, interleave, last_token_loss, report, save

ROWS = 16
CLOCKS = {"processor": time.process_time, "wall": time.perf_counter}


def steps(
    model: nn.Module, name: str, tokens: int, rank: int, groups: int, rounds: int, clock: Callable[[], float]
) -> Iterator[Figure]:
    """Steps, and their writes alone, against two bare forwards on the same rows; the low-rank step against the
    published one, and with many groups against one."""
    vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    batch = {
        "input_ids": torch.randint(vocabulary, (ROWS, tokens)),
        "label": torch.randint(vocabulary, (ROWS,)),
    }

    def forwards() -> None:
        with torch.no_grad():
            for _ in range(2):
                last_token_loss(model, batch).sum().item()

    low_rank = Noise("low_rank", rank)
    many = f"{low_rank.name}, {groups} groups"
    optimizers = {
        Noise().name: ms.MeZO(model, lr=1e-7),
        low_rank.name: ms.MeZO(model, lr=1e-7, distribution=low_rank),
        many: ms.MeZO(model, lr=1e-7, distribution=low_rank, estimator=ms.estimators.Grouped(ROWS // groups)),
    }
    rival = Published(model, lr=1e-7)
    contenders: dict[str, Contender] = {"two forwards": forwards}
    for what, optimizer in optimizers.items():
        contenders[what] = partial(optimizer.step, batch=batch, objective=last_token_loss)
        optimizer.step(batch=batch, objective=last_token_loss)
        assert optimizer.paired, "the tall batch is what is measured"
        assert optimizer.last_record is not None
        contenders[f"{what}, write"] = partial(optimizer._writer.apply_, [optimizer.last_record])
    # In place and in bfloat16 it moves the weights a little. No contender's time depends on their values.
    contenders["published"] = partial(rival.step, batch, last_token_loss)
    seconds = interleave(contenders, rounds, torch.device("cpu"), clock)
    size = f"{name}, {ROWS} x {tokens} tokens"
    for what in list(contenders)[1:]:
        yield figure(seconds, what, "two forwards", "bfloat16", size, measure="time")
    yield figure(seconds, many, low_rank.name, "bfloat16", size, directions=groups, measure="time")
    yield figure(seconds, low_rank.name, "published", "bfloat16", size)
    for what, optimizer in optimizers.items():
        buffers = optimizer._evaluator.view.weights.scratch._buffers.values()
        print(f"{what}: {sum(buffer.nbytes for buffer in buffers) / 2**20:.1f} MiB of scratch")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a real causal language model")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, nargs="+", default=[48, 128])
    parser.add_argument("--rank", type=int, default=1)
    parser.add_argument("--groups", type=int, default=ROWS, help="of the low-rank step that has many")
    parser.add_argument("--clock", choices=CLOCKS, default="processor")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    options = parser.parse_args()
    from transformers import AutoModelForCausalLM

    keep_freed_memory()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16).eval()
    table: list[Figure] = []
    print(f"load {os.getloadavg()} on {os.cpu_count()} cores")
    for tokens in options.tokens:
        name, clock = pathlib.Path(options.model).name, CLOCKS[options.clock]
        report(steps(model, name, tokens, options.rank, options.groups, options.rounds, clock), table)
        print(f"load {os.getloadavg()} on {os.cpu_count()} cores")
    print(f"written to {save(table, options.out, torch.device('cpu'))}")


if __name__ == "__main__":
    main()
