"""Hugging Face's Trainer, stopped after half of its steps and started again:

python examples/hf_trainer.py [MODEL]            MODEL: a folder or a name; a tiny random Llama without
torchrun --nproc-per-node 2 examples/hf_trainer.py [MODEL]
"""

import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, TrainerCallback

import mezo_scale as ms
from mezo_scale.integrations.transformers import MeZOConfig, MeZOTrainer

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def base() -> torch.nn.Module:
    """The base model: the same weights at every start."""
    torch.manual_seed(0)
    if len(sys.argv) > 1:
        return AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
    return AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=64, **SIZES))


class Stop(TrainerCallback):
    """In the place of whatever ends a run early."""

    def on_step_end(self, args, state, control, **_):  # noqa: ANN001, ANN003, ANN201
        control.should_training_stop = state.global_step == args.max_steps // 2


def train(folder: Path, *callbacks: TrainerCallback) -> MeZOTrainer:
    arguments = MeZOConfig(
        output_dir=str(folder),
        trajectory=str(folder / "run.mezo"),
        max_steps=20,
        learning_rate=1e-4,
        eps=1e-3,
        per_device_train_batch_size=4,
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 60, (64, 12)).tolist()]
    trainer = MeZOTrainer(base(), arguments, train_dataset=rows, objective=ms.objectives.labels, callbacks=[*callbacks])
    trainer.train()
    return trainer


with tempfile.TemporaryDirectory() as place:
    stopped = train(Path(place), Stop()).state.global_step
    trainer = train(Path(place))
    again = base()  # on two processes rank 0 reads the log, and hands it to the other
    ms.replay(again, Path(place) / "run.mezo")
    same = all(map(torch.equal, again.parameters(), trainer.model.cpu().parameters()))
    went_on = f"stopped after {stopped} steps, went on to {trainer.state.global_step}"
    if trainer.is_world_process_zero():
        print(f"{went_on} on {trainer.args.world_size} processes; replayed weights are equal: {same}")
