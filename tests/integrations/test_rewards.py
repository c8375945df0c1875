"""Rewards of what a model writes: the loss is what your functions say of the completions, in every branch."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.distributed import DistributedConfig

import mezo_scale as ms
from mezo_scale.integrations.rewards import RewardMeZOConfig, RewardMeZOTrainer, Written
from mezo_scale.integrations.transformers import MeZOTrainer
from tests.integrations.test_layouts import ARGUMENTS, whole
from tests.integrations.trainers import Rows, config, equal, values
from tests.support import material, models
from tests.support.pool import Ranks

PROMPTS = [{"prompt": text, "wanted": "aeiou"[n % 5]} for n, (text, _) in enumerate(material.reviews()[:8])]
CHAT = "{% for message in messages %}{{ message['content'] }}{% endfor %}{% if add_generation_prompt %} It{% endif %}"


def wanted_letters(completions: Sequence[Any], wanted: Sequence[str], **_: Any) -> list[float]:
    """The share of a completion that is the letter which its row wants."""
    texts = [one if isinstance(one, str) else one[0]["content"] for one in completions]
    return [text.count(letter) / max(len(text), 1) for text, letter in zip(texts, wanted, strict=True)]


def rewarded(folder: pathlib.Path, **more: Any) -> RewardMeZOConfig:
    plain = config(folder, max_completion_length=6, eps=0.3, learning_rate=1e-2, kind=RewardMeZOConfig, **more)
    assert isinstance(plain, RewardMeZOConfig)
    return plain


@pytest.fixture
def model(model_folder: pathlib.Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()


@pytest.fixture
def tokenizer(model_folder: pathlib.Path) -> Any:
    return AutoTokenizer.from_pretrained(model_folder)


def tuned(model: Any, tokenizer: Any, args: RewardMeZOConfig, rewards: Any = wanted_letters, **more: Any) -> Any:
    options = {"train_dataset": PROMPTS, "processing_class": tokenizer, **more}
    trainer = RewardMeZOTrainer(model, rewards, args, **options)
    trainer.train()
    return trainer


def by_hand(folder: pathlib.Path, tokenizer: Any, steps: int) -> list[Tensor]:
    """The same steps by transformers' own generate, a branch at a time."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    opt = ms.MeZO(model, lr=1e-2, eps=0.3, seed=7)
    tokenizer.pad_token = tokenizer.eos_token
    for step in range(steps):
        rows = PROMPTS[2 * step : 2 * step + 2]
        batch = tokenizer([row["prompt"] for row in rows], padding=True, padding_side="left", return_tensors="pt")
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}

        def minus_reward(inputs: Any = inputs, rows: Any = rows) -> Tensor:
            written = model.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=0)
            texts = tokenizer.batch_decode(written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            return -torch.tensor(wanted_letters(texts, [row["wanted"] for row in rows]))

        opt.step(minus_reward)
    return values(model)


def test_a_step_is_the_optimizer_s_with_the_rewards_of_what_generate_writes(
    tmp_path: pathlib.Path, model: Any, model_folder: pathlib.Path, tokenizer: Any
) -> None:
    before = values(model)
    trainer = tuned(model, tokenizer, rewarded(tmp_path))
    assert not equal(values(model), before)
    assert equal(values(model), by_hand(model_folder, tokenizer, steps=3))
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["reward"] for entry in logged] == [-entry["loss"] for entry in logged]


def test_all_branches_are_written_in_one_batch(tmp_path: pathlib.Path, model: Any, tokenizer: Any) -> None:
    sizes: list[int] = []

    def counted(prompts: Sequence[str], completions: Sequence[str], completion_ids: Any, **columns: Any) -> list[float]:
        assert len(prompts) == len(completions) == len(completion_ids) == len(columns["wanted"])
        sizes.append(len(prompts))
        return wanted_letters(completions, **columns)

    tuned(model, tokenizer, rewarded(tmp_path), counted)
    assert sizes[-2:] == [4, 4]  # two rows in two branches


