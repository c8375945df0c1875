"""Tasks that choose among candidates: a prompt, the answers that may follow it, and which of them is right."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mezo_scale.errors import RecipeError
from mezo_scale.recipe import TaskSection
from mezo_scale.tasks.encoding import Batch, open_tokens, pad_left
from mezo_scale.tasks.example import Example
from mezo_scale.tasks.kinds import trees
from mezo_scale.tasks.kinds.encoded import Encoded, encode
from mezo_scale.tasks.kinds.kind import Kind, Objective, Rewarded
from mezo_scale.tasks.logits import answer_log_probs, last_logits, mask_logits
from mezo_scale.tasks.reward import Reward
from mezo_scale.tasks.score import ByClass, Metric, Score, best_of, most_frequent

_NEUTRAL = "neutral_"  # before the names of what a batch has for the neutral prompts


@dataclass(frozen=True)
class Choice:
    """The candidate with the best score, and the cross-entropy over the scores; NaN where one of them is not finite."""

    candidate: int
    loss: float


def collate(examples: Sequence[Encoded], pad_id: int, max_length: int | None = None) -> Batch:
    """One row per example, padded on the left to a multiple of 16 tokens, or to max_length if that comes first.

    Where every candidate is one token, the prompt alone is run and the next token scores them all:
        input_ids, attention_mask: int64 [rows, tokens]; candidate_ids: int64 [rows, candidates], -1 where none is.
    Otherwise each candidate is written out after the prompt:
        input_ids, attention_mask: int64 [rows, candidates, tokens]; candidate_mask: bool [rows, candidates, tokens],
        true on the candidate's own tokens, nowhere for a candidate that only fills up the row.
    Always: label: int64 [rows].
    """
    label = torch.tensor([example.label for example in examples])
    width = max(len(example.candidates) for example in examples)
    if all(len(candidate) == 1 for example in examples for candidate in example.candidates):
        input_ids, attention_mask = pad_left([example.prompt for example in examples], pad_id, max_length)
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "candidate_ids": token_ids(examples),
            "label": label,
        }
    answers: list[tuple[int, ...]] = []  # what is scored
    sequences: list[tuple[int, ...]] = []  # what is run
    for example in examples:
        missing = width - len(example.candidates)
        answers += [*example.candidates, *[()] * missing]
        sequences += [example.prompt + answer for answer in (*example.candidates, *example.candidates[:1] * missing)]
    input_ids, attention_mask = pad_left(sequences, pad_id, max_length)
    candidate_mask = torch.zeros_like(input_ids, dtype=torch.bool)
    for row, answer in enumerate(answers):
        candidate_mask[row, input_ids.shape[1] - len(answer) :] = True
    shape = (len(examples), width, -1)
    return {
        "input_ids": input_ids.view(shape),
        "attention_mask": attention_mask.view(shape),
        "candidate_mask": candidate_mask.view(shape),
        "label": label,
    }


def token_ids(examples: Sequence[Encoded]) -> Tensor:
    """Candidates of one token each, int64 [rows, candidates], -1 where there is none."""
    ids = torch.full((len(examples), max(len(example.candidates) for example in examples)), -1)
    for row, example in enumerate(examples):
        ids[row, : len(example.candidates)] = torch.tensor(example.candidates).squeeze(1)
    return ids


def candidate_scores(model: nn.Module, batch: Batch) -> Tensor:
    """The mean log-probability of each candidate's tokens, float32 [rows, candidates]; -inf where there is none."""
    if "candidate_ids" in batch:
        candidate_ids = batch["candidate_ids"]
        if "mask_at" in batch:  # of a cloze
            logits = mask_logits(model, batch["input_ids"], batch["attention_mask"], batch["mask_at"])
        else:
            logits = last_logits(model, batch["input_ids"], batch["attention_mask"], keep=1)[:, 0]
        chosen = logits.gather(1, candidate_ids.clamp(min=0)) - logits.logsumexp(1, keepdim=True)
        return chosen.masked_fill(candidate_ids < 0, float("-inf"))
    if "paths" in batch:
        return trees.scores(model, batch)
    # Each row keeps its candidates inside, so the optimizer's branches stay contiguous blocks of the model's batch dim.
    names = ("input_ids", "attention_mask", "candidate_mask")
    input_ids, attention_mask, candidate_mask = (batch[name].flatten(0, 1) for name in names)
    scores = answer_log_probs(model, input_ids, attention_mask, candidate_mask)
    return scores.view(batch["candidate_mask"].shape[:2])


