"""What a trajectory is made of: one `StepRecord` per step, and the `Header` that says what they belong to."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from mezo_scale.errors import TrajectoryError


@dataclass(frozen=True, slots=True)
class StepRecord:
    """The second waist: all that one step was, in scalars.

    Attributes:
        step: counted from 0.
        seeds: one per direction; those that the step measured, then those of earlier steps that its rule reads.
        projected_grads: the slope along each direction, as measured; not finite if a loss was not.
        alphas: the float32 multipliers of z, direction by direction; with several parameter groups group by group.
        decays: the float32 multiplier of the weights, one per parameter group.
        loss: mean over all branches.
        unread: positions in the manifest of parameters that nothing had read so far: neither perturbed nor updated.
    """

    step: int
    seeds: tuple[int, ...]
    projected_grads: tuple[float, ...]
    alphas: tuple[float, ...]
    decays: tuple[float, ...]
    loss: float
    unread: tuple[int, ...] = ()

    @property
    def decay(self) -> float:
        """The first parameter group's multiplier of the weights."""
        return self.decays[0]

    @property
    def skipped(self) -> bool:
        """Whether something in the step is not finite, so that it writes nothing."""
        return not all(math.isfinite(v) for v in (self.loss, *self.projected_grads, *self.alphas, *self.decays))

    def alphas_of(self, group: int) -> tuple[float, ...]:
        """The multipliers of one parameter group's directions."""
        count = len(self.seeds)
        return self.alphas[group * count : (group + 1) * count]


@dataclass(frozen=True, slots=True)
class Header:
    """What a trajectory belongs to: refused for any other model, noise or arithmetic.

    Attributes:
        noise_version: see `mezo_scale.noise.VERSION`.
        fingerprint: of the values the weights had before the first step, whatever their layout.
        manifest: per trainable parameter [name, shape, dtype, parameter group, decayed].
        num_directions, num_groups: the record's size follows from them. Directions are those of a step times the
            steps that the rule reads.
        distribution, rounding: how z is drawn and how updates are stored.
        seed, eps: the run's; a replay needs neither, going on needs both.
        frozen: fingerprint of the weights and saved buffers that are not tuned. None if they were not all in memory,
            and in trajectories from before it was written: then they are not compared.
        estimator, rule: how losses became multipliers; a replay needs neither. In the file only where they are others.
    """

    noise_version: int
    fingerprint: str
    manifest: list[list[Any]]
    num_directions: int
    num_groups: int
    distribution: str
    rounding: str
    seed: int
    eps: float
    frozen: str | None = None
    estimator: str = "spsa"
    rule: str = "sgd"

    def check_same(self, other: Header, where: str) -> None:
        """Raise a TrajectoryError that says what differs, if ``other`` is not what this header was written for."""
        if self.noise_version != other.noise_version:
            raise TrajectoryError(
                f"{where} was made with noise version {self.noise_version}, this is version {other.noise_version}: "
                "use the mezo-scale release that wrote it"
            )
        self.check_manifest(other.manifest, where)
        if self.fingerprint != other.fingerprint:
            raise TrajectoryError(
                f"{where} starts from other weights (fingerprint {self.fingerprint}, these have {other.fingerprint}): "
                "give the base model it was trained from, loaded in the same dtype"
            )
        if None not in (self.frozen, other.frozen) and self.frozen != other.frozen:
            raise TrajectoryError(
                f"{where} was made on other frozen weights (fingerprint {self.frozen}, these have {other.frozen}): "
                "give the base model that it was trained on, loaded in the same dtype"
            )
        for name in ("estimator", "rule", "num_directions", "num_groups", "distribution", "rounding", "seed", "eps"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise TrajectoryError(
                    f"{where} was written with {name} = {mine}, this run has {theirs}: set it to {mine}"
                )

    def check_manifest(self, manifest: list[list[Any]], where: str) -> None:
        """Raise a TrajectoryError that names the first parameter in which a model's manifest differs."""
        if self.manifest != manifest:
            raise TrajectoryError(f"{where} belongs to another model: {_difference(self.manifest, manifest)}")


def _difference(mine: list[list[Any]], theirs: list[list[Any]]) -> str:
    """The first thing in which two manifests differ, in words."""
    for one, other in zip(mine, theirs, strict=False):
        if one != other:
            return f"it has {_entry(one)}, the model has {_entry(other)}"
    return f"it has {len(mine)} trainable parameters, the model has {len(theirs)}"


def _entry(entry: list[Any]) -> str:
    name, shape, dtype, group, decayed = entry
    return f"{name} {dtype}{shape} (group {group}{', decayed' if decayed else ''})"
