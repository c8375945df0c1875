"""Tasks whose answer is written: a prompt, and the texts that are right after it."""

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mezo_scale.errors import RecipeError
from mezo_scale.recipe import TaskSection
from mezo_scale.tasks.encoding import Batch, common_prefix, open_tokens, pad_left, shorten
from mezo_scale.tasks.example import Question
from mezo_scale.tasks.kinds.decoding import greedy, reads_ahead, sampling
from mezo_scale.tasks.kinds.kind import Kind, Objective, Rewarded
from mezo_scale.tasks.logits import answer_log_probs
from mezo_scale.tasks.reward import Asked, Reward
from mezo_scale.tasks.score import Metric, Score

MAX_NEW_TOKENS = 16
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class EncodedQuestion:
    """A question in tokens.

    Attributes:
        prompt: what the model writes on after.
        whole: the prompt, the first right answer and the end of its line, as the tokenizer writes all in one.
        scored: tokens at the end of `whole` that are not the prompt's.
        answers: all texts that are right.
        text: the prompt, before anything of it was cut off. Digests are taken of the tokens.
        cut: whether anything was.
        overlong: whether every right answer has more tokens than are written.
    """

    prompt: tuple[int, ...]
    whole: tuple[int, ...]
    scored: int
    answers: tuple[str, ...]
    text: str = field(default="", repr=False)
    cut: bool = field(default=False, repr=False, compare=False)
    overlong: bool = field(default=False, repr=False, compare=False)

    @property
    def asked(self) -> Asked:
        """For a reward."""
        return self.text, tuple(answer.strip() for answer in self.answers)


