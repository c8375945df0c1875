"""MeZO in Hugging Face's Trainer and its kin: the loop is theirs, and a training step is two forwards per direction.

    trainer = MeZOTrainer(model, MeZOConfig(output_dir="out", learning_rate=1e-6, eps=1e-3), train_dataset=rows)

    class Tuner(MeZOMixin, SFTTrainer): ...            # any Trainer
    @dataclass
    class TunerConfig(MeZOArguments, SFTConfig): ...   # and its arguments

Logging, evaluation, checkpoints, resuming, schedules and callbacks are the Trainer's. Several micro-batches
(``gradient_accumulation_steps``) are one step, as ranks are. Inside a step the model is in evaluation mode, so trainers
that log by mode (TRL's) log what they measure there under ``eval_``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from mezo_scale.optim.mezo import MeZO

Objective = Callable[[nn.Module, Any], Tensor]


@dataclass
class MeZOArguments:
    """What MeZO takes besides a Trainer's own arguments; see `mezo_scale.MeZO`.

    From the Trainer's come ``learning_rate``, ``weight_decay`` (biases and normalisation are exempt), ``seed`` and
    the schedule.
    """

    eps: float = field(default=1e-3, metadata={"help": "How far the weights are perturbed either way."})
    num_directions: int = field(default=1, metadata={"help": "Random directions per step, of two forwards each."})
    rounding: str = field(
        default="nearest",
        metadata={"help": "How 16-bit weights take an update: nearest, stochastic or master."},
    )
    distribution: str = field(default="normal", metadata={"help": "What directions are drawn from."})
    trajectory: str | None = field(
        default=None,
        metadata={
            "help": "The run's log, from which the steps can be replayed on the base model. Not for a resumed run."
        },
    )
    hang_timeout: float = field(default=600.0, metadata={"help": "Seconds that a step may wait for a rank."})


@dataclass
class MeZOConfig(MeZOArguments, TrainingArguments):  # type: ignore[misc]
    """`transformers.TrainingArguments` and MeZO's."""


_Trainer: Any = object
"""What `MeZOMixin` is mixed into."""


class MeZOMixin(_Trainer):  # type: ignore[misc]
    """Makes a Trainer tune with forward passes only; it comes first among the bases.

    Args:
        objective: ``fn(model, inputs)`` -> losses per row, [rows], as `mezo_scale.objectives.labels`: then all branches
            of a step run in one forward. None: the Trainer's own ``compute_loss``, once per branch.

    Raises:
        TypeError: the arguments are not `MeZOArguments`.
        ValueError: an optimizer is given, fp16's loss scaling is on, DeepSpeed or DataParallel would run the model.
    """

    def __init__(self, *args: Any, objective: Objective | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.objective = objective
        settings: Any = self.args
        if not isinstance(settings, MeZOArguments):
            kind = type(settings).__name__
            raise TypeError(f"args is a {kind}: expected MeZOConfig, or a dataclass of MeZOArguments and {kind}")
        if self.optimizer is not None or getattr(self, "optimizer_cls_and_kwargs", None) is not None:
            raise ValueError("optimizers is given: leave it out, MeZO is made from the arguments")
        if self.args.fp16:
            raise ValueError(
                "fp16 scales the loss for gradients, of which there are none: expected bf16=True or neither"
            )
        if self.is_deepspeed_enabled:
            raise ValueError(
                "deepspeed's engine steps an optimizer of its own: use FSDP here, or `mezo-scale train` for ZeRO-3"
            )
        if self.args.n_gpu > 1:
            raise ValueError(f"DataParallel would run on {self.args.n_gpu} GPUs: start with torchrun, one process each")
        self._leave_out_what_is_for_gradients()

    def _leave_out_what_is_for_gradients(self) -> None:
        args: Any = self.args
        # The last two are one thing: newer releases call it by the first of the two names.
        off = {"max_grad_norm": 0.0, "activation_checkpointing": False, "gradient_checkpointing": False}
        unasked = {"max_grad_norm": TrainingArguments.max_grad_norm}  # clipping is on by default
        found = {name: getattr(args, name) for name in off if hasattr(args, name)}
        needless = [name for name, value in found.items() if value and value != unasked.get(name)]
        for name in found:
            setattr(args, name, off[name])
        if needless:
            warnings.warn(f"{', '.join(needless)}: for gradients, of which there are none, so left out", stacklevel=3)

    optimizer: Any

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """MeZO on the Trainer's model; it finds out by itself when the model is sharded later."""
        if self.optimizer is None:
            args: Any = self.args
            self.optimizer = MeZO(
                self.model if model is None else model,
                lr=args.learning_rate,
                eps=args.eps,
                weight_decay=args.weight_decay,
                num_directions=args.num_directions,
                seed=args.seed,
                trajectory=args.trajectory,
                rounding=args.rounding,
                distribution=args.distribution,
                hang_timeout=args.hang_timeout,
            )
        return self.optimizer

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """The Trainer's. Raises ValueError where a checkpoint's weights would go under the log of another start."""
        if resume_from_checkpoint and getattr(self.args, "trajectory", None):
            raise ValueError(
                "resume_from_checkpoint loads weights of a later step than the trajectory starts from: leave one of "
                "the two out (a trajectory takes up the run by itself, from the base model)"
            )
        done = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        _unwrapped(self.optimizer).check_ranks()  # no next step compares the last one
        return done

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Measure the step's branches on a micro-batch; the Trainer's ``optimizer.step()`` then applies the step."""
        model.train()
        inputs = self._prepare_inputs(inputs)
        mezo = _unwrapped(self.optimizer)
        pieces = self.current_gradient_accumulation_steps
        if self.objective is not None:
            loss = mezo.measure(batch=inputs, objective=lambda _, batch: self._per_row(model, batch))
            return torch.tensor(loss / pieces, device=self.args.device)
        # With the number of items, a loss is a part of the step's whole, and they add up; MeZO averages over pieces.
        is_part = getattr(self, "loss_is_scaled_for_ga", None)  # not every release has it
        if is_part is None:
            is_part = (
                self.model_accepts_loss_kwargs and num_items_in_batch is not None
            ) or self.compute_loss_func is not None

        def closure() -> Tensor:
            with self.compute_loss_context_manager():
                loss: Tensor = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
            return loss.detach().double() * (pieces if is_part else 1)

        return torch.tensor(mezo.measure(closure) / pieces, device=self.args.device)

    def _per_row(self, model: nn.Module, batch: Any) -> Tensor:
        assert self.objective is not None
        with self.compute_loss_context_manager():
            return self.objective(model, batch)


class MeZOTrainer(MeZOMixin, Trainer):  # type: ignore[misc]
    """`transformers.Trainer` with MeZO; its arguments are a `MeZOConfig`."""


def _unwrapped(optimizer: Any) -> MeZO:
    """MeZO itself; accelerate's wrapper drops what it does not know."""
    while not isinstance(optimizer, MeZO):
        optimizer = optimizer.optimizer
    return optimizer
