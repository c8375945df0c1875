"""Rewards of what a model writes, as the objective: prompts, your functions, and generation in the perturbed view."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mezo_scale.integrations.transformers import MeZOConfig, MeZOTrainer
from mezo_scale.noise import direction_seed
from mezo_scale.tasks.encoding import pad_left
from mezo_scale.tasks.kinds.decoding import greedy, sampling
from mezo_scale.tasks.logits import last_logits

Reward = Callable[..., Sequence[float | None]]
"""``fn(prompts, completions, completion_ids, **columns)`` -> a number per completion, as TRL's GRPOTrainer takes it, or
None where it has nothing to say. ``columns`` are the data set's others, lists of one entry per completion."""

ROWS_MAX = 2**24  # per micro-batch: rows of a step are numbered, so that each samples by a seed of its own


@dataclass
class RewardMeZOConfig(MeZOConfig):
    """`MeZOConfig`, and how completions are written."""

    max_completion_length: int = field(default=64, metadata={"help": "Tokens that a completion may have."})
    temperature: float = field(
        default=0.0,
        metadata={
            "help": "0: the likeliest token every time. Above: sampled, in all branches with the same randomness."
        },
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "The rewards take the other columns."})


class RewardMeZOTrainer(MeZOTrainer):
    """Tunes a causal language model for rewards of what it writes; the loss is minus the reward.

    A row of the data set has a ``prompt``, a text or a list of messages; completions are then texts, or lists of one
    message. All branches of a step are written in one batch where the model can be paired. A sampled completion
    follows from the weights and from (seed, step, row), so that the branches of a step differ by their weights alone.
    Evaluation writes greedily.

    Args:
        model: writes from left to right.
        reward_funcs: a `Reward`, or several, which are added up.
        reward_weights: of the functions, 1 each if None.

    Raises:
        TypeError: a reward is not a function.
        ValueError: no tokenizer (``processing_class``); temperature or max_completion_length out of range; another
            number of weights than of functions. While it trains: a function returns another number of rewards than
            there are completions.
    """

    def __init__(
        self,
        model: nn.Module,
        reward_funcs: Reward | Sequence[Reward],
        args: RewardMeZOConfig,
        *,
        reward_weights: Sequence[float] | None = None,
        **kwargs: Any,
    ) -> None:
        functions = [reward_funcs] if not isinstance(reward_funcs, Sequence) else list(reward_funcs)
        weights = [1.0] * len(functions) if reward_weights is None else list(reward_weights)
        wrong = next(
            (function for function in functions if not callable(function) or isinstance(function, nn.Module)), 0
        )
        if wrong != 0 or isinstance(reward_funcs, str):
            raise TypeError(f"reward_funcs holds a {type(wrong).__name__}: expected functions of completions")
        if not functions or len(weights) != len(functions):
            raise ValueError(f"{len(weights)} reward_weights for {len(functions)} reward_funcs: give one per function")
        if kwargs.get("processing_class") is None:
            raise ValueError("processing_class is None: give the model's tokenizer, completions are written with it")
        if not (math.isfinite(args.temperature) and args.temperature >= 0):
            raise ValueError(f"temperature is {args.temperature}: expected 0 for the likeliest tokens, or above")
        if args.max_completion_length < 1:
            raise ValueError(f"max_completion_length is {args.max_completion_length}: expected at least 1 token")
        kwargs.setdefault("data_collator", self._collated)
        super().__init__(model, args, objective=Written(self), **kwargs)
        self.rewards = list(zip(functions, weights, strict=True))
        self._piece = 0

    def _collated(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """A batch of prompts in tokens, padded on the left, with everything else as lists."""
        tokenizer: Any = self.processing_class
        if "prompt" not in rows[0]:
            raise ValueError(f'the rows have no prompt, only {", ".join(rows[0])}: name that column "prompt"')
        prompts = [row["prompt"] for row in rows]
        tokens = [
            tokenizer(prompt)["input_ids"]
            if isinstance(prompt, str)
            else tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
            for prompt in prompts
        ]
        pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        input_ids, attention_mask = pad_left(tokens, pad_id if pad_id is not None else 0)
        columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
        return {"input_ids": input_ids, "attention_mask": attention_mask, "prompts": prompts, "columns": columns}

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """The mixin's; the rows of a step are numbered over its micro-batches and ranks."""
        count, world = len(inputs["prompts"]), self.args.world_size
        rows = [(self._piece * ROWS_MAX + row) * world + self.args.process_index for row in range(count)]
        self._piece = (self._piece + 1) % self.current_gradient_accumulation_steps
        inputs["seeds"] = [direction_seed(self.args.seed, self.state.global_step, row) for row in rows]
        # The model itself, not DDP around it, which hides what the model's forward takes.
        return super().training_step(self.model, inputs, num_items_in_batch)

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        """Minus the mean reward, with no outputs to go with it: what evaluation measures."""
        assert self.objective is not None
        loss = self.objective(self.model, inputs).mean()
        return (loss, {}) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> Any:
        """The loss alone: completions have no labels to be compared with."""
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, self._prepare_inputs(inputs)), None, None

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The Trainer's, with the reward beside each loss."""
        for name in ("loss", "eval_loss"):
            if name in logs:
                logs[name.replace("loss", "reward")] = -float(logs[name])
        super().log(logs, *args, **kwargs)


class Written:
    """The objective: minus the reward of what the model writes after each prompt, float32 [rows]."""

    def __init__(self, trainer: RewardMeZOTrainer) -> None:
        self._trainer = trainer

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        trainer: Any = self._trainer
        args, tokenizer = trainer.args, trainer.processing_class
        ending = _ending(model, tokenizer)
        weigh = sampling(batch["seeds"], args.temperature) if args.temperature and "seeds" in batch else None
        ids, mask = batch["input_ids"], batch["attention_mask"]
        written = greedy(model, ids, mask, args.max_completion_length, ending.__contains__, weigh)
        completions = [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(
                batch["prompts"], tokenizer.batch_decode(written.tokens, skip_special_tokens=True), strict=True
            )
        ]
        total = torch.zeros(len(completions))
        for function, weight in trainer.rewards:
            found = function(
                prompts=batch["prompts"], completions=completions, completion_ids=written.tokens, **batch["columns"]
            )
            if len(found) != len(completions):
                name = getattr(function, "__name__", type(function).__name__)
                raise ValueError(
                    f"the reward {name} returned {len(found)} numbers for {len(completions)} completions: return one "
                    "for each, None where it has nothing to say"
                )
            total += weight * torch.tensor([0.0 if reward is None else float(reward) for reward in found])
        return -total.masked_fill(~torch.tensor(written.finite), math.nan).to(ids.device)

    def smooth(self, model: nn.Module, batch: Any) -> Tensor:
        """How sure the model is of the first token, which changes little where a text may change wholly."""
        logits = last_logits(model, batch["input_ids"], batch["attention_mask"], keep=1)[:, 0]
        return -logits.log_softmax(-1).max(-1).values


def _ending(model: Any, tokenizer: Any) -> set[int]:
    """The tokens that end a completion."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    several = named if isinstance(named, list) else [named]
    return {token for token in [*several, tokenizer.eos_token_id] if token is not None}
