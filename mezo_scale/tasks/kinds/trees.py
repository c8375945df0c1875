"""Candidates as branches of a tree behind their prompt, which is so run once for all of them.

A tree is one sequence of tokens: the prompt, then what the candidates go on with, where a beginning that several of
them share stands once. Each token attends to itself and to those between it and the beginning of the prompt along its
own branch, and its position is the one that it has in its candidate's own sequence. So a model that computes positions
and attention from what it is told gives each candidate the numbers that it gives it alone. Whether a model does is
measured.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from mezo_scale.tasks.encoding import WIDTH, Batch
from mezo_scale.tasks.kinds.encoded import Encoded
from mezo_scale.tasks.logits import tree_logits


@dataclass(frozen=True)
class Tree:
    """Some of a row's candidates, behind its prompt.

    Attributes:
        tokens: what stands behind the prompt.
        before: for each of them the number of the one before it in its branch, which is smaller; -1: the prompt's
            last one.
        paths: for each candidate, by its number in the row, the numbers of its tokens.
    """

    tokens: tuple[int, ...]
    before: tuple[int, ...]
    paths: Mapping[int, tuple[int, ...]]


def grow(candidates: Sequence[Sequence[int]], room: int) -> list[Tree]:
    """The candidates in their order, in trees of at most `room` tokens behind the prompt; one that is longer has a tree
    of its own."""
    trees: list[Tree] = []
    places: dict[tuple[int, int], int] = {}  # (number of the token before, token) -> its own number
    paths: dict[int, tuple[int, ...]] = {}
    for number, candidate in enumerate(candidates):
        if paths and len(places) + _added(candidate, places) > room:
            trees.append(_tree(places, paths))
            places, paths = {}, {}
        at, path = -1, []
        for token in candidate:
            at = places.setdefault((at, token), len(places))
            path.append(at)
        paths[number] = tuple(path)
    return [*trees, _tree(places, paths)]


def _added(candidate: Sequence[int], places: Mapping[tuple[int, int], int]) -> int:
    """The tokens by which a tree would grow."""
    at = -1
    for shared, token in enumerate(candidate):
        if (at, token) not in places:
            return len(candidate) - shared
        at = places[at, token]
    return 0


def _tree(places: Mapping[tuple[int, int], int], paths: Mapping[int, tuple[int, ...]]) -> Tree:
    return Tree(tuple(token for _, token in places), tuple(before for before, _ in places), paths)


def collate(rows: Sequence[Encoded], pad_id: int, widest: int, at_least: int = 0) -> Batch:
    """One row per example, each with its trees, padded on the left to a multiple of 16 tokens, at least to `at_least`.

        input_ids, position_ids: int64 [rows, trees, tokens]
        attends: bool [rows, trees, tokens, tokens], [.., q, k]: whether q attends to k. Padding attends to itself.
        before: int64 [rows, trees, places]: for each of the last `places` tokens of a tree the one before it in its
            branch, counted among the last `places` + 1
        paths: bool [rows, trees, candidates, places]: which of these tokens are whose; nobody's in a tree that only
            fills up a row
        label: int64 [rows]

    Args:
        widest: tokens of a tree at most, its prompt among them, unless one candidate alone takes more.
    """
    grown = [grow(row.candidates, widest - len(row.prompt)) for row in rows]
    count = max(map(len, grown))
    candidates = max(len(row.candidates) for row in rows)
    places = max(len(tree.tokens) for trees in grown for tree in trees)
    longest = max(len(row.prompt) + len(tree.tokens) for row, trees in zip(rows, grown, strict=True) for tree in trees)
    width = -(-max(longest, at_least) // WIDTH) * WIDTH
    input_ids = np.full((len(rows), count, width), pad_id)
    position_ids = np.zeros_like(input_ids)
    attends = np.broadcast_to(np.eye(width, dtype=bool), (*input_ids.shape, width)).copy()
    before = np.zeros((len(rows), count, places), dtype=int)
    paths = np.zeros((len(rows), count, candidates, places), dtype=bool)
    for n, (row, trees) in enumerate(zip(rows, grown, strict=True)):
        prompt = len(row.prompt)
        for m in range(count):
            tree = trees[m] if m < len(trees) else trees[0]
            size = len(tree.tokens)
            start, behind = width - size - prompt, width - size
            ancestry, depths = _ancestry(tree)
            input_ids[n, m, start:] = (*row.prompt, *tree.tokens)
            position_ids[n, m, start:] = (*range(prompt), *(prompt + depths))
            attends[n, m, start:behind, start:behind] = np.tri(prompt, dtype=bool)
            attends[n, m, behind:, start:behind] = True
            attends[n, m, behind:, behind:] = ancestry
            before[n, m, places - size :] = np.array(tree.before, dtype=int) + places - size + 1
            for number, path in (tree.paths if m < len(trees) else {}).items():
                paths[n, m, number, np.array(path, dtype=int) + places - size] = True
    return {
        "input_ids": torch.from_numpy(input_ids),
        "position_ids": torch.from_numpy(position_ids),
        "attends": torch.from_numpy(attends),
        "before": torch.from_numpy(before),
        "paths": torch.from_numpy(paths),
        "label": torch.tensor([row.label for row in rows]),
    }


def _ancestry(tree: Tree) -> tuple[np.ndarray, np.ndarray]:
    """(bool [tokens, tokens], which are on the way from each to the prompt, itself among them; int [tokens], how many
    are before it there)."""
    size = len(tree.tokens)
    found = np.eye(size, dtype=bool)
    for number, before in enumerate(tree.before):
        if before >= 0:
            found[number] |= found[before]
    return found, found.sum(1) - 1


def scores(model: nn.Module, batch: Batch) -> Tensor:
    """The mean log-probability of each candidate's tokens, float32 [rows, candidates]; -inf where there is none.

    Args:
        batch: as `collate` makes it.
    """
    names = ("input_ids", "position_ids", "attends", "before")
    input_ids, position_ids, attends, before = (batch[name].flatten(0, 1) for name in names)
    paths: Tensor = batch["paths"]
    log_probs = tree_logits(model, input_ids, position_ids, attends, keep=before.shape[1] + 1).log_softmax(2)
    sequence = torch.arange(len(before), device=before.device)[:, None]
    tokens = input_ids[:, -before.shape[1] :]
    found = log_probs[sequence, before, tokens]
    summed = found.view(*paths.shape[:2], 1, -1).masked_fill(~paths, 0).sum((1, 3))
    lengths = paths.sum((1, 3))
    return (summed / lengths).masked_fill(lengths == 0, float("-inf"))


class Sharing:
    """Which rows are run as trees: those no longer and no wider than such as a model gave the same numbers for.

    What a model makes of a tree may depend on its size alone: a window that attention does not reach beyond, or a table
    of positions that ends.
    """

    def __init__(self, widest: int) -> None:
        """`widest`: tokens of a tree at most."""
        self.widest = widest
        self.refused = False
        self._length = self._width = 0

    def width(self, row: Encoded) -> int:
        """Tokens of a row's widest tree, at most."""
        return max(row.length, min(len(row.prompt) + sum(map(len, row.candidates)), self.widest))

    def covers(self, rows: Sequence[Encoded]) -> bool:
        """Whether these rows are run as trees."""
        if not any(map(_shares, rows)):
            return False
        return all(row.length <= self._length and self.width(row) <= self._width for row in rows)

    def unmeasured(self, rows: Sequence[Encoded]) -> list[Encoded]:
        """Rows to compare before these are run as trees, which tell the most; none if nothing is to be measured."""
        sharing = [row for row in rows if _shares(row)]
        if self.refused or not sharing:
            return []
        longest, widest = max(rows, key=lambda row: row.length), max(rows, key=self.width)
        if longest.length <= self._length and self.width(widest) <= self._width:
            return []
        chosen = [longest, max(sharing, key=lambda row: row.length), max(sharing, key=self.width)]
        return list({id(row): row for row in chosen}.values())

    def settle(self, rows: Sequence[Encoded], *, same: bool) -> None:
        """Notes what was found: whether a model gives rows like the longest and the widest of these the same numbers,
        compared in trees as wide as the widest."""
        self.refused = not same
        self._length = max(self._length, *(row.length for row in rows)) if same else 0
        self._width = max(self._width, *map(self.width, rows)) if same else 0


def _shares(row: Encoded) -> bool:
    """Whether a prompt is run more than once where each candidate has it for itself."""
    return len(row.candidates) > 1 and any(len(candidate) > 1 for candidate in row.candidates)
