"""What a step costs over two bare forwards, with dense and with low-rank directions.

    python -m tools.step_bench --model .demo/model [--rounds 7] [--tokens 48 128] [--rank 1] [--out tools/results]

On a CPU, in bfloat16, 16 rows, in processor time of all threads. All contenders run once a round, as in
`tools.kernel_bench`, and a ratio is taken within each round; the write of a step is timed apart as well. The load of
the machine before and after is printed: other work on it takes from caches and memory, so then trust the fastest
rounds, and those little. Scratch is what the view keeps for perturbed weights.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import time
from collections.abc import Iterator
from functools import partial

import torch
from torch import nn

import mezo_scale as ms
from mezo_scale.distributed.memory import keep_freed_memory
from mezo_scale.noise import Noise
from tools.kernel_bench import Contender, Figure, figure, interleave, last_token_loss, report, save

ROWS = 16


def steps(model: nn.Module, name: str, tokens: int, noises: list[Noise], rounds: int) -> Iterator[Figure]:
    """Each noise's step, and its write alone, against two bare forwards on the same rows."""
    vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    batch = {
        "input_ids": torch.randint(vocabulary, (ROWS, tokens)),
        "label": torch.randint(vocabulary, (ROWS,)),
    }

    def forwards() -> None:
        with torch.no_grad():
            for _ in range(2):
                last_token_loss(model, batch).sum().item()

    contenders: dict[str, Contender] = {"two forwards": forwards}
    optimizers = {kind.name: ms.MeZO(model, lr=1e-7, distribution=kind) for kind in noises}
    for kind, optimizer in optimizers.items():
        contenders[kind] = partial(optimizer.step, batch=batch, objective=last_token_loss)
        optimizer.step(batch=batch, objective=last_token_loss)
        assert optimizer.paired, "the tall batch is what is measured"
        contenders[f"{kind}, write"] = partial(optimizer._writer.apply_, [optimizer.last_record])
    seconds = interleave(contenders, rounds, torch.device("cpu"), time.process_time)
    for what in list(contenders)[1:]:
        yield figure(seconds, what, "two forwards", "bfloat16", f"{name}, {ROWS} x {tokens} tokens", measure="time")
    for kind, optimizer in optimizers.items():
        buffers = optimizer._evaluator.view.weights.scratch._buffers.values()
        print(f"{kind}: {sum(buffer.nbytes for buffer in buffers) / 2**20:.1f} MiB of scratch")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a real causal language model")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, nargs="+", default=[48, 128])
    parser.add_argument("--rank", type=int, default=1)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    options = parser.parse_args()
    from transformers import AutoModelForCausalLM

    keep_freed_memory()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16).eval()
    noises, table = [Noise(), Noise("low_rank", options.rank)], []
    print(f"load {os.getloadavg()} on {os.cpu_count()} cores")
    for tokens in options.tokens:
        report(steps(model, pathlib.Path(options.model).name, tokens, noises, options.rounds), table)
        print(f"load {os.getloadavg()} on {os.cpu_count()} cores")
    print(f"written to {save(table, options.out, torch.device('cpu'))}")


if __name__ == "__main__":
    main()
