"""What a trajectory is made of: one `StepRecord` per step, and the `Header` that says what they belong to."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from mezo_scale.errors import TrajectoryError

UNSYNCED = 16
"""Appends of a new run that may be on their way to the disk at once."""

_MOST = 2**20  # multipliers of a record: a damaged header must not ask for all memory


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
        noise_version: see `mezo_scale.noise.Noise.version`.
        fingerprint: of the values the weights had before the first step, whatever their layout.
        manifest: per trainable parameter [name, shape, dtype, parameter group, decayed].
        num_directions, num_groups: the record's size follows from them. Directions are those of a step times the
            steps that the rule reads.
        distribution, rounding: how z is drawn and how updates are stored.
        seed, eps: the run's; a replay needs neither, going on needs both.
        frozen: fingerprint of the weights and saved buffers that are not tuned. None if they were not all in memory,
            and in trajectories from before it was written: then they are not compared.
        run_id: 128 random bits as 32 hexadecimal digits, drawn when the file is made. No two runs share records, even
            with equal settings. None in files of version 1.
        fingerprints: of what else the run was made with, by name ("data", "config", "tokenizer"), from whoever made the
            optimizer. Names that only one of two headers has are not compared.
        estimator, rule: how losses became multipliers; a replay needs neither.
        unsynced: how many appends, the last ones, may not be on the disk: all before them are.

    A field that has its default is left out of the file. Raises ValueError for types and numbers that no run could
    have.
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
    run_id: str | None = None
    fingerprints: dict[str, str] | None = None
    estimator: str = "spsa"
    rule: str = "sgd"
    unsynced: int = 1

    def __post_init__(self) -> None:
        counts = (self.num_directions, self.num_groups)
        if not all(type(count) is int and count >= 1 for count in counts) or math.prod(counts) > _MOST:
            raise ValueError(f"num_directions and num_groups are {counts}: expected 1 or more, {_MOST} multipliers")
        texts = (
            self.fingerprint,
            self.distribution,
            self.rounding,
            self.estimator,
            self.rule,
            *(() if self.frozen is None else (self.frozen,)),
            *(() if self.fingerprints is None else _texts(self.fingerprints)),
        )
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("fingerprint, frozen, distribution, rounding, estimator, rule and fingerprints are text")
        if type(self.seed) is not int or not 0 <= self.seed < 2**64:
            raise ValueError(f"seed is {self.seed!r}: expected an integer of 64 bits without sign")
        if not (isinstance(self.eps, int | float) and type(self.noise_version) is int):
            raise ValueError(f"eps is {self.eps!r}, noise_version {self.noise_version!r}: expected numbers")
        if type(self.unsynced) is not int or self.unsynced < 1:
            raise ValueError(f"unsynced is {self.unsynced!r}: expected 1 or more")
        if not isinstance(self.manifest, list) or not all(map(_is_entry, self.manifest)):
            raise ValueError("the manifest's entries are lists of name, shape, dtype, group and whether it decays")
        if self.run_id is not None and not re.fullmatch("[0-9a-f]{32}", self.run_id):
            raise ValueError(f"run_id is {self.run_id!r}: expected 32 hexadecimal digits")

    def check_same(self, other: Header, where: str) -> None:
        """Raise a TrajectoryError that says what differs, if ``other`` is not what this header was written for."""
        if self.noise_version != other.noise_version and self.distribution == other.distribution:
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
        mine, theirs = self.fingerprints or {}, other.fingerprints or {}
        others = [what for what in sorted(mine.keys() & theirs.keys()) if mine[what] != theirs[what]]
        if others:
            names = " and ".join(others)
            both = "; ".join(f"{what} has fingerprint {mine[what]}, this run's {theirs[what]}" for what in others)
            raise TrajectoryError(
                f"{where} was made with other {names} ({both}): give the {names} that it was begun with, or begin "
                "a new run"
            )
        for name in ("estimator", "rule", "num_directions", "num_groups", "distribution", "rounding", "seed", "eps"):
            value, given = getattr(self, name), getattr(other, name)
            if value != given:
                raise TrajectoryError(
                    f"{where} was written with {name} = {value}, this run has {given}: set it to {value}"
                )

    def check_manifest(self, manifest: list[list[Any]], where: str) -> None:
        """Raise a TrajectoryError that names the first parameter in which a model's manifest differs."""
        if self.manifest != manifest:
            raise TrajectoryError(f"{where} belongs to another model: {_difference(self.manifest, manifest)}")


def _texts(fingerprints: object) -> tuple[object, ...]:
    return tuple(fingerprints.values()) if isinstance(fingerprints, dict) else (None,)


def _is_entry(entry: object) -> bool:
    if not isinstance(entry, list) or len(entry) != 5:
        return False
    name, shape, dtype, group, decayed = entry
    sized = isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)
    return sized and isinstance(name, str) and isinstance(dtype, str) and type(group) is int and type(decayed) is bool


def _difference(mine: list[list[Any]], theirs: list[list[Any]]) -> str:
    """The first thing in which two manifests differ, in words."""
    for one, other in zip(mine, theirs, strict=False):
        if one != other:
            return f"it has {_entry(one)}, the model has {_entry(other)}"
    return f"it has {len(mine)} trainable parameters, the model has {len(theirs)}"


def _entry(entry: list[Any]) -> str:
    name, shape, dtype, group, decayed = entry
    return f"{name} {dtype}{shape} (group {group}{', decayed' if decayed else ''})"
