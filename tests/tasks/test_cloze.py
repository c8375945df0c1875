"""Cloze questions: what is run and scored, that padding says nothing, what is cut, and what is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

import mezo_scale as ms
from mezo_scale import tasks
from mezo_scale.errors import ModelError, RecipeError
from mezo_scale.recipe import TaskSection
from mezo_scale.tasks.example import Cloze
from mezo_scale.tasks.kinds.candidates import candidate_scores
from mezo_scale.tasks.kinds.cloze import ClozeChoice, EncodedCloze
from mezo_scale.tasks.logits import mask_logits
from tests.support import masked, material, textbook

WORDS = (" terrible", " great")
TEXTS = ("the plot is dull", "its cast is a joy and every scene is moving", "a mess", "this film is superb")
OPTIONS = {"lr": 1e-3, "eps": 1e-2, "weight_decay": 0.1, "num_directions": 2, "seed": 5}
STEPS = 6


def kind(name: str, **fields: Any) -> ClozeChoice:
    section = TaskSection(name="sst2", data="d", template="{sentence} It was {mask}.", **fields)
    made = tasks.kind_of(section, masked.TOKENIZERS[name]())
    assert isinstance(made, ClozeChoice)
    return made


def cloze(text: str, label: int = 0, candidates: tuple[str, ...] = WORDS, after: str = ".", more: str = "") -> Cloze:
    before = ((text, True), (" It was ", False))
    behind = ((after, False), *(((more, True),) if more else ()))
    return Cloze(f"{text} It was {{mask}}{after}{more}", candidates, label, before=before, after=behind)


def rows(made: ClozeChoice) -> list[EncodedCloze]:
    return [made.encode(cloze(text, number % 2)) for number, text in enumerate(TEXTS)]


@pytest.mark.parametrize(
    ("name", "tokens", "words"),
    [
        ("roberta", ["<s>", "a", "Ġmess", "ĠIt", "Ġwas", "<mask>", ".", "</s>"], ["Ġterrible", "Ġgreat"]),
        ("bert", ["[CLS]", "a", "mess", "it", "was", "[MASK]", ".", "[SEP]"], ["terrible", "great"]),
    ],
)
@pytest.mark.parametrize("candidates", [WORDS, ("terrible", "great")])
def test_the_mask_stands_for_one_token_of_the_text_as_the_tokenizer_writes_it(
    name: str, tokens: list[str], words: list[str], candidates: tuple[str, ...]
) -> None:
    made, tokenizer = kind(name), masked.TOKENIZERS[name]()
    row = made.encode(cloze("a mess", candidates=candidates))
    assert tokenizer.convert_ids_to_tokens(list(row.with_mask(tokenizer.mask_token_id))) == tokens
    assert [tokenizer.convert_ids_to_tokens(list(scored)) for scored in made.scored(row)] == [[word] for word in words]
    assert made.length(row) == len(tokens)
    assert repr(row) != repr(made.encode(cloze("a mess", candidates=candidates, after="?")))


@pytest.mark.parametrize(("name", "first"), [("roberta", "ĠHuman"), ("bert", "human")])
def test_a_word_at_the_beginning_keeps_the_space_that_it_is_given(name: str, first: str) -> None:
    example = Cloze("{mask}: a mess", (" Human", " Number"), 0, before=(), after=((": ", False), ("a mess", True)))
    made, tokenizer = kind(name), masked.TOKENIZERS[name]()
    row = made.encode(example)
    assert len(row.prompt) == 1
    assert tokenizer.convert_ids_to_tokens(list(row.candidates[0])) == [first]


@pytest.mark.parametrize("name", masked.TOKENIZERS)
@torch.no_grad()
def test_scores_are_log_probabilities_at_the_mask_and_padding_says_nothing(name: str) -> None:
    made, model = kind(name), masked.build(name)
    encoded = rows(made)
    batch = made.collate(encoded)
    assert batch["attention_mask"].sum(1).tolist() == [made.length(row) for row in encoded]
    scores = candidate_scores(model, batch)
    assert torch.equal(made.log_probs(model, batch), scores)
    for number, row in enumerate(encoded):
        alone = made.collate([row], max_length=1)
        assert alone["input_ids"].shape == (1, made.length(row))
        torch.testing.assert_close(candidate_scores(model, alone)[0], scores[number], rtol=1e-5, atol=1e-5)
        # As transformers' own documentation calls such a model: no mask of padding and no positions are given.
        logits = model(input_ids=alone["input_ids"]).logits[0, len(row.prompt)]
        expected = logits.log_softmax(-1)[torch.tensor(row.candidates).flatten()]
        torch.testing.assert_close(scores[number], expected, rtol=1e-5, atol=1e-5)
    assert (scores[0] - scores[1]).abs().max() > 0.01


@pytest.mark.parametrize("name", masked.TOKENIZERS)
@torch.no_grad()
def test_only_the_mask_goes_through_the_head(name: str) -> None:
    made, model, seen = kind(name), masked.build(name), []
    batch = made.collate(rows(made))
    model.get_output_embeddings().register_forward_hook(lambda module, args, output: seen.append(output.shape))
    found = mask_logits(model, batch["input_ids"], batch["attention_mask"], batch["mask_at"])
    assert [tuple(shape) for shape in seen] == [(4, 1, model.config.vocab_size)]

    class Wrapped(nn.Module):  # of which nobody knows where the head begins
        def forward(self, **inputs: Tensor) -> Any:
            return model(**inputs)

    whole = mask_logits(Wrapped(), batch["input_ids"], batch["attention_mask"], batch["mask_at"])
    assert seen[1] == (4, batch["input_ids"].shape[1], model.config.vocab_size)
    torch.testing.assert_close(whole, found, rtol=1e-5, atol=1e-5)
    assert not any(module._forward_hooks for module in model.modules() if module is not model.get_output_embeddings())


def test_the_objectives_are_the_cross_entropies_over_the_words_and_over_the_vocabulary() -> None:
    made, model = kind("roberta"), masked.build("roberta")
    encoded = rows(made)
    with torch.no_grad():
        batch = made.collate(encoded)
        logits = mask_logits(model, batch["input_ids"], batch["attention_mask"], batch["mask_at"])
        words = logits.gather(1, batch["candidate_ids"])
        over_words = nn.functional.cross_entropy(words, batch["label"], reduction="none")
        right = batch["candidate_ids"].gather(1, batch["label"][:, None])[:, 0]
        over_all = nn.functional.cross_entropy(logits, right, reduction="none")
        for name, expected in (("candidates", over_words), ("language_modeling", over_all)):
            found = made.objectives[name](model, made.collate(encoded, name))
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        wrong = made.objectives["accuracy"](model, made.collate(encoded, "accuracy"))
        assert wrong.tolist() == (words.argmax(1) != batch["label"]).float().tolist()
        assert made.score(made.predict(model, batch), encoded).metrics["accuracy"].value == 1 - wrong.mean().item()


def test_what_is_cut_is_the_end_of_the_columns_the_longest_first_and_never_the_template() -> None:
    tokenizer = masked.roberta_tokenizer()
    long, short = "the plot is dull and " * 9, " a mess , and it goes on"
    for most in (16, 24, 36):
        made = kind("roberta", max_length=most)
        row = made.encode(cloze(long, more=short))
        assert made.length(row) in (most, most - 1, most - 2)  # tokens of several characters
        text = tokenizer.decode(row.with_mask(tokenizer.mask_token_id), skip_special_tokens=False)
        before, after = text.removeprefix("<s>").removesuffix("</s>").split(" It was<mask>.")
        assert long.startswith(before)
        assert short.startswith(after)
        assert len(before) == pytest.approx(len(after), abs=1) or after == short
    whole = kind("roberta", max_length=256).encode(cloze(long, more=short))
    assert len(whole.prompt) > 36


@pytest.mark.parametrize(
    ("example", "said"),
    [
        (cloze("a mess", candidates=(" terrible", " quick")), r"task\.candidates: ' quick' is \d tokens to this model"),
        (cloze("a mess", candidates=(" a mess", " a joy")), r"' a mess' is 2 tokens to this model, expected one token"),
        (
            cloze("a mess", candidates=(" good", "good ")),
            "' good', .*two of them are the same token|'good ' is 2 tokens",
        ),
        (cloze("a <mask> mess"), r"task\.data: the text 'a <mask> mess .* holds the mask token <mask>"),
        (cloze("a mess", after="gh" * 2000), r"task\.max_length is 40, which leaves no room for the columns beside"),
        (cloze("a mess", after="st"), r"joins one of \['terrible', 'great'\] with what stands around the mask"),
    ],
)
def test_what_one_token_can_not_fill_is_refused_in_one_line(example: Cloze, said: str) -> None:
    with pytest.raises(RecipeError, match=said) as refused:
        kind("roberta", max_length=40).encode(example)
    assert "\n" not in str(refused.value)


def test_a_word_that_would_take_in_some_of_the_template_is_refused() -> None:
    before = (("a mess", True), (" It was mo", False))  # " moving" is one token
    example = Cloze("a mess It was mo{mask}.", ("ving", "re"), 0, before=before, after=((".", False),))
    with pytest.raises(RecipeError, match="joins one of|tokens to this model"):
        kind("roberta").encode(example)
    behind = Cloze("{mask}s.", (" number", " sentence"), 0, before=(("a mess", True),), after=(("s.", False),))
    with pytest.raises(RecipeError, match=r"joins one of \[' number', ' sentence'\] with what stands around the mask"):
        joining().encode(behind)


def joining() -> ClozeChoice:
    """Of a tokenizer that knows some words with an s and without."""
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "a",
        "mess",
        "number",
        "numbers",
        "sentence",
        "sentences",
        ".",
    ]
    core = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = BertPreTokenizer()
    core.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", mask_token="[MASK]", cls_token="[CLS]"
    )
    return ClozeChoice(tokenizer, TaskSection(name="sst2", data="d", template="{text}{mask}s."))


def test_words_that_the_tokenizer_does_not_know_are_refused() -> None:
    with pytest.raises(RecipeError, match="' superbly' is unknown to this model, expected one token"):
        kind("bert").encode(cloze("a mess", candidates=(" great", " superbly")))


def test_a_tokenizer_without_a_mask_token_is_refused() -> None:
    with pytest.raises(ModelError, match="its tokenizer has no mask token, expected one for the {mask}"):
        tasks.kind_of(TaskSection(name="sst2", data="d", template="{text} is {mask}"), material.tokenizer())


@pytest.mark.parametrize(
    ("masked_model", "fields", "said"),
    [
        (False, {"template": "{text} is {mask}"}, "has a mask, but model.name is a causal language model"),
        (True, {"template": "{text} It was"}, "task.template is '{text} It was', but model.name is a masked language"),
        (True, {"name": "choice"}, "task.template is missing, but model.name is a masked language model"),
        (True, {"name": "squad"}, "which fills in one token, and task.name is squad, which can't be asked so"),
        (True, {"name": "chat"}, "task.name is chat, which can't be asked so: give a causal language model"),
        (
            True,
            {"name": "copa", "template": "{premise} {mask}"},
            "has a mask, which one token fills, and task.name is co",
        ),
        (False, {"name": "answer", "template": "{text} {mask}"}, "task.name is answer, which can't be asked so: leave"),
    ],
)
def test_prompts_that_are_for_the_other_sort_of_model_are_refused(
    masked_model: bool, fields: dict[str, str], said: str
) -> None:
    with pytest.raises(RecipeError, match=said) as refused:
        tasks.posed_to(TaskSection.model_validate({"name": "sst2", "data": "d", **fields}), masked_model)
    assert "\n" not in str(refused.value)


def test_a_kind_from_outside_decides_for_itself_which_models_it_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "_TASKS", dict(tasks._TASKS))
    tasks.register("toy", tasks.Task(lambda section: None, lambda tokenizer, section: None))  # type: ignore[arg-type,return-value]
    section = TaskSection(name="toy", data="d", template="{text} {mask}")
    assert all(tasks.posed_to(section, masked_model) is section for masked_model in (True, False))


def step_rows(made: ClozeChoice, step: int) -> list[EncodedCloze]:
    encoded = rows(made)
    return encoded[step % 2 :] + encoded[: step % 2]


def double_losses(made: ClozeChoice, objective: str) -> Callable[[nn.Module, int], Tensor]:
    """Per-row losses as a textbook has them: each text alone, transformers' own call, nothing rounded."""

    def losses(model: nn.Module, step: int) -> Tensor:
        found = []
        for row in step_rows(made, step):
            logits = model(input_ids=torch.tensor([row.with_mask(made._mask_id)])).logits[0, len(row.prompt)]
            words = torch.tensor(row.candidates).flatten()
            chosen = logits if objective == "language_modeling" else logits[words]
            right = words[row.label] if objective == "language_modeling" else torch.tensor(row.label)
            found.append(nn.functional.cross_entropy(chosen, right))
        return torch.stack(found)

    return losses


@pytest.mark.parametrize("objective", ["candidates", "language_modeling"])
@pytest.mark.parametrize("name", masked.TOKENIZERS)
def test_steps_on_clozes_have_the_textbook_s_projected_gradients(name: str, objective: str) -> None:
    made = kind(name)
    expected = textbook.projected_gradients(masked.build(name), double_losses(made, objective), STEPS, **OPTIONS)
    for paired in (None, False):
        optimizer = ms.MeZO(masked.build(name), **OPTIONS, paired=paired)
        for step in range(STEPS):
            batch = made.collate(step_rows(made, step), objective)
            optimizer.step(batch=batch, objective=made.objectives[objective])
            assert optimizer.last_record is not None
            assert list(optimizer.last_record.projected_grads) == pytest.approx(expected[step], rel=1e-4, abs=1e-4)
        assert optimizer.paired is (paired is None)