class Generation(Kind[EncodedQuestion, str | None]):
    """An answer written greedily, up to the end of its line; graded by F1 and exact match with the best right answer.

    Objectives: language_modeling, the mean loss on the tokens of the first right answer and the end of its line; f1 and
    exact_match, 1 minus the score of what the model writes.
    """

    metrics = ("f1", "exact_match")
    _end = "\n"  # is learned with an answer, and ends what is written

    def __init__(self, tokenizer: Any, section: TaskSection) -> None:
        """Raises RecipeError for fields that this kind does not take."""
        if section.candidates is not None:
            raise RecipeError(
                f"task.candidates is given, but task.name is {section.name}, whose answers are written, not chosen: "
                "leave it out"
            )
        self._tokenizer, self._max_length = tokenizer, section.max_length
        self._max_new_tokens = MAX_NEW_TOKENS if section.max_new_tokens is None else section.max_new_tokens
        self._temperature = section.temperature
        self._ending: dict[int, bool] = {}
        self._main = section.metric
        if self._max_length - self._max_new_tokens < 2:
            raise RecipeError(
                f"task.max_new_tokens is {self._max_new_tokens}, which leaves no room for a prompt in task.max_length "
                f"({self._max_length}): expected at most {self._max_length - 2}"
            )
        self.objectives: dict[str, Objective] = {
            "language_modeling": lambda model, batch: -self.log_probs(model, batch),
            "f1": Written(self, f1),
            "exact_match": Written(self, exact_match),
        }

    def encode(self, example: Question) -> EncodedQuestion:
        """Tokenizes a question. A long prompt loses its beginning (but not a BOS token), never its end.

        Raises:
            RecipeError: there is no answer, it adds no tokens, or there is no room for it.
        """
        if not example.answers:
            raise RecipeError(f"task.data: the prompt {example.prompt!r:.60} has no answer, expected at least one")
        answer = example.answers[0]
        prompt, lead = self._open(example.prompt)
        if not prompt or self._open(example.prompt + answer)[0] == prompt:
            raise RecipeError(
                f"task.data: the prompt {example.prompt!r:.60} or its answer {answer!r:.60} has no tokens of its own "
                "to this model: leave the row out, or change task.template"
            )
        whole, _ = self._open(f"{example.prompt}{answer}{self._end}")
        # Where the tokenizer joins the end of the prompt with the answer, what it joins counts as the answer's.
        shared = min(common_prefix([prompt, whole]), len(whole) - 1)
        scored = len(whole) - shared
        room = self._max_length - max(self._max_new_tokens, scored)
        if room < 2 or shared < 1:
            raise RecipeError(
                f"task.data: the answer {answer!r:.60} has {scored} tokens, which leaves no room for its prompt in "
                f"task.max_length ({self._max_length}): ask for more, or leave the row out"
            )
        start = shorten(whole[:shared], room, lead, self._tokenizer)
        # White space at the prompt's end that belongs to the answer's first token is not learned as a token of its own.
        if not self._tokenizer.decode(prompt[shared:], skip_special_tokens=True).strip():
            prompt = prompt[:shared]
        asked = shorten(prompt, self._max_length - self._max_new_tokens, lead, self._tokenizer)
        cut = len(start) < shared or len(asked) < len(prompt)
        lengths = (len(self._open(example.prompt + right)[0]) - len(prompt) for right in example.answers)
        overlong = all(length > self._max_new_tokens for length in lengths)
        texts = tuple(asked), (*start, *whole[shared:])
        return EncodedQuestion(*texts, scored, example.answers, example.prompt, cut, overlong)

    def is_cut(self, row: EncodedQuestion) -> bool:
        return row.cut

    def is_overlong(self, row: EncodedQuestion) -> bool:
        return row.overlong

    def length(self, row: EncodedQuestion) -> int:
        return len(row.prompt)

    def scored(self, row: EncodedQuestion) -> list[tuple[int, ...]]:
        return [row.whole[-row.scored :]]

    def collate(
        self, rows: Sequence[EncodedQuestion], objective: str | None = None, max_length: int | None = None
    ) -> Batch:
        """Prompts as input_ids and attention_mask, int64 [rows, tokens]; prompts with their answers as whole_ids and
        whole_mask, int64 [rows, tokens], and scored, bool, true on the answers; answers, each row's right texts; asked,
        for a reward."""
        longest = self._max_length if max_length is None else max_length
        pad_id = self._tokenizer.pad_token_id
        batch: Batch = {"answers": [row.answers for row in rows]}
        if objective != "language_modeling":
            batch["asked"] = [row.asked for row in rows]
            prompts = [row.prompt for row in rows]
            batch["input_ids"], batch["attention_mask"] = pad_left(prompts, pad_id, longest - self._max_new_tokens)
        whole_ids, whole_mask = pad_left([row.whole for row in rows], pad_id, longest)
        lengths = torch.tensor([row.scored for row in rows])
        scored = torch.arange(whole_ids.shape[1]) >= whole_ids.shape[1] - lengths[:, None]
        return {**batch, "whole_ids": whole_ids, "whole_mask": whole_mask, "scored": scored}

    def predict(self, model: nn.Module, batch: Batch) -> list[str | None]:
        """The text that each prompt is continued by; None where the model's logits are not finite. Sampled where the
        task has a temperature and the batch "seeds", one per row; else the likeliest token every time."""
        seeds = batch.get("seeds") if self._temperature else None
        weigh = None if seeds is None else sampling(seeds, self._temperature)
        found = greedy(model, batch["input_ids"], batch["attention_mask"], self._max_new_tokens, self._ends, weigh)
        return [
            self._text(tokens) if finite else None for tokens, finite in zip(found.tokens, found.finite, strict=True)
        ]

    def score(self, predictions: Sequence[str | None], rows: Sequence[EncodedQuestion]) -> Score:
        answers = [row.answers for row in rows]
        metrics = {"f1": Metric.of(best(f1, predictions, answers))}
        metrics["exact_match"] = Metric.of(best(exact_match, predictions, answers))
        if self.reward is not None:
            scores = self.reward.of(predictions, [row.asked for row in rows])
            metrics["reward"] = Metric.of(scores, bounded=False, more_is_better=True)
        return Score(metrics, self._main or ("f1" if self.reward is None else "reward"))

    def learn_from(self, reward: Reward) -> bool:
        self.reward = reward
        self.objectives[reward.name] = Rewarded(reward, self.predict, self.log_probs)
        return True

    def log_probs(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean log-probability of the first right answer's tokens, float32 [rows]."""
        return answer_log_probs(model, batch["whole_ids"], batch["whole_mask"], batch["scored"])

    def refusal(self, model: nn.Module, batch: Batch) -> str | None:
        if reads_ahead(model, batch["whole_ids"]):
            return "reads the tokens after a position, as masked language models do, and can't write an answer"
        return None

    def _open(self, text: str) -> tuple[list[int], int]:
        """A text's tokens, and how many of them the tokenizer puts before it."""
        return open_tokens(self._tokenizer, text)

    def _ends(self, token: int) -> bool:
        """Whether an answer is over at this token: the end of the text, or of the line."""
        if token not in self._ending:
            self._ending[token] = token == self._tokenizer.eos_token_id or "\n" in self._tokenizer.decode([token])
        return self._ending[token]

    def _text(self, tokens: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text.partition("\n")[0].strip()  # several tokens may make one line's end


class Written:
    """The objective that is 1 minus the grade of what the model writes; NaN where its logits are not finite."""

    def __init__(self, kind: Generation, grade: Callable[[str, str], float]) -> None:
        self._kind, self._grade = kind, grade
        self.smooth = kind.log_probs

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        grades = best(self._grade, self._kind.predict(model, batch), batch["answers"])
        return 1 - torch.tensor(grades, dtype=torch.float32, device=batch["input_ids"].device)


def best(
    grade: Callable[[str, str], float], predictions: Sequence[str | None], answers: Sequence[Sequence[str]]
) -> list[float]:
    """Each prediction's grade by the right answer that is kindest to it; NaN where there is no prediction."""
    return [
        math.nan if found is None else max(grade(found, answer) for answer in right)
        for found, right in zip(predictions, answers, strict=True)
    ]


def exact_match(found: str, answer: str) -> float:
    """1 if the texts are the same once `normalised`, else 0."""
    return float(_compared(found) == _compared(answer))


def f1(found: str, answer: str) -> float:
    """Harmonic mean of precision and recall of the words of the texts, once `normalised` (Rajpurkar et al., 2016)."""
    mine, right = _compared(found).split(), _compared(answer).split()
    if not mine or not right:
        return float(mine == right)
    common = sum((Counter(mine) & Counter(right)).values())
    return 2 * common / (len(mine) + len(right))


def _compared(text: str) -> str:
    """`normalised`; a text of which that leaves nothing ("+", "A") as it is, lest it be the same as none at all."""
    return normalised(text) or " ".join(text.lower().split())


def normalised(text: str) -> str:
    """A text as SQuAD compares it: lower case, without punctuation and articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())
