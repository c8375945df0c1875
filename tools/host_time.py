"""What the Python of a step takes, for each layer: a Llama of tiny layers, whose arithmetic is nothing beside it.

    OMP_NUM_THREADS=1 python -m tools.host_time [--layers 24] [--rounds 15] [--distribution low_rank]

In processor time, a step and the bare forward on the rows of both branches in turns; medians. For two versions run it
in turns, several times each.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

import mezo_scale as ms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--distribution", default="normal", help="how z is drawn (default: %(default)s)")
    asked = parser.parse_args()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=asked.layers,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(0, 64, (4, 8))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    tall = {name: value.repeat(2, 1) for name, value in batch.items()}
    optimizer = ms.MeZO(model, lr=1e-3, eps=1e-3, distribution=asked.distribution)

    def step() -> float:
        return optimizer.step(batch=batch, objective=ms.objectives.labels)

    def forward() -> Tensor:
        with torch.no_grad():
            return ms.objectives.labels(model, tall)

    seconds: dict[Callable[[], object], list[float]] = {forward: [], step: []}
    for number in range(asked.rounds + 4):
        for run, taken in seconds.items():
            start = time.process_time()
            run()
            if number >= 4:
                taken.append(time.process_time() - start)
    bare_ms, step_ms = (1e3 * statistics.median(taken) for taken in seconds.values())
    print(
        f"step {step_ms:.1f} ms, bare {bare_ms:.1f} ms: {(step_ms - bare_ms) / asked.layers:.2f} ms a layer over bare"
    )


if __name__ == "__main__":
    main()
