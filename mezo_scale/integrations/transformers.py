"""MeZO in Hugging Face's Trainer and its kin: the loop is theirs, and a training step is two forwards per direction.

    trainer = MeZOTrainer(model, MeZOConfig(output_dir="out", learning_rate=1e-6, eps=1e-3), train_dataset=rows)

    class Tuner(MeZOMixin, SFTTrainer): ...            # any Trainer
    @dataclass
    class TunerConfig(MeZOArguments, SFTConfig): ...   # and its arguments

Logging, evaluation, checkpoints, resuming, schedules and callbacks are the Trainer's. Several micro-batches
(``gradient_accumulation_steps``) are one step, as ranks are. Inside a step the model is in evaluation mode.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from mezo_scale.integrations import restart
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
            "help": "The run's log. If it exists, its steps are applied to the base model, and the run goes on after "
            "them."
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
        ValueError: an optimizer is given; fp16's loss scaling is on; DataParallel would run the model; DeepSpeed is not
            at stage 3, or has an optimizer or a scheduler of its own.
    """

    def __init__(self, *args: Any, objective: Objective | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.objective = objective
        self._replayed: int | None = None  # steps that the log has put into the weights, while a run is under way
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
        if objective is not None and (self.args.label_smoothing_factor or self.compute_loss_func is not None):
            raise ValueError(
                "objective is given, and label_smoothing_factor or compute_loss_func, which it does not look at: leave "
                "one of them out"
            )
        if self.args.neftune_noise_alpha is not None:
            raise ValueError("neftune_noise_alpha adds noise in training mode, in which no step is: leave it out")
        if self.is_deepspeed_enabled:
            self._check_deepspeed()
        if self.args.n_gpu > 1:
            raise ValueError(f"DataParallel would run on {self.args.n_gpu} GPUs: start with torchrun, one process each")
        self._leave_out_what_is_for_gradients()

    def _check_deepspeed(self) -> None:
        """Raises ValueError where its engine would do more than shard; lets it gather what a checkpoint holds."""
        config = self.accelerator.state.deepspeed_plugin.deepspeed_config
        stage3 = config.get("zero_optimization", {})
        if stage3.get("stage") != 3:
            raise ValueError(
                f"deepspeed's zero_optimization.stage is {stage3.get('stage', 0)}, expected 3: the lower stages shard "
                "gradients and optimizer state, of which there are none"
            )
        for name, one in (("optimizer", "an optimizer"), ("scheduler", "a scheduler")):
            if name in config:
                raise ValueError(f"deepspeed's configuration has {one}: take it out, the arguments say which")
        if config.get("fp16", {}).get("enabled") is True:
            raise ValueError("deepspeed's fp16 scales the loss for gradients, of which there are none: take bf16")
        if self.args.load_best_model_at_end:
            raise ValueError(
                "load_best_model_at_end reads a checkpoint of deepspeed's engine, which has no optimizer to save here: "
                "leave it out, and load the best checkpoint with from_pretrained"
            )
        stage3["stage3_gather_16bit_weights_on_model_save"] = True  # or a checkpoint would hold no weights

    def _leave_out_what_is_for_gradients(self) -> None:
        args: Any = self.args
        # The last two are one thing: newer releases call it by the first of the two names.
        off: dict[str, Any] = {"max_grad_norm": 0.0, "activation_checkpointing": False, "gradient_checkpointing": False}
        unasked = {entry.name: entry.default for entry in dataclasses.fields(args)}  # some trainers clip by default
        if unasked.get("gradient_checkpointing"):  # a default under the older name becomes a value under the newer
            unasked["activation_checkpointing"] = True
        off["optim"] = unasked["optim"]  # none is made of it
        found = {name: getattr(args, name) for name in off if hasattr(args, name)}
        needless = [name for name, value in found.items() if value and value not in (unasked.get(name), off[name])]
        for name in found:
            setattr(args, name, off[name])
        if needless:
            warnings.warn(f"{', '.join(needless)}: for gradients, of which there are none, so left out", stacklevel=3)

    optimizer: Any

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """MeZO on the Trainer's model; it finds out by itself when the model is sharded later.

        None as yet under DeepSpeed, whose engine would step an optimizer that it was given.
        """
        if self.optimizer is None and not self.is_deepspeed_enabled:
            self.optimizer = self._mezo(self.model if model is None else model)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The Trainer's; DeepSpeed's engine is made by now, and MeZO on what it partitioned."""
        if self.optimizer is None and optimizer is None:
            self.optimizer = self._mezo(self.model)
        return super().create_scheduler(num_training_steps, optimizer)

    def _mezo(self, model: nn.Module) -> MeZO:
        args: Any = self.args
        return MeZO(
            model,
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

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """The Trainer's; the model holds the base weights.

        With a trajectory the weights come from it, whether a checkpoint is given or not, and the run goes on after its
        last step, be that later than the checkpoint's. From the checkpoint come the Trainer's own counts and states.
        The trajectory is closed when this returns.

        Raises:
            TrajectoryError: the checkpoint is of a later step than the trajectory's last; or as `mezo_scale.MeZO` does.
            ValueError: a checkpoint is given, and no trajectory, under DeepSpeed or with FSDP's FULL_STATE_DICT; or a
                trajectory, with a schedule that follows metrics, in a search, or after this trainer has trained.
        """
        args: Any = self.args
        with ExitStack() as undo:
            if args.trajectory is not None:
                self._check_is_first(kwargs.get("trial"))
                checkpoint = restart.found(resume_from_checkpoint, args.output_dir)
                self._replayed = restart.steps_in(args.trajectory)
                self._check_schedule()
                undo.callback(self._let_go_of_the_log)
                kept = [*self.callback_handler.callbacks, self.control]
                folder = restart.at(self._replayed, args.trajectory, checkpoint, kept)
                resume_from_checkpoint = undo.enter_context(folder)
            elif resume_from_checkpoint:
                self._check_resumable()
            done = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
            mezo = _unwrapped(self.optimizer)
            mezo.check_ranks()  # no next step compares the last one
            if mezo.trajectory is not None:
                mezo.trajectory.close()
            return done

    def _check_is_first(self, trial: Any) -> None:
        if trial is not None:
            raise ValueError(
                "a search over hyperparameters has many runs, a trajectory is of one: leave out one of both"
            )
        if self.optimizer is not None:
            raise ValueError(
                "this trainer has trained already, so its model is not the base: make another, with the base model"
            )

    def _check_schedule(self) -> None:
        kind = str(getattr(self.args.lr_scheduler_type, "value", self.args.lr_scheduler_type))
        if self._replayed and kind in ("reduce_lr_on_plateau", "greedy"):
            raise ValueError(
                f"lr_scheduler_type is {kind}, which follows the metrics of the {self._replayed} steps in the "
                "trajectory, and those it does not hold: take another schedule, or resume a checkpoint without one"
            )

    def _check_resumable(self) -> None:
        if self.is_deepspeed_enabled:
            raise ValueError(
                "resume_from_checkpoint under deepspeed takes a trajectory as well, from which the weights come: set "
                "trajectory from the first step on"
            )
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if self.is_fsdp_enabled and "FULL" in str(getattr(plugin, "state_dict_type", "")):
            raise ValueError(
                "resume_from_checkpoint under fsdp: torch reads no whole state of an optimizer without tensors in it; "
                "save and resume with fsdp_config={'state_dict_type': 'SHARDED_STATE_DICT'}, or set trajectory from "
                "the first step on"
            )

    def _let_go_of_the_log(self) -> None:
        self._replayed = None
        if self.optimizer is not None and (log := _unwrapped(self.optimizer).trajectory) is not None:
            log.release()

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        """The Trainer's; what the log holds is not loaded from a checkpoint."""
        if not self._replayed:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        self.state.compute_steps(self.args, max_steps)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")  # those steps were the log's
            for _ in range(self._replayed):
                self.lr_scheduler.step()
        return prepared

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self._replayed:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """The Trainer's, which would take a step too many where a resumed run has none left."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)

    def _get_grad_norm(self, *_: Any, **__: Any) -> None:
        """There is none to log, nor to gather."""

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """The Trainer's, of steps that no power loss takes out of the trajectory any more."""
        if (log := _unwrapped(self.optimizer).trajectory) is not None:
            log.sync()
        super()._save_checkpoint(*args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """The Trainer's. DeepSpeed's engine has no optimizer to save; the trajectory holds what it takes to go on."""
        if not self.is_deepspeed_enabled:
            super()._save_optimizer_and_scheduler(output_dir)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Measure the step's branches on a micro-batch; the Trainer's ``optimizer.step()`` then applies the step."""
        model.train()
        inputs = self._prepare_inputs(inputs)
        mezo = _unwrapped(self.optimizer)
        pieces = self.current_gradient_accumulation_steps
        if self.objective is not None:
            loss = mezo.measure(batch=inputs, objective=self._of_rows(model, self.objective))
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

        with self._logged_as_training():
            return torch.tensor(mezo.measure(closure) / pieces, device=self.args.device)

    @contextmanager
    def _logged_as_training(self) -> Iterator[None]:
        """TRL's trainers keep what they measure by the model's mode, and inside a step that is evaluation."""
        kept = getattr(self, "_metrics", None)
        if not isinstance(kept, dict) or not kept.keys() >= {"train", "eval"}:
            yield
            return
        evaluated, kept["eval"] = kept["eval"], kept["train"]
        try:
            yield
        finally:
            kept["eval"] = evaluated

    def _of_rows(self, model: nn.Module, objective: Objective) -> Objective:
        """The objective on the Trainer's own model, wrapped as it is."""

        def losses(_: nn.Module, batch: Any) -> Tensor:
            with self.compute_loss_context_manager():
                return objective(model, batch)

        if (smooth := getattr(objective, "smooth", None)) is not None:
            losses.smooth = self._of_rows(model, smooth)  # type: ignore[attr-defined]
        return losses


class MeZOTrainer(MeZOMixin, Trainer):  # type: ignore[misc]
    """`transformers.Trainer` with MeZO; its arguments are a `MeZOConfig`."""


def _unwrapped(optimizer: Any) -> MeZO:
    """MeZO itself; accelerate's wrapper drops what it does not know."""
    while not isinstance(optimizer, MeZO):
        optimizer = optimizer.optimizer
    return optimizer