def test_rewards_are_weighed_and_one_with_nothing_to_say_counts_nothing(
    tmp_path: pathlib.Path, model: Any, tokenizer: Any
) -> None:
    def one(completions: Sequence[str], **_: Any) -> list[float]:
        return [1.0] * len(completions)

    def silent(completions: Sequence[str], **_: Any) -> list[float | None]:
        return [None, *[4.0] * (len(completions) - 1)]

    trainer = RewardMeZOTrainer(
        model, [one, silent], rewarded(tmp_path), reward_weights=[0.5, 2.0], processing_class=tokenizer
    )
    losses = Written(trainer)(model, trainer.data_collator(PROMPTS[:2]))
    assert losses.tolist() == [-0.5, -8.5]


def test_conversations_are_answered_with_messages(tmp_path: pathlib.Path, model: Any, tokenizer: Any) -> None:
    tokenizer.chat_template = CHAT
    seen: list[Any] = []

    def kept(prompts: Any, completions: Any, wanted: Any, **_: Any) -> list[float]:
        seen.extend(zip(prompts, completions, strict=True))
        return wanted_letters(completions, wanted)

    rows = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in PROMPTS]
    tuned(model, tokenizer, rewarded(tmp_path), kept, train_dataset=rows)
    prompt, completion = seen[0]
    assert prompt == rows[0]["prompt"]
    assert [message["role"] for message in completion] == ["assistant"]


def completions(trainer: RewardMeZOTrainer, model: Any, seeds: list[int]) -> list[str]:
    """What is written after one prompt, over again with each seed."""
    seen: list[str] = []
    trainer.rewards = [(lambda completions, **_: seen.extend(completions) or [0.0] * len(completions), 1.0)]
    Written(trainer)(model, {**trainer.data_collator([PROMPTS[0]] * len(seeds)), "seeds": seeds})
    return seen


def test_a_sample_follows_from_its_seed(tmp_path: pathlib.Path, model: Any, tokenizer: Any) -> None:
    trainer = RewardMeZOTrainer(model, wanted_letters, rewarded(tmp_path, temperature=1.5), processing_class=tokenizer)
    first, second, first_again = completions(trainer, model, [1, 2, 1])
    assert first == first_again != second
    assert len(set(completions(trainer, model, list(range(20))))) > 10
    trainer.args.temperature = 0.0
    assert len(set(completions(trainer, model, [1, 2, 3]))) == 1


def test_samples_have_the_model_s_probabilities(tmp_path: pathlib.Path, model: Any, tokenizer: Any) -> None:
    args = rewarded(tmp_path, temperature=2.0)
    args.max_completion_length = 1
    trainer = RewardMeZOTrainer(model, wanted_letters, args, processing_class=tokenizer)
    count = 4000
    drawn: list[Any] = []
    trainer.rewards = [(lambda completion_ids, **_: drawn.extend(completion_ids) or [0.0] * count, 1.0)]
    batch = trainer.data_collator([PROMPTS[0]])
    tall = {name: value.repeat(count, 1) for name, value in batch.items() if isinstance(value, Tensor)}
    with torch.no_grad():
        Written(trainer)(model, {**tall, "prompts": [""] * count, "columns": {}, "seeds": list(range(count))})
        expected = (model(**{name: tall[name][:1] for name in tall}).logits[0, -1] / 2).softmax(-1)
    likeliest = int(expected.argmax())
    share = sum(tokens == [likeliest] for tokens in drawn) / count
    spread = math.sqrt(float(expected[likeliest]) / count)
    assert share == pytest.approx(float(expected[likeliest]), abs=4 * spread)


def test_branches_are_sampled_alike_and_steps_and_rows_are_not(
    tmp_path: pathlib.Path, model: Any, tokenizer: Any
) -> None:
    seen: list[list[str]] = []

    def kept(completions: Sequence[str], **_: Any) -> list[float]:
        seen.append(list(completions))
        return [0.0] * len(completions)

    args = rewarded(tmp_path, temperature=1.5)
    args.eps = 1e-9  # the branches' weights are the same but for rounding
    tuned(model, tokenizer, args, kept, train_dataset=[PROMPTS[0]] * 6)
    for written in seen[-2:]:
        assert written[:2] == written[2:]
        assert written[0] != written[1]
    assert seen[-1] != seen[-2]


