"""Hugging Face's Trainer with MeZO: the loop is theirs, the steps are ours to the bit."""

from __future__ import annotations

import pathlib
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

import mezo_scale as ms
from mezo_scale.errors import TrajectoryError
from mezo_scale.integrations.transformers import MeZOTrainer, _unwrapped
from tests.integrations.trainers import Rows, StopAfter, config, equal, values
from tests.support import models
from tests.support.disk import LazyDisk


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


def shuffled(folder: pathlib.Path, **more: Any) -> Any:
    """Of a run of 5 steps over shuffled rows, with a schedule: an epoch has 3 steps."""
    plain = {"max_steps": 5, "lr_scheduler_type": "linear", "train_sampling_strategy": "random"}
    return config(folder, trajectory=str(folder / "t.mezo"), **plain, **more)


def trained(arguments: Any, stop_after: int | None = None, resume: Any = None) -> tuple[Any, list[Tensor]]:
    """A run from the base model: its trainer, and the weights at its end."""
    model = models.build("llama")
    callbacks = [] if stop_after is None else [StopAfter(stop_after)]
    trainer = MeZOTrainer(model, arguments, train_dataset=Rows(6), eval_dataset=Rows(2), callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, values(model)


def test_its_trajectory_gives_the_weights_again(tmp_path: pathlib.Path) -> None:
    _, weights = trained(shuffled(tmp_path))
    again = models.build("llama")
    assert ms.replay(again, tmp_path / "t.mezo") == 5
    assert equal(values(again), weights)


@pytest.mark.parametrize("stop", [2, 3, 4])  # within an epoch, at its end, in the next one
def test_a_run_goes_on_after_the_last_step_of_its_trajectory(tmp_path: pathlib.Path, stop: int) -> None:
    _, whole = trained(shuffled(tmp_path / "whole"))
    first, _ = trained(shuffled(tmp_path / "parts"), stop_after=stop)
    again, weights = trained(shuffled(tmp_path / "parts"))
    assert first.state.global_step == stop
    assert again.state.global_step == len(ms.Trajectory.open(tmp_path / "parts" / "t.mezo")) == 5
    assert [entry["step"] for entry in again.state.log_history if "loss" in entry] == list(range(stop + 1, 6))
    assert equal(weights, whole)


@pytest.mark.parametrize("behind", [0, 1])
def test_a_checkpoint_s_steps_are_not_replayed_twice(tmp_path: pathlib.Path, behind: int) -> None:
    _, whole = trained(shuffled(tmp_path / "whole"))
    saving = {"save_strategy": "steps", "save_steps": 3 - behind}
    trained(shuffled(tmp_path / "parts", **saving), stop_after=3)
    checkpoint = tmp_path / "parts" / f"checkpoint-{3 - behind}"
    again, weights = trained(shuffled(tmp_path / "parts"), resume=str(checkpoint))
    assert again.state.global_step == len(ms.Trajectory.open(tmp_path / "parts" / "t.mezo")) == 5
    assert [entry["step"] for entry in again.state.log_history if "loss" in entry][-2:] == [4, 5]
    assert equal(weights, whole)


def test_a_checkpoint_s_steps_are_on_the_disk(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    LazyDisk(monkeypatch)
    save_model, found = MeZOTrainer.save_model, []

    def save(trainer: MeZOTrainer, *args: Any, **kwargs: Any) -> None:
        log = _unwrapped(trainer.optimizer).trajectory
        found.append((len(log), log.synced))
        save_model(trainer, *args, **kwargs)

    monkeypatch.setattr(MeZOTrainer, "save_model", save)
    trained(shuffled(tmp_path, save_strategy="steps", save_steps=2))
    assert found[:2] == [(2, 2), (4, 4)]


def test_a_run_that_went_on_by_its_trajectory_saves_checkpoints_again(tmp_path: pathlib.Path) -> None:
    trained(shuffled(tmp_path), stop_after=2)
    again, _ = trained(shuffled(tmp_path, save_strategy="steps", save_steps=4))
    assert again.state.global_step == 5
    assert (tmp_path / "checkpoint-4" / "trainer_state.json").exists()


def test_a_run_that_is_complete_takes_no_further_step(tmp_path: pathlib.Path) -> None:
    _, weights = trained(shuffled(tmp_path))
    again, same = trained(shuffled(tmp_path))
    assert again.state.global_step == len(ms.Trajectory.open(tmp_path / "t.mezo")) == 5
    assert equal(same, weights)


def test_a_checkpoint_of_a_later_step_than_the_trajectory_s_is_refused(tmp_path: pathlib.Path) -> None:
    trained(shuffled(tmp_path / "one", save_strategy="steps", save_steps=3), stop_after=3)
    (tmp_path / "one" / "t.mezo").unlink()
    checkpoint = tmp_path / "one" / "checkpoint-3"
    with pytest.raises(TrajectoryError, match=r"checkpoint-3 was saved after step 3, but the trajectory .* 0 steps"):
        trained(shuffled(tmp_path / "one"), resume=str(checkpoint))
    assert not (tmp_path / "one" / "t.mezo").exists()
    with pytest.raises(ValueError, match="nowhere holds no trainer_state.json"):
        trained(shuffled(tmp_path / "one"), resume=str(tmp_path / "nowhere"))


def test_a_schedule_that_follows_metrics_is_not_taken_up_from_a_trajectory(tmp_path: pathlib.Path) -> None:
    plateau = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 1}
    trained(shuffled(tmp_path), stop_after=2)
    with pytest.raises(ValueError, match="lr_scheduler_type is reduce_lr_on_plateau, which follows the metrics of the"):
        trained(config(tmp_path, trajectory=str(tmp_path / "t.mezo"), **plateau))
    assert len(ms.Trajectory.open(tmp_path / "t.mezo")) == 2


def test_a_trajectory_is_of_one_run_from_the_base_model(tmp_path: pathlib.Path) -> None:
    trainer, _ = trained(shuffled(tmp_path))
    with pytest.raises(
        ValueError, match="this trainer has trained already, so its model is not the base: make another"
    ):
        trainer.train()
    fresh = MeZOTrainer(models.build("llama"), shuffled(tmp_path), train_dataset=Rows(6))
    with pytest.raises(ValueError, match="a search over hyperparameters has many runs, a trajectory is of one"):
        fresh.train(trial=object())
    assert len(ms.Trajectory.open(tmp_path / "t.mezo")) == 5


def test_no_norm_of_gradients_is_logged(tmp_path: pathlib.Path) -> None:
    trainer = MeZOTrainer(models.build("llama"), config(tmp_path), train_dataset=Rows(6))
    trainer.train()
    assert not any("grad_norm" in entry for entry in trainer.state.log_history)


def test_a_run_that_failed_lets_go_of_its_trajectory(tmp_path: pathlib.Path) -> None:
    class Fails(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            raise RuntimeError("after a step")

    trainer = MeZOTrainer(models.build("llama"), shuffled(tmp_path), train_dataset=Rows(6), callbacks=[Fails()])
    with pytest.raises(RuntimeError, match="after a step"):
        trainer.train()
    again, _ = trained(shuffled(tmp_path))
    assert again.state.global_step == 5


def test_what_is_for_gradients_is_refused_or_left_out(tmp_path: pathlib.Path) -> None:
    model = models.build("llama")
    with pytest.raises(TypeError, match="args is a TrainingArguments: expected MeZOConfig"):
        MeZOTrainer(model, TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True))
    with pytest.raises(ValueError, match="optimizers is given"):
        MeZOTrainer(model, config(tmp_path), optimizers=(torch.optim.SGD(model.parameters()), None))
    with pytest.raises(ValueError, match="fp16 scales the loss"):
        MeZOTrainer(model, config(tmp_path, fp16=True))
    with pytest.raises(ValueError, match="objective is given, and label_smoothing_factor"):
        MeZOTrainer(model, config(tmp_path, label_smoothing_factor=0.1), objective=ms.objectives.labels)
    with pytest.raises(ValueError, match="objective is given, and label_smoothing_factor"):
        MeZOTrainer(model, config(tmp_path), objective=ms.objectives.labels, compute_loss_func=max)
    with pytest.raises(ValueError, match="neftune_noise_alpha adds noise in training mode"):
        MeZOTrainer(model, config(tmp_path, neftune_noise_alpha=5.0))
    arguments = config(tmp_path, activation_checkpointing=True, max_grad_norm=3.0)
    with pytest.warns(UserWarning, match="^max_grad_norm, activation_checkpointing.*: for gradients"):
        trainer = MeZOTrainer(model, arguments)
    assert (trainer.args.max_grad_norm, trainer.args.activation_checkpointing) == (0, False)
    assert isinstance(trainer, Trainer)
    with pytest.warns(UserWarning, match="^optim: for gradients"):
        MeZOTrainer(model, config(tmp_path, optim="sgd"))


def test_what_nobody_asked_for_is_not_said(tmp_path: pathlib.Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer = MeZOTrainer(models.build("llama"), config(tmp_path))
    assert trainer.args.max_grad_norm == 0


def test_checkpointing_that_the_model_has_on_changes_no_step(tmp_path: pathlib.Path) -> None:
    rows, model = Rows(6), models.build("llama")
    model.activation_checkpointing_enable()
    MeZOTrainer(model, config(tmp_path), train_dataset=rows).train()
    assert equal(values(model), by_hand(rows, steps=3, size=2))
