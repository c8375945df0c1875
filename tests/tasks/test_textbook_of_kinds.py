"""Steps on every kind of task, on one and two ranks, paired and one by one, against a textbook that looks at each text
alone. Clozes and what is written have tests of their own."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

import mezo_scale as ms
from mezo_scale.models.vision import ImageReader
from mezo_scale.recipe import TaskSection
from mezo_scale.tasks import Dialogue, Example, Passage, Picture, Question
from mezo_scale.tasks.kinds.candidates import Candidates
from mezo_scale.tasks.kinds.chat import Chat
from mezo_scale.tasks.kinds.generation import Generation
from mezo_scale.tasks.kinds.images import Images
from mezo_scale.tasks.kinds.modeling import Modeling
from tests.support import layouts, material, pictures, textbook
from tests.support.pool import Ranks

STEPS = 4
OPTIONS = {"lr": 1e-3, "eps": 1e-2, "weight_decay": 0.1, "num_directions": 2, "seed": 5}
PROMPTS = ("the plot is", "its cast is , as ever ,", "a remake . it was", "every scene that is here is")


@dataclass(frozen=True)
class Case:
    """A kind, the rows of a step, and what a textbook says of one of them: float64, no batch, no padding."""

    kind: Any
    rows: list[Any]
    objective: str
    loss: Callable[[nn.Module, Any], Tensor]
    build: Callable[[], nn.Module] = lambda: material.build("opt")

    def losses(self, model: nn.Module, step: int) -> Tensor:
        return torch.stack([self.loss(model, row) for row in self.step_rows(step)])

    def step_rows(self, step: int) -> list[Any]:
        return self.rows[step % 4 :] + self.rows[: step % 4]


def log_prob(model: nn.Module, prompt: Any, answer: Any) -> Tensor:
    """The mean of an answer's tokens."""
    tokens = torch.tensor([*prompt, *answer])
    logits = model(input_ids=tokens[None]).logits[0, len(prompt) - 1 : -1]
    return -F.cross_entropy(logits, tokens[len(prompt) :])


def tokenizer() -> Any:
    made = material.tokenizer()
    made.pad_token_id = 0
    return made


def choosing(answers: tuple[str, ...], objective: str) -> Case:
    kind = Candidates(tokenizer(), TaskSection(name="choice", data="d", template="{x}", max_length=64))

    def loss(model: nn.Module, row: Any) -> Tensor:
        scores = torch.stack([log_prob(model, row.prompt, candidate) for candidate in row.candidates])
        return F.cross_entropy(scores, torch.tensor(row.label)) if objective == "candidates" else -scores[row.label]

    rows = [kind.encode(Example(prompt, answers, number % 2)) for number, prompt in enumerate(PROMPTS)]
    return Case(kind, rows, objective, loss)


def writing(kind: Any, examples: list[Any]) -> Case:
    def loss(model: nn.Module, row: Any) -> Tensor:
        return -log_prob(model, row.whole[: -row.scored], row.whole[-row.scored :])

    return Case(kind, [kind.encode(example) for example in examples], "language_modeling", loss)


def answering() -> Case:
    kind = Generation(tokenizer(), TaskSection(name="squad", data="d", max_length=64))
    return writing(kind, [Question(prompt, (f" {prompt[::-1]}",)) for prompt in PROMPTS])


def chatting() -> Case:
    talking = material.chat_tokenizer()
    talking.pad_token_id = 0
    kind = Chat(talking, TaskSection(name="chat", data="d", max_length=96))
    return writing(kind, [Dialogue((("user", prompt),), f"it is {prompt}") for prompt in PROMPTS])


def reading() -> Case:
    kind = Modeling(tokenizer(), TaskSection(name="wikitext", data="d", max_length=24))
    rows = kind.encode_all([Passage(" ".join(text for text, _ in material.reviews()))])
    picked = [rows[0], rows[1], type(rows[0])(rows[2].tokens[:7]), rows[3]]
    return Case(kind, picked, "language_modeling", lambda model, row: -log_prob(model, row.tokens[:1], row.tokens[1:]))


def seeing() -> Case:
    side = {"height": pictures.SIDE, "width": pictures.SIDE}
    kind = Images(
        ImageReader(ViTImageProcessorPil(size=side), pictures.NAMES, 3), TaskSection(name="cifar10", data="d")
    )
    rows = [kind.encode(Picture(pictures.png(number, number % 3), number % 3)) for number in range(4)]

    def loss(model: nn.Module, row: Any) -> Tensor:
        logits = model(pixel_values=kind.collate([row])["pixel_values"].double()).logits[0]
        return F.cross_entropy(logits, torch.tensor(row.label))

    return Case(kind, rows, "cross_entropy", loss, pictures.build)


CASES: dict[str, Callable[[], Case]] = {
    "one token": lambda: choosing((" great", " terrible"), "candidates"),
    "several tokens": lambda: choosing((" good", " not so good , no"), "candidates"),
    "the right one": lambda: choosing((" good", " not so good , no"), "language_modeling"),
    "answers": answering,
    "chats": chatting,
    "running text": reading,
    "images": seeing,
}


def train(name: str, layout: str, paired: bool | None) -> list[list[float]]:
    case = CASES[name]()
    sharded = layouts.shard(layout, case.build())
    optimizer = ms.MeZO(sharded.model, **OPTIONS, paired=paired)
    cut = {1: [slice(0, 4)], 2: [slice(0, 3), slice(3, 4)]}[dist.get_world_size()][dist.get_rank()]
    gradients = []
    for step in range(STEPS):
        batch = case.kind.collate(case.step_rows(step)[cut], case.objective)
        optimizer.step(batch=batch, objective=case.kind.objectives[case.objective])
        assert optimizer.last_record is not None
        gradients.append(list(optimizer.last_record.projected_grads))
    assert optimizer.paired is (paired is None)
    sharded.close()
    return gradients


@pytest.mark.parametrize("name", CASES)
def test_steps_have_the_textbook_s_projected_gradients(ranks: Ranks, name: str) -> None:
    case = CASES[name]()
    expected = torch.tensor(textbook.projected_gradients(case.build(), case.losses, STEPS, **OPTIONS))
    assert expected.abs().max() > 1e-2
    for size, layout, paired in ((1, "plain", None), (1, "plain", False), (2, "plain", None), (2, "fsdp2", None)):
        for found in ranks(size, train, name=name, layout=layout, paired=paired):
            assert torch.allclose(torch.tensor(found), expected, rtol=1e-4, atol=1e-4), (size, layout, paired)
