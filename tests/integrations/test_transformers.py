"""Hugging Face's Trainer with MeZO: the loop is theirs, the steps are ours to the bit."""

from __future__ import annotations

import pathlib
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.distributed import DistributedConfig

import mezo_scale as ms
from mezo_scale.integrations.transformers import MeZOConfig, MeZOTrainer
from tests.support import models
from tests.support.launch import Launch


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Texts of one length, each its own labels."""

    def __init__(self, count: int) -> None:
        self.ids = torch.randint(5, 60, (count, 8), generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def config(folder: pathlib.Path, **more: Any) -> MeZOConfig:
    plain = {
        "output_dir": str(folder),
        "learning_rate": 1e-3,
        "eps": 1e-2,
        "seed": 7,
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "lr_scheduler_type": "constant",
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
    }
    return MeZOConfig(**{**plain, **more})


def values(model: nn.Module) -> list[Tensor]:
    return [param.detach().clone() for param in model.parameters()]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def by_hand(rows: Rows, steps: int, size: int) -> list[Tensor]:
    """The same steps with nothing but the optimizer."""
    model = models.build("llama")
    opt = ms.MeZO(model, lr=1e-3, eps=1e-2, seed=7)
    for step in range(steps):
        ids = rows.ids[step * size : (step + 1) * size]
        opt.step(lambda ids=ids: model(input_ids=ids, labels=ids).loss)
    return values(model)


def test_its_steps_are_the_optimizer_s(tmp_path: pathlib.Path) -> None:
    rows, model = Rows(6), models.build("llama")
    before = values(model)
    MeZOTrainer(model, config(tmp_path), train_dataset=rows).train()
    assert not equal(values(model), before)
    assert equal(values(model), by_hand(rows, steps=3, size=2))


def test_ranks_compare_the_last_step_when_the_training_ends(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[int] = []
    monkeypatch.setattr(ms.MeZO, "check_ranks", lambda optimizer: compared.append(optimizer.step_count))
    MeZOTrainer(models.build("llama"), config(tmp_path), train_dataset=Rows(6)).train()
    assert compared == [3]


def test_all_branches_run_in_one_forward_where_the_objective_gives_a_loss_per_row(tmp_path: pathlib.Path) -> None:
    rows, model, calls = Rows(6), models.build("llama"), []
    trainer = MeZOTrainer(model, config(tmp_path), train_dataset=rows, objective=ms.objectives.labels)
    model.register_forward_hook(lambda _, __, output: calls.append(output.logits.shape[0]))
    trainer.train()
    assert calls[-2:] == [4, 4]  # two steps of two rows in two branches each
    reference = models.build("llama")
    opt = ms.MeZO(reference, lr=1e-3, eps=1e-2, seed=7)
    for step in range(3):
        ids = rows.ids[2 * step : 2 * step + 2]
        opt.step(batch={"input_ids": ids, "labels": ids}, objective=ms.objectives.labels)
    assert equal(values(model), values(reference))


def test_micro_batches_that_are_accumulated_are_one_step(tmp_path: pathlib.Path) -> None:
    rows, parts, whole = Rows(12), models.build("llama"), models.build("llama")
    accumulated = config(tmp_path, gradient_accumulation_steps=2)
    MeZOTrainer(parts, accumulated, train_dataset=rows).train()
    MeZOTrainer(whole, config(tmp_path, per_device_train_batch_size=4), train_dataset=rows).train()
    for one, other in zip(values(parts), values(whole), strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)
    assert not equal(values(parts), values(models.build("llama")))


def test_a_run_that_is_resumed_from_a_checkpoint_ends_with_the_same_weights(tmp_path: pathlib.Path) -> None:
    rows, whole = Rows(8), models.build("llama")
    MeZOTrainer(whole, config(tmp_path / "whole", max_steps=4), train_dataset=rows).train()
    first = MeZOTrainer(
        models.build("llama"),
        config(tmp_path / "half", max_steps=4, save_strategy="steps", save_steps=2),
        train_dataset=rows,
    )
    first.train()
    again = models.build("llama")
    trainer = MeZOTrainer(again, config(tmp_path / "half", max_steps=4), train_dataset=rows)
    trainer.train(resume_from_checkpoint=str(tmp_path / "half" / "checkpoint-2"))
    assert trainer.state.global_step == 4
    assert equal(values(again), values(whole))


def test_it_evaluates_and_takes_the_best_weights_back(tmp_path: pathlib.Path) -> None:
    arguments = config(
        tmp_path,
        max_steps=4,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
    )
    trainer = MeZOTrainer(models.build("llama"), arguments, train_dataset=Rows(8), eval_dataset=Rows(4))
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(losses) == 2
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-6)


def test_its_trajectory_gives_the_weights_again(tmp_path: pathlib.Path) -> None:
    model, log = models.build("llama"), tmp_path / "t.mezo"
    trainer = MeZOTrainer(model, config(tmp_path / "out", trajectory=str(log)), train_dataset=Rows(6))
    trainer.train()
    again = models.build("llama")
    ms.replay(again, log)
    assert equal(values(again), values(model))
    with pytest.raises(ValueError, match="resume_from_checkpoint loads weights of a later step"):
        trainer.train(resume_from_checkpoint=True)


def test_what_is_for_gradients_is_refused_or_left_out(tmp_path: pathlib.Path) -> None:
    model = models.build("llama")
    with pytest.raises(TypeError, match="args is a TrainingArguments: expected MeZOConfig"):
        MeZOTrainer(model, TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True))
    with pytest.raises(ValueError, match="optimizers is given"):
        MeZOTrainer(model, config(tmp_path), optimizers=(torch.optim.SGD(model.parameters()), None))
    with pytest.raises(ValueError, match="fp16 scales the loss"):
        MeZOTrainer(model, config(tmp_path, fp16=True))
    arguments = config(tmp_path, activation_checkpointing=True, max_grad_norm=3.0)
    with pytest.warns(UserWarning, match="^max_grad_norm, activation_checkpointing.*: for gradients"):
        trainer = MeZOTrainer(model, arguments)
    assert (trainer.args.max_grad_norm, trainer.args.activation_checkpointing) == (0, False)
    assert isinstance(trainer, Trainer)


def main(layout: str, folder: str) -> None:
    """What each rank of a launch runs, over gloo: whether the weights moved, and by as much as on the other rank."""
    dist.init_process_group("gloo")
    sharded = DistributedConfig(fsdp_size=2) if layout == "fsdp2" else None
    rows, model = Rows(12), AutoModelForCausalLM.from_pretrained(folder, distributed_config=sharded)
    before = [whole(param) for param in model.parameters()]
    trainer = MeZOTrainer(model, config(pathlib.Path(folder) / "out"), train_dataset=rows)
    trainer.train()
    after = [whole(param) for param in trainer.model.parameters()]
    moved = sum(float((a - b).abs().sum()) for a, b in zip(after, before, strict=True))
    everyone: list[float] = [0.0] * dist.get_world_size()
    dist.all_gather_object(everyone, moved)
    kinds = f"{type(trainer.model_wrapped).__name__} of {type(next(model.parameters()).data).__name__}"
    sys.stdout.write(f"{kinds} moved {moved > 0} alike {len(set(everyone)) == 1}\n")
    dist.destroy_process_group()


def whole(param: Tensor) -> Tensor:
    """All of a parameter, wherever its parts are."""
    full = param.full_tensor() if isinstance(param, DTensor) else param
    return full.detach().clone()


@pytest.mark.parametrize(
    ("layout", "kinds"),
    [("ddp", "DistributedDataParallel of Tensor"), ("fsdp2", "FSDPLlamaForCausalLM of DTensor")],
)
def test_on_two_ranks_the_weights_move_and_alike(
    launch: Launch, tmp_path: pathlib.Path, layout: str, kinds: str
) -> None:
    models.build("llama").save_pretrained(tmp_path)
    done = launch("torchrun", "--nproc-per-node", "2", "-m", "tests.integrations.test_transformers", layout, tmp_path)
    assert done.code == 0, done.output
    assert done.output.count(f"{kinds} moved True alike True") == 2, done.output


if __name__ == "__main__":
    main(*sys.argv[1:])
