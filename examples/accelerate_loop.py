"""A loop of your own with accelerate: prepared, and two micro-batches to a step.

python examples/accelerate_loop.py
torchrun --nproc-per-node 2 examples/accelerate_loop.py       (or accelerate launch, as you have configured it)
"""

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig

import mezo_scale as ms

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}

torch.manual_seed(0)
accelerator = Accelerator(gradient_accumulation_steps=2, cpu=not torch.cuda.is_available())
model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=64, **SIZES)).eval()
rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 60, (64, 12))]
opt = ms.MeZO(model, lr=1e-4, eps=1e-3)
scheduler = torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.1, total_iters=8)
model, optimizer, loader, scheduler = accelerator.prepare(model, opt, DataLoader(rows, batch_size=4), scheduler)

rows_seen = 0
for batch in loader:
    with accelerator.accumulate(model):
        # The wrapper passes no batch on, so the rows are measured on the optimizer itself; its step applies them all.
        opt.measure(batch=batch, objective=ms.objectives.labels)
        optimizer.step()
        scheduler.step()
    rows_seen += len(batch["input_ids"])

accelerator.print(
    f"{opt.step_count} steps of {rows_seen // opt.step_count} rows per process, on {accelerator.num_processes}; "
    f"lr {opt.param_groups[0]['lr']:.1e}, last loss {opt.last_record.loss:.3f}"
)
accelerator.end_training()
