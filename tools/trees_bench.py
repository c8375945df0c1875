"""Evaluations with prompts run once for all answers, against each answer with the prompt before it.

    python tools/trees_bench.py MODEL TASK DATA MAX_LENGTH EVAL_BATCH [ROWS] >> tools/results/trees.csv

Both ways take turns, on the same rows of the test split, in one thread; what is written is processor time. A row:
model, task, rows, max_length, eval_batch, round, seconds plain, seconds shared, the largest difference of a score.
"""

import sys
import time

import torch

from mezo_scale import tasks
from mezo_scale.distributed.layout import Strategy
from mezo_scale.models import Loaded, checkpoints
from mezo_scale.recipe import TaskSection
from mezo_scale.runs.evaluate import evaluate
from mezo_scale.runs.sharing import share_prompts

ROUNDS = 5


def main(name: str, task: str, data: str, max_length: str, eval_batch: str, most: str = "1000") -> None:
    torch.set_num_threads(1)
    section = TaskSection(name=task, data=data, max_length=int(max_length))
    tokenizer = checkpoints.load_processor(name)
    loaded = Loaded(checkpoints.read(name, torch.float32).eval(), tokenizer, torch.device("cpu"), Strategy("single"))
    ways = {"plain": tasks.kind_of(section, tokenizer), "shared": tasks.kind_of(section, tokenizer)}
    ways["plain"].sharing.refused = True  # type: ignore[union-attr]  # of a kind that chooses
    found = tasks.examples(section)
    rows = [ways["plain"].encode(example) for example in found.get("test", next(iter(found.values())))][: int(most)]
    evaluate(loaded, ways["shared"], rows, int(eval_batch))  # compares, once
    share_prompts(loaded, ways["shared"], rows)
    with torch.no_grad():
        each = [[way.log_probs(loaded.model, way.collate([row])) for way in ways.values()] for row in rows]
    difference = max(float((plain - shared).abs().max()) for plain, shared in each)
    for number in range(ROUNDS):
        seconds = {}
        for way in sorted(ways, reverse=number % 2 == 1):
            start = time.process_time()
            evaluate(loaded, ways[way], rows, int(eval_batch))
            seconds[way] = time.process_time() - start
        print(
            f"{name},{task},{len(rows)},{max_length},{eval_batch},{number},{seconds['plain']:.2f},"
            f"{seconds['shared']:.2f},{difference:.1e}",
            flush=True,
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
