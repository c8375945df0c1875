"""TRL's trainers with the mixin: their losses, our steps, and a reference that stays what it is."""

from __future__ import annotations

import copy
import math
import pathlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

import mezo_scale as ms
from mezo_scale.integrations.transformers import MeZOArguments, MeZOMixin
from tests.integrations import trainers
from tests.integrations.trainers import equal, values
from tests.support import material

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL calls what transformers is about to rename


class MeZOSFTTrainer(MeZOMixin, SFTTrainer):  # type: ignore[misc]
    """TRL's, with MeZO."""


class MeZODPOTrainer(MeZOMixin, DPOTrainer):  # type: ignore[misc]
    """TRL's, with MeZO."""


class MeZORewardTrainer(MeZOMixin, RewardTrainer):  # type: ignore[misc]
    """TRL's, with MeZO."""


@dataclass
class MeZOSFTConfig(MeZOArguments, SFTConfig):  # type: ignore[misc]
    """TRL's arguments and MeZO's."""


@dataclass
class MeZODPOConfig(MeZOArguments, DPOConfig):  # type: ignore[misc]
    """TRL's arguments and MeZO's."""


@dataclass
class MeZORewardConfig(MeZOArguments, RewardConfig):  # type: ignore[misc]
    """TRL's arguments and MeZO's."""


TEXTS = Dataset.from_list([{"text": text} for text, _ in material.reviews()[:12]])
PAIRS = [
    {"prompt": text, "chosen": " It was great", "rejected": " It was terrible"} for text, _ in material.reviews()[64:76]
]
PREFERENCES = Dataset.from_list(PAIRS)


def arguments(folder: pathlib.Path, **more: Any) -> dict[str, Any]:
    return trainers.arguments(folder, bf16=False, **more)


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture
def model(model_folder: pathlib.Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)


def batches(trainer: Any) -> Iterator[dict[str, Tensor]]:
    """The rows of each step, as the trainer collates them."""
    yield from trainer.get_train_dataloader()


def test_supervised_steps_are_the_optimizer_s_on_the_same_rows(tmp_path: pathlib.Path, model: Any) -> None:
    base, by_hand, by_model = (copy.deepcopy(model) for _ in range(3))
    made = [MeZOSFTTrainer(net, MeZOSFTConfig(**arguments(tmp_path)), train_dataset=TEXTS) for net in (model, by_hand)]
    made[0].train()
    assert len(losses(made[0])) == 3
    assert all(math.isfinite(loss) for loss in losses(made[0]))
    assert not equal(values(model), values(base))

    opt = ms.MeZO(by_hand, lr=1e-3, eps=1e-2, seed=7)
    textbook = ms.MeZO(by_model, lr=1e-3, eps=1e-2, seed=7)
    for _, batch in zip(range(3), batches(made[1]), strict=False):
        items = (batch["labels"][:, 1:] != -100).sum()
        opt.step(lambda batch=batch, items=items: made[1].compute_loss(by_hand, dict(batch), num_items_in_batch=items))
        textbook.step(lambda batch=batch: by_model(**batch).loss)
    assert equal(values(model), values(by_hand))
    for one, other in zip(values(model), values(by_model), strict=True):  # TRL sums the logits in tiles
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_preferences_move_the_policy_and_never_the_reference(tmp_path: pathlib.Path, model: Any) -> None:
    base = copy.deepcopy(model)
    trainer = MeZODPOTrainer(model, args=MeZODPOConfig(**arguments(tmp_path)), train_dataset=PREFERENCES)
    said: list[Tensor] = []
    trainer.ref_model.register_forward_hook(lambda _, __, output: said.append(output.log_probs.clone()))
    trainer.train()
    assert trainer.ref_model is not trainer.model
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=0.1)  # it begins as its own reference
    assert all(math.isfinite(loss) for loss in losses(trainer))
    assert equal(values(trainer.ref_model), values(base))
    assert not equal(values(model), values(base))
    assert len(said) == 6
    for plus, minus in zip(said[::2], said[1::2], strict=True):  # in both branches it is unperturbed
        assert torch.equal(plus, minus)


def test_a_reference_under_an_adapter_is_the_base_model(tmp_path: pathlib.Path, model: Any) -> None:
    base = copy.deepcopy(model)
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], r=2, task_type="CAUSAL_LM")
    trainer = MeZODPOTrainer(
        model, args=MeZODPOConfig(**arguments(tmp_path)), train_dataset=PREFERENCES, peft_config=lora
    )
    before = {name: param.detach().clone() for name, param in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, param in trainer.model.named_parameters() if not torch.equal(param, before[name])}
    assert moved
    assert all("lora_" in name for name in moved)
    assert all(math.isfinite(loss) for loss in losses(trainer))
    assert trainer.ref_model is None
    ids = torch.arange(6)[None]
    with torch.no_grad(), trainer.model.disable_adapter():
        assert torch.equal(trainer.model(input_ids=ids).logits, base.eval()(input_ids=ids).logits)


def test_a_reward_model_is_tuned(tmp_path: pathlib.Path, model_folder: pathlib.Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(model_folder, num_labels=1, dtype=torch.float32)
    model.config.pad_token_id = 0
    before = values(model)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    trainer = MeZORewardTrainer(
        model,
        args=MeZORewardConfig(**arguments(tmp_path)),
        train_dataset=PREFERENCES.remove_columns("prompt"),
        processing_class=tokenizer,
    )
    trainer.train()
    assert len(losses(trainer)) == 3
    assert all(math.isfinite(loss) for loss in losses(trainer))
    assert not equal(values(model), before)


def test_what_is_measured_in_a_step_is_logged_as_training(tmp_path: pathlib.Path, model: Any) -> None:
    config = MeZOSFTConfig(**arguments(tmp_path, eval_strategy="steps", eval_steps=1, max_steps=1))
    trainer = MeZOSFTTrainer(model, config, train_dataset=TEXTS, eval_dataset=TEXTS.select(range(2)))
    trainer.train()
    step, evaluated = trainer.state.log_history[:2]
    assert "mean_token_accuracy" in step
    assert not any(name.startswith("eval_") for name in step)
    alone = trainer.evaluate()
    assert evaluated["eval_mean_token_accuracy"] == alone["eval_mean_token_accuracy"]