def calibrated_scores(model: nn.Module, batch: Batch) -> Tensor:
    """The scores that candidates are chosen by, float32 [rows, candidates].

    They are `candidate_scores`, or where the batch has neutral prompts the log-probability of a candidate, of all its
    tokens together, minus that after the neutral prompt (Holtzman et al., 2021: domain conditional pointwise mutual
    information).
    """
    scores = candidate_scores(model, batch)
    if "unasked" not in batch:
        return scores
    unasked = {name.removeprefix(_NEUTRAL): leaf for name, leaf in batch.items() if name.startswith(_NEUTRAL)}
    lead: Tensor = (scores - candidate_scores(model, unasked)[batch["unasked"]]) * batch["lengths"]
    return lead.masked_fill(_filling(batch), float("-inf"))


def candidates_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy over the candidates' scores, float32 [rows]."""
    return F.cross_entropy(candidate_scores(model, batch), batch["label"], reduction="none")


def language_modeling_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean loss over the right candidate's tokens, float32 [rows]."""
    return -candidate_scores(model, batch).gather(1, batch["label"][:, None])[:, 0]


def accuracy_loss(model: nn.Module, batch: Batch) -> Tensor:
    """0 where the candidate with the best score is right, else 1; NaN where a score is not finite. float32 [rows].

    Args:
        batch: with `right`, bool [rows, candidates].
    """
    scores = candidate_scores(model, batch)
    right = batch["right"].gather(1, scores.argmax(1, keepdim=True))[:, 0]
    losses: Tensor = (1 - right.float()).masked_fill(~_sound(scores, batch), math.nan)
    return losses


accuracy_loss.smooth = candidates_loss  # type: ignore[attr-defined]

OBJECTIVES: dict[str, Objective] = {
    "candidates": candidates_loss,
    "language_modeling": language_modeling_loss,
    "accuracy": accuracy_loss,
}


