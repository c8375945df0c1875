"""TRL's SFTTrainer without gradients; DPOTrainer and RewardTrainer take the mixin in the same way.

python examples/trl_sft.py [MODEL]               MODEL: a folder or a name; a tiny random Llama on bytes without
"""

import sys
import tempfile
from dataclasses import dataclass

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer, LlamaConfig
from trl import SFTConfig, SFTTrainer

from mezo_scale.integrations.transformers import MeZOArguments, MeZOMixin

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


class MeZOSFTTrainer(MeZOMixin, SFTTrainer):
    """The mixin comes first."""


@dataclass
class MeZOSFTConfig(MeZOArguments, SFTConfig):
    """And so do its arguments."""


torch.manual_seed(0)
if len(sys.argv) > 1:
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
else:
    tokenizer = ByT5Tokenizer()
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=len(tokenizer), **SIZES))
before = [param.detach().clone() for param in model.parameters()]

with tempfile.TemporaryDirectory() as place:
    arguments = MeZOSFTConfig(
        output_dir=place,
        max_steps=10,
        learning_rate=1e-4,
        eps=1e-3,
        per_device_train_batch_size=4,
        logging_steps=5,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
    )
    texts = Dataset.from_list([{"text": f"{n} and {n} make {2 * n}."} for n in range(40)])
    trainer = MeZOSFTTrainer(model, arguments, train_dataset=texts, processing_class=tokenizer)
    trainer.train()

losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
moved = sum(not torch.equal(old, new.cpu()) for old, new in zip(before, trainer.model.parameters(), strict=True))
print(f"losses {losses}; {moved} of {len(before)} parameters moved")
