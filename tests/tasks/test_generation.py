"""Answers that are written: how they are decoded, compared and learned from."""

import warnings
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import mezo_scale as ms
from mezo_scale.errors import RecipeError
from mezo_scale.noise import direction_seed
from mezo_scale.recipe import TaskSection
from mezo_scale.tasks import Question
from mezo_scale.tasks.encoding import pad_left
from mezo_scale.tasks.kinds.decoding import Decoded, greedy, reads_ahead, sampling
from mezo_scale.tasks.kinds.generation import Generation, best, exact_match, f1, normalised
from tests.support import material

BRANCHES = [(11, 2e-2), (11, -2e-2), (12, 2e-2)]
PROMPTS = [[40, 41, 42, 43, 44], [50, 51], [60, 61, 62]]
FAMILIES = ["llama", "llama-untied", "opt", "gpt2", "mixtral", "mamba"]


def kind(max_length: int = 64, **fields: Any) -> Generation:
    tokenizer = material.tokenizer()
    tokenizer.pad_token_id = 0
    return Generation(tokenizer, TaskSection(name="squad", data="d", max_length=max_length, **fields))


@torch.no_grad()
def by_hand(model: nn.Module, prompt: list[int], count: int) -> list[int]:
    """Without padding, cache or batch: the likeliest token after all that is there, again and again."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def decode(model: nn.Module, copies: int, count: int = 6, end: int = -1) -> Decoded:
    input_ids, mask = pad_left(PROMPTS, 0)
    return greedy(model, input_ids.repeat(copies, 1), mask.repeat(copies, 1), count, lambda token: token == end)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_batch_is_decoded_as_each_of_its_prompts_alone(name: str) -> None:
    model = material.build(name)
    found = decode(model, 1)
    assert found.tokens == [by_hand(model, prompt, 6) for prompt in PROMPTS]
    assert found.finite == [True] * 3


@pytest.mark.parametrize("name", ["llama", "llama-untied", "opt", "gpt2", "mixtral"])
def test_all_branches_in_one_batch_write_what_each_writes_alone(name: str) -> None:
    model = material.build(name)
    with ms.perturbed(model, BRANCHES):
        together = decode(model, len(BRANCHES)).tokens
    apart = []
    for branch in BRANCHES:
        with ms.perturbed(model, [branch]):
            apart += decode(model, 1).tokens
    assert together == apart
    assert together[:3] != together[3:6]


def test_a_row_ends_at_its_token_and_others_go_on() -> None:
    model = material.build("llama")
    free = decode(model, 1).tokens
    end = free[0][2]
    found = decode(model, 1, end=end).tokens
    assert found == [tokens[: tokens.index(end)] if end in tokens else tokens for tokens in free]
    assert len(found[0]) < len(free[0])


def calls_until_all_have_ended(model: nn.Module, distributed: bool, monkeypatch: pytest.MonkeyPatch) -> int:
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    monkeypatch.setattr("mezo_scale.collectives.is_distributed", lambda: distributed)
    greedy(model, *pad_left(PROMPTS, 0), 6, lambda token: True)
    handle.remove()
    return len(calls)


def test_several_ranks_make_the_same_number_of_calls_and_one_stops_early(monkeypatch: pytest.MonkeyPatch) -> None:
    model = material.build("llama")
    assert calls_until_all_have_ended(model, True, monkeypatch) == 6
    assert calls_until_all_have_ended(model, False, monkeypatch) == 1


def test_samples_have_the_probabilities_of_the_logits_and_follow_from_their_seeds() -> None:
    count = 4000
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0]).repeat(count, 1)
    seeds = [direction_seed(0, 3, row) for row in range(count)]
    chosen = sampling(seeds, 2.0)(logits).argmax(-1)
    right = (logits[0] / 2).softmax(-1)
    found = torch.bincount(chosen, minlength=4) / count
    assert ((found - right).abs() < 4 * (right * (1 - right) / count).sqrt()).all()
    again = sampling(seeds[::-1], 2.0)(logits).argmax(-1)
    assert torch.equal(again, chosen.flip(0))  # a row's own, in whatever company


def test_what_is_not_finite_is_no_answer() -> None:
    model = material.build("llama-untied")
    with torch.no_grad():
        model.get_input_embeddings().weight[50] = float("nan")
    found = decode(model, 1)
    assert found.finite == [True, False, True]
    asker = kind(max_new_tokens=3)
    rows = [asker.encode(Question(text, (" superb",))) for text in ("the plot", "a remake")]
    score = asker.score([None, "superb"], rows)
    assert (score.count, score.not_finite, score.metrics["exact_match"].value) == (2, 1, 0.5)


def test_an_answer_is_the_first_line_that_is_written() -> None:
    asker = kind()
    tokens = asker._tokenizer(" superb\nmoving")["input_ids"]
    assert asker._text(tokens) == "superb"
    newline = next(token for token in tokens if "\n" in asker._tokenizer.decode([token]))
    assert [asker._ends(token) for token in (newline, tokens[0], asker._tokenizer.eos_token_id)] == [True, False, True]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Cat.", "cat"),
        ("an apple, a day", "apple day"),
        ("theatre and another", "theatre and another"),
        (" U.S.A.\t", "usa"),
        ("don't", "dont"),
        ("A", ""),
        ("the-end", "theend"),
        ("État", "état"),
    ],
)
def test_texts_are_normalised_as_squad_does(text: str, expected: str) -> None:
    assert normalised(text) == expected


@pytest.mark.parametrize(
    ("found", "answer", "overlap", "same"),
    [
        ("the cat sat", "Cat sat.", 1.0, 1.0),
        ("cat sat down", "the cat", 0.5, 0.0),  # precision 1/3, recall 1
        ("cat cat", "cat", 2 / 3, 0.0),  # a word counts as often as both have it
        ("dog", "cat", 0.0, 0.0),
        ("", "cat", 0.0, 0.0),
        ("the", "a", 0.0, 0.0),  # normalising leaves nothing of either, so they count as they are
        ("", "A", 0.0, 0.0),
        ("-", "+", 0.0, 0.0),
        (" + ", "+", 1.0, 1.0),
    ],
)
def test_scores_are_these(found: str, answer: str, overlap: float, same: float) -> None:
    assert f1(found, answer) == pytest.approx(overlap)
    assert exact_match(found, answer) == same


def test_the_kindest_right_answer_counts() -> None:
    assert best(f1, ["big cat"], [["dog", "cat", "the big cat"]]) == [1.0]
    assert best(exact_match, ["cat", "cow"], [["dog", "cat"], ["dog"]]) == [1.0, 0.0]


def test_a_question_in_tokens_is_the_text_its_first_answer_and_the_end_of_the_line() -> None:
    asker = kind(max_new_tokens=4)
    row = asker.encode(Question("the plot is", (" a mess", " dull")))
    decode_text = asker._tokenizer.decode
    assert decode_text(row.prompt) == "the plot is"
    assert decode_text(row.whole) == "the plot is a mess\n"
    assert decode_text(row.whole[-row.scored :]) == " a mess\n"
    assert asker.scored(row) == [row.whole[-row.scored :]]
    assert row.answers == (" a mess", " dull")


def test_a_model_is_asked_where_it_learned_to_answer_though_the_template_ends_in_white_space() -> None:
    asker = kind(max_new_tokens=4)
    plain, spaced = (asker.encode(Question(*one)) for one in (("plot is", (" a mess",)), ("plot is ", ("a mess",))))
    assert spaced.whole == plain.whole
    assert spaced.prompt == plain.prompt == spaced.whole[: -spaced.scored]


def test_a_long_prompt_leaves_room_for_what_is_written() -> None:
    asker = kind(max_length=12, max_new_tokens=8)
    row = asker.encode(Question("the plot is dull , and that is all", (" superb",)))
    assert len(row.prompt) == 4
    assert asker._tokenizer.decode(row.prompt) == asker._tokenizer.decode(row.whole[: -row.scored])
    batch = asker.collate([row])
    assert batch["input_ids"].shape[1] + 8 <= 12
    assert batch["whole_ids"].shape[1] <= 12


@torch.no_grad()
def test_language_modeling_is_the_loss_on_the_first_answer() -> None:
    asker, model = kind(max_new_tokens=4), material.build("opt")
    rows = [asker.encode(Question(*one)) for one in (("the plot is", (" a mess", " dull")), ("its", (" superb",)))]
    found = asker.objectives["language_modeling"](model, asker.collate(rows, "language_modeling"))
    for loss, row in zip(found, rows, strict=True):
        logs = model(input_ids=torch.tensor([row.whole])).logits[0].log_softmax(-1)
        start = len(row.whole) - row.scored
        expected = -sum(float(logs[n - 1, row.whole[n]]) for n in range(start, len(row.whole))) / row.scored
        assert float(loss) == pytest.approx(expected, abs=1e-5)


@torch.no_grad()
def test_the_other_objectives_are_1_minus_the_score_of_what_is_written() -> None:
    asker, model = kind(max_new_tokens=3), material.build("llama")
    prompts = ("the plot is", "its cast")
    (first, second) = asker.predict(model, asker.collate([asker.encode(Question(p, (" x",))) for p in prompts]))
    rows = [asker.encode(Question(prompts[0], (f" {first}", " x"))), asker.encode(Question(prompts[1], (" zz",)))]
    batch = asker.collate(rows)
    assert (first, second) == tuple(asker.predict(model, batch))
    assert asker.objectives["exact_match"](model, batch).tolist() == [0, 1]
    assert asker.objectives["f1"](model, batch).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("question", "fields", "said"),
    [
        (Question("the plot", ()), {}, "has no answer, expected at least one"),
        (Question("the plot", ("",)), {}, "has no tokens of its own to this model"),
        (Question("", ("cat",)), {}, "has no tokens of its own to this model"),
        (Question("the plot", (" superb" * 60,)), {}, r"leaves no room for its prompt in task\.max_length \(64\)"),
        (None, {"max_new_tokens": 63}, r"max_new_tokens is 63, which leaves no room .*expected at most 62"),
        (None, {"candidates": (" a", " b")}, "task.candidates is given, but task.name is squad"),
    ],
)
def test_what_can_not_be_posed_is_refused(question: Question | None, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        kind(**fields).encode(question)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["bert", "roberta", "xlm-roberta"])
def test_a_masked_language_model_reads_ahead_unless_it_is_made_a_decoder(family: str) -> None:
    sizes = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **sizes, intermediate_size=48, max_position_embeddings=128)
    text = torch.tensor([[40, 41, 40, 43, *[44] * 90]])
    assert reads_ahead(AutoModelForCausalLM.from_config(config).eval(), text)
    config.is_decoder = True
    assert not reads_ahead(AutoModelForCausalLM.from_config(config).eval(), text)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_that_writes_does_not(name: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert not reads_ahead(material.build(name).to(dtype), torch.tensor([[40, 41, 40, 43]]))


@pytest.mark.parametrize("mixes", [False, True])
def test_a_model_that_mixes_rows_is_found_out_though_what_it_writes_is_worth_nothing(mixes: bool) -> None:
    asker, model = kind(max_new_tokens=3), material.build("llama")
    if mixes:
        model.model.layers[0].register_forward_hook(lambda module, args, output: output + output.mean(0, keepdim=True))
    batch = asker.collate([asker.encode(Question(prompt, (" zz",))) for prompt in ("the plot is", "its cast")])
    optimizer = ms.MeZO(model, eps=1e-3)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert optimizer.step(batch=batch, objective=asker.objectives["f1"]) == 1.0
    assert optimizer.paired is not mixes
    assert any("can't evaluate several branches in one batch" in str(warning.message) for warning in said) == mixes