class Candidates(Kind[Encoded, Choice]):
    """A choice among candidates: the one whose tokens have the best mean log-probability; graded by accuracy."""

    metrics = ("accuracy", "macro_f1", "balanced_accuracy")
    calibrates = True
    sharing: trees.Sharing

    def __init__(self, tokenizer: Any, section: TaskSection) -> None:
        """Raises RecipeError for fields that this kind does not take."""
        for name, value in (("max_new_tokens", section.max_new_tokens), ("temperature", section.temperature or None)):
            if value is not None:
                raise RecipeError(
                    f"task.{name} is {value}, but task.name is {section.name}, whose answers are chosen, not written: "
                    "leave it out"
                )
        if section.metric in self.metrics[1:] and section.candidates is None:
            raise RecipeError(
                f"task.metric is {section.metric}, which needs classes that all rows share: give task.candidates, or "
                "leave it out"
            )
        self._tokenizer, self._max_length = tokenizer, section.max_length
        self._calibrate = section.calibrate
        self._main, self._classes = section.metric, len(section.candidates or ())
        self.objectives = dict(OBJECTIVES)
        self.sharing = trees.Sharing(2 * section.max_length)

    def encode(self, example: Example) -> Encoded:
        row = encode(example, self._tokenizer, self._max_length)
        if not self._calibrate:
            return row
        neutral = self._neutral(example, row)
        return replace(row, neutral=neutral.prompt, cut=row.cut or neutral.cut)

    def is_cut(self, row: Encoded) -> bool:
        return row.cut

    def length(self, row: Encoded) -> int:
        return row.length

    def cost(self, row: Encoded) -> int:
        return self.sharing.width(row) if self.sharing.covers([row]) else row.length

    def scored(self, row: Encoded) -> list[tuple[int, ...]]:
        return list(row.candidates)

    def collate(self, rows: Sequence[Encoded], objective: str | None = None, max_length: int | None = None) -> Batch:
        """As `collate`, or for `predict` as `trees.collate` where `sharing` covers the rows; for other objectives than
        the losses also `right`, bool [rows, candidates], and for a reward `asked` and `texts`, those of the candidates.
        """
        # A step keeps the plain way: what was measured before it would decide its last bits, and a run that goes on has
        # measured other rows.
        share = objective is None and max_length is None
        if objective == "language_modeling":
            rows = [row.gold for row in rows]
        batch = self._scored(rows, max_length, share=share)
        if self._calibrate and objective is None:
            unasked = list(dict.fromkeys(row.unasked for row in rows))
            batch |= {_NEUTRAL + name: leaf for name, leaf in self._scored(unasked, max_length, share=share).items()}
            batch["unasked"] = torch.tensor([unasked.index(row.unasked) for row in rows])
            width = max(len(row.candidates) for row in rows)
            lengths = [list(map(len, row.candidates)) for row in rows]
            batch["lengths"] = torch.tensor([one + [0] * (width - len(one)) for one in lengths])
        if objective in ("candidates", "language_modeling"):
            return batch
        width = max(len(row.candidates) for row in rows)
        batch["right"] = torch.tensor([[row.is_right(number) for number in range(width)] for row in rows])
        if self.reward is not None:
            batch["asked"] = [row.asked for row in rows]
            batch["texts"] = [tuple(map(row.text, range(len(row.candidates)))) for row in rows]
        return batch

    def shared(self, rows: Sequence[Encoded], at_least: int = 0) -> Batch:
        return trees.collate(rows, self._tokenizer.pad_token_id, self.sharing.widest, at_least)

    def _scored(self, rows: Sequence[Encoded], max_length: int | None, *, share: bool) -> Batch:
        if share and self.sharing.covers(rows):
            return self.shared(rows)
        return self._tensors(rows, max_length or self._max_length)

    def _tensors(self, rows: Sequence[Encoded], max_length: int) -> Batch:
        return collate(rows, self._tokenizer.pad_token_id, max_length)

    def predict(self, model: nn.Module, batch: Batch) -> list[Choice]:
        scores, label = calibrated_scores(model, batch), batch["label"]
        losses = F.cross_entropy(scores, label, reduction="none").double()
        losses = losses.masked_fill(~_sound(scores, batch), math.nan)
        return [Choice(*row) for row in zip(scores.argmax(1).tolist(), losses.tolist(), strict=True)]

    def score(self, predictions: Sequence[Choice], rows: Sequence[Encoded]) -> Score:
        chosen = [found.candidate if math.isfinite(found.loss) else None for found in predictions]
        losses = Metric.of([found.loss for found in predictions], bounded=False)
        graded = self._graded(chosen, rows)
        return Score({**graded.metrics, "loss": losses}, graded.main)

    def learn_from(self, reward: Reward) -> bool:
        self.reward = reward
        self.objectives[reward.name] = Rewarded(reward, self._texts, candidates_loss)
        return True

    def log_probs(self, model: nn.Module, batch: Batch) -> Tensor:
        return candidate_scores(model, batch)

    def baselines(self, train: Sequence[Encoded], test: Sequence[Encoded]) -> dict[str, Score]:
        """What always answering with the train split's most frequent label gives: the best of several."""
        labels = most_frequent([row.label for row in train])
        each = [[label if label < len(row.candidates) else None for row in test] for label in labels]
        return {"majority": best_of([self._graded(chosen, test) for chosen in each])}

    def _neutral(self, example: Example, row: Encoded) -> Encoded:
        """The neutral prompt in tokens. Raises RecipeError if there is none, or candidates are others after it."""
        if example.neutral is None:
            raise RecipeError(
                "task.calibrate is true, but the task's examples have no neutral prompt, expected Example.neutral of "
                "each: leave it out, or give them one"
            )
        what = f"task.calibrate: the neutral prompt {example.neutral!r:.60}"
        if not open_tokens(self._tokenizer, example.neutral)[0]:
            raise RecipeError(f"{what} has no tokens, expected at least one: give another in task.neutral_prompt")
        found = encode(replace(example, prompt=example.neutral), self._tokenizer, self._max_length)
        if found.candidates != row.candidates:
            raise RecipeError(
                f"{what} is joined with {example.candidates[0]!r:.40} in another way than {example.prompt[-60:]!r} is: "
                "end task.neutral_prompt as prompts end"
            )
        return found

    def _texts(self, model: nn.Module, batch: Batch) -> list[str | None]:
        """The text of each row's best candidate; None where a score is not finite."""
        return [
            texts[found.candidate] if math.isfinite(found.loss) else None
            for found, texts in zip(self.predict(model, batch), batch["texts"], strict=True)
        ]

    def _graded(self, chosen: Sequence[int | None], rows: Sequence[Encoded]) -> Score:
        """What these candidates are worth; None where none could be chosen."""
        pairs = list(zip(chosen, rows, strict=True))
        right = [math.nan if found is None else float(row.is_right(found)) for found, row in pairs]
        metrics: dict[str, Metric | ByClass] = {"accuracy": Metric.of(right)}
        if self._main in ("macro_f1", "balanced_accuracy"):
            metrics[self._main] = ByClass.of(self._main, chosen, [row.label for row in rows], self._classes)
        if self.reward is not None:
            texts = [None if found is None else row.text(found) for found, row in pairs]
            scores = self.reward.of(texts, [row.asked for row in rows])
            metrics["reward"] = Metric.of(scores, bounded=False, more_is_better=True)
        return Score(metrics, self._main or ("accuracy" if self.reward is None else "reward"))


def _sound(scores: Tensor, batch: Batch) -> Tensor:
    """Whether all scores of a row are finite, but those of candidates that only fill it up: bool [rows]."""
    sound: Tensor = (scores.isfinite() | _filling(batch)).all(1)
    return sound


def _filling(batch: Batch) -> Tensor:
    """Which candidates only fill up a row, bool [rows, candidates]: their scores are -inf by right."""
    if "candidate_ids" in batch:
        filling: Tensor = batch["candidate_ids"] < 0
        return filling
    if "paths" in batch:
        lacking: Tensor = ~batch["paths"].any(3).any(1)
        return lacking
    missing: Tensor = ~batch["candidate_mask"].any(-1)
    return missing