def test_evaluation_says_the_reward(tmp_path: pathlib.Path, model: Any, tokenizer: Any) -> None:
    trainer = tuned(model, tokenizer, rewarded(tmp_path), eval_dataset=PROMPTS[:3])
    found = trainer.evaluate()
    with torch.no_grad():
        expected = Written(trainer)(model, trainer.data_collator(PROMPTS[:3])).mean()
    assert found["eval_loss"] == pytest.approx(float(expected))
    assert trainer.state.log_history[-1]["eval_reward"] == -found["eval_loss"]


def test_what_can_t_be_rewarded_is_refused(tmp_path: pathlib.Path, model: Any, tokenizer: Any) -> None:
    args = rewarded(tmp_path)
    with pytest.raises(TypeError, match="reward_funcs holds a str: expected functions"):
        RewardMeZOTrainer(model, "some/reward-model", args, processing_class=tokenizer)
    with pytest.raises(TypeError, match="reward_funcs holds a LlamaForCausalLM"):
        RewardMeZOTrainer(model, [model], args, processing_class=tokenizer)
    with pytest.raises(ValueError, match="2 reward_weights for 1 reward_funcs"):
        RewardMeZOTrainer(model, wanted_letters, args, reward_weights=[1, 2], processing_class=tokenizer)
    with pytest.raises(ValueError, match="processing_class is None: give the model's tokenizer"):
        RewardMeZOTrainer(model, wanted_letters, args)
    with pytest.raises(ValueError, match="temperature is -1"):
        RewardMeZOTrainer(model, wanted_letters, rewarded(tmp_path, temperature=-1.0), processing_class=tokenizer)
    args.max_completion_length = 0
    with pytest.raises(ValueError, match="max_completion_length is 0: expected at least 1"):
        RewardMeZOTrainer(model, wanted_letters, args, processing_class=tokenizer)
    with pytest.raises(ValueError, match="the rows have no prompt, only text"):
        tuned(model, tokenizer, rewarded(tmp_path), train_dataset=[{"text": "a"}] * 4)
    with (
        pytest.warns(UserWarning, match="returned 1 numbers for 4"),  # first it is tried in all branches at once
        pytest.raises(ValueError, match="the reward too_few returned 1 numbers for 2 completions"),
    ):
        tuned(model, tokenizer, rewarded(tmp_path), too_few)


def too_few(**_: Any) -> list[float]:
    return [1.0]


def on_rank(layout: str, model_folder: pathlib.Path, folder: pathlib.Path) -> list[Tensor]:
    args = rewarded(folder, max_steps=2, temperature=1.0, **ARGUMENTS[layout])
    sharded = DistributedConfig(fsdp_size=2) if layout == "fsdp2-loaded" else None
    model: Any = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32, distributed_config=sharded)
    trainer = tuned(model, AutoTokenizer.from_pretrained(model_folder), args, eval_dataset=PROMPTS[:2])
    assert math.isfinite(trainer.evaluate()["eval_reward"])
    return whole(trainer.model)


@pytest.mark.parametrize("layout", ["plain", "fsdp2-loaded", "zero3"])
def test_ranks_write_for_rows_of_their_own_and_step_alike(ranks: Ranks, tmp_path: pathlib.Path, layout: str) -> None:
    folder = material.write_model("llama-untied", tmp_path / "base")
    one, other = ranks(2, on_rank, layout=layout, model_folder=folder, folder=tmp_path, fresh=True)
    assert equal(one, other)
    assert not equal(one, values(material.build("llama-untied")))


def test_an_objective_that_jumps_is_checked_by_its_smooth_one(tmp_path: pathlib.Path) -> None:
    calls: list[str] = []

    def jumps(net: Any, batch: Any) -> Tensor:
        calls.append("jumps")
        return (ms.objectives.labels(net, batch) > 4).float()

    def smooth(net: Any, batch: Any) -> Tensor:
        calls.append("smooth")
        return ms.objectives.labels(net, batch)

    jumps.smooth = smooth  # type: ignore[attr-defined]
    MeZOTrainer(models.build("llama"), config(tmp_path, max_steps=1), train_dataset=Rows(2), objective=jumps).train()
    assert calls[0] == "smooth"
    assert calls[-1] == "jumps"
