"""A task's splits, ready for a model, and the same on every rank."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mezo_scale import tasks
from mezo_scale.collectives import gather_integers
from mezo_scale.distributed.world import World
from mezo_scale.errors import RecipeError, SharedError
from mezo_scale.models import checkpoints, heads
from mezo_scale.models.fingerprints import of_examples
from mezo_scale.models.shapes import skeleton
from mezo_scale.models.tuning import virtual_tokens
from mezo_scale.recipe import Recipe
from mezo_scale.tasks import Kind

_POSITIONS = re.compile(r"wpe|positions?_(?!bias)|_positions?|\bpos_|_pos\b")  # in names of modules and buffers


@dataclass(frozen=True)
class EncodedSplits:
    """A task's splits in a model's tokens.

    Attributes:
        examples: the digest of what was encoded.
    """

    train: Sequence[Any]
    dev: Sequence[Any]
    test: Sequence[Any]
    examples: str = field(default="", repr=False, compare=False)  # `digest` is of the tokens alone, in every log

    @classmethod
    def read(cls, recipe: Recipe, kind: Kind[Any, Any]) -> "EncodedSplits":
        """Raises RecipeError or ModelError if the data is not there or does not fit."""
        if not kind.reads_images:
            _check_positions(recipe)
        splits = tasks.load(recipe.task)
        parts = (splits.train, splits.dev, splits.test)
        train, dev, test = (kind.encode_all(part) for part in parts)
        return cls(train, dev, test, examples=of_examples(splits))

    def digest(self) -> int:
        """The first 64 bits of a SHA-256 of every token and label in order, signed."""
        return int.from_bytes(hashlib.sha256(repr(self).encode()).digest()[:8], "little", signed=True)

    def remarks(self, kind: Kind[Any, Any], recipe: Recipe, *names: str) -> list[str]:
        """Lines on what of these splits has no room: a result on them is one on less than the data."""
        where = "end" if heads.is_masked(checkpoints.find(recipe.model.name)) else "beginning"
        lines = []
        for said, is_so in (
            (f"task.max_length={recipe.task.max_length} cuts off the {where} of", kind.is_cut),
            ("task.max_new_tokens is too small for a right answer to", kind.is_overlong),
        ):
            counts = {name: sum(map(is_so, getattr(self, name))) for name in names}
            told = [f"{n:,} of {len(getattr(self, name)):,} {name} prompts" for name, n in counts.items() if n]
            lines += [f"{said} {', '.join(told)}"] if told else []
        return lines

    def check_same(self, world: World) -> None:
        """Every rank calls it: they share the steps out by number, so that number must be the same example on all.

        Raises:
            SharedError: on every rank, naming those whose splits are not rank 0's.
        """
        if others := _others(self.digest(), world):
            raise SharedError(
                f"task.data: {others} found other examples or tokens than {_name(0, world)}: give all nodes the same "
                "files of the data and the tokenizer"
            )


def check_same_reward(kind: Kind[Any, Any], world: World) -> None:
    """Every rank calls it: one step is of one function.

    Raises:
        SharedError: on every rank, naming those whose function is of another source than rank 0's.
    """
    if kind.reward is None:
        return
    if others := _others(int(kind.reward.digest, 16) >> 1, world):
        raise SharedError(
            f"train.objective: {others} found another {kind.reward.name} than {_name(0, world)}: give all nodes the "
            "same file"
        )


def prepare(recipe: Recipe) -> tuple[Recipe, Kind[Any, Any]]:
    """The recipe with its objective written out, and a cloze's template, and the kind of its task.

    Raises:
        RecipeError: there is no such task or objective, a field does not fit them, or the model does not answer such
            a prompt.
        ModelError: the tokenizer or image processor can't be read, or it has no mask token for a cloze.
    """
    config = checkpoints.find(recipe.model.name)
    posed = tasks.posed_to(recipe.task, heads.is_masked(config), heads.is_image(config))
    recipe = recipe.model_copy(update={"task": posed})
    kind = tasks.kind_of(recipe.task, checkpoints.load_processor(recipe.model.name))
    section = recipe.train.model_copy(update={"objective": tasks.objective_of(recipe, kind)})
    return recipe.model_copy(update={"train": section}), kind


def _others(digest: int, world: World) -> str:
    """The ranks whose digest is not rank 0's, in words; empty if there are none."""
    digests = gather_integers(digest)
    others = [rank for rank, found in enumerate(digests) if found != digests[0]]
    more = f" and {len(others) - 8} more" if len(others) > 8 else ""
    return ", ".join(_name(rank, world) for rank in others[:8]) + more


def _name(rank: int, world: World) -> str:
    return f"rank {rank}" + (f" on {world.ranks[rank].host}" if world.ranks else "")


def _check_positions(recipe: Recipe) -> None:
    """Raises RecipeError if a sequence could run over the end of the model's table of positions."""
    positions, taken = _table_length(checkpoints.find(recipe.model.name)), virtual_tokens(recipe.tune)
    if positions is not None and recipe.task.max_length + taken > positions:
        said = f", {taken} of them the prefix's" if taken else ""
        raise RecipeError(
            f"task.max_length is {recipe.task.max_length}, but {recipe.model.name} has {positions} positions{said}: "
            f"ask for at most task.max_length={positions - taken}"
        )


def _table_length(config: Any) -> int | None:
    """How many positions a model has a table for; None where it computes them, and running longer does not fail."""
    model = skeleton(config)
    lengths = []
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        named = _POSITIONS.search(owner.rpartition(".")[2]) or (leaf != "weight" and _POSITIONS.search(leaf))
        if named and tensor.dim() == 2 and tensor.is_floating_point() and not hasattr(module, "make_weights"):
            # Some tables begin with rows that no position takes.
            padding = getattr(module, "padding_idx", None)
            unused = getattr(module, "offset", 0) + (0 if padding is None else padding + 1)
            lengths.append(tensor.shape[0] - unused)
    return max(lengths, default=None)
