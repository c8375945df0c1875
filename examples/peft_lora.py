"""Adapters of PEFT on a frozen base: python examples/peft_lora.py [MODEL]"""

import sys
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

import mezo_scale as ms

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}

torch.manual_seed(0)
if len(sys.argv) > 1:
    base = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
else:
    base = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=64, **SIZES))
model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear")).eval()
before = {name: param.detach().clone() for name, param in model.named_parameters()}

ids = torch.randint(3, 60, (16, 12))
opt = ms.MeZO(model, lr=1e-3, eps=1e-2)  # what requires a gradient is tuned: the adapters
for _ in range(20):
    loss = opt.step(batch={"input_ids": ids, "labels": ids}, objective=ms.objectives.labels)

moved = [name for name, param in model.named_parameters() if not torch.equal(param, before[name])]
with tempfile.TemporaryDirectory() as place:
    model.save_pretrained(place)
    size = (Path(place) / "adapter_model.safetensors").stat().st_size
adapters = all("lora_" in name for name in moved)
print(f"loss {loss:.3f}; {len(moved)} of {len(before)} parameters moved, adapters only: {adapters}; {size} bytes saved")
