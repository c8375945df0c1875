"""Running text: read, cut into blocks, scored token by token, and what is refused."""

import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from mezo_scale import tasks
from mezo_scale.errors import MezoError, RecipeError
from mezo_scale.recipe import Recipe, TaskSection, load
from mezo_scale.runs import listing
from mezo_scale.runs.evaluate import evaluate_recipe
from mezo_scale.runs.session import train
from mezo_scale.tasks.kinds.modeling import Modeling, token_losses
from mezo_scale.tasks.passages import read
from tests.support import masked, material

MakeRecipe = Callable[..., Recipe]
Run = Callable[..., tuple[int, str, str]]
LINES = [line for text, _ in material.reviews() for line in (f" = {text[:9]} = ", "", f" {text} .", "")]


def write_wikitext(folder: Path) -> Path:
    """A folder in the hub's schema: a row is a line, an empty one where a line is blank."""
    folder.mkdir()
    for number, name in enumerate(("train", "validation", "test")):
        with gzip.open(folder / f"{name}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps({"text": line}) + "\n" for line in LINES[number::3])
    return folder


@pytest.fixture
def wikitext(tmp_path: Path) -> Path:
    return write_wikitext(tmp_path / "wikitext")


def section(data: Path, **fields: Any) -> TaskSection:
    return TaskSection(**({"name": "wikitext", "data": str(data), "max_length": 16} | fields))


def kind(given: TaskSection) -> Any:
    tokenizer = material.tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    return tasks.kind_of(given, tokenizer)


def blocks(given: TaskSection, *parts: str) -> list[Any]:
    made, splits = kind(given), tasks.load(given)
    return [made.encode_all(getattr(splits, part)) for part in parts]


def test_blocks_are_the_tokens_of_the_joined_text_cut_without_overlap(wikitext: Path) -> None:
    given = section(wikitext)
    (passage,) = tasks.examples(given)["test"]
    assert passage.text == "\n\n".join(LINES[2::3])
    found = kind(given).encode_all([passage])
    whole = material.tokenizer()(passage.text)["input_ids"]
    tokens = [token for block in found for token in block.tokens]
    assert tokens == whole[: len(tokens)]
    assert {len(block.tokens) for block in found[:-1]} == {16}
    assert len(whole) - len(tokens) <= 1  # one token alone is no block
    assert kind(given).scored(found[0]) == [tuple(whole[1:16])]


def test_as_many_blocks_as_asked_for_are_drawn_by_the_seed(wikitext: Path) -> None:
    some = [blocks(section(wikitext, test=5, split_seed=seed), "test")[0] for seed in (0, 0, 1)]
    assert [len(rows) for rows in some] == [5, 5, 5]
    assert some[0] == some[1] != some[2]
    (every,) = blocks(section(wikitext, test=10_000), "test")
    assert set(some[0]) < set(every)


@pytest.mark.parametrize("name", ["mine.txt", "mine.txt.gz", "mine.jsonl"])
def test_a_text_in_one_file_is_cut_in_three_at_line_ends_and_no_split_moves(tmp_path: Path, name: str) -> None:
    text = "\n".join(f"line {n} of a text of my own" for n in range(300)) + "\n"
    if name.endswith(".jsonl"):
        (tmp_path / name).write_text(json.dumps({"body": text}))
    else:
        data = text.encode()
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    given = section(tmp_path / name, name="text", **({"text_column": "body"} if name.endswith(".jsonl") else {}))
    splits = read(given)
    parts = [part[0].text for part in (splits.train, splits.dev, splits.test)]
    assert "".join(parts) == text
    assert all(part.startswith("line ") and part.endswith("\n") for part in parts)
    assert [round(10 * len(part) / len(text)) for part in parts] == [8, 1, 1]
    fewer = read(given.model_copy(update={"train": 3, "dev": 2}))
    assert [part[0].text for part in (fewer.train, fewer.dev, fewer.test)] == parts


def test_padding_changes_no_loss_and_counts_for_nothing(wikitext: Path) -> None:
    model, given = material.build("llama"), section(wikitext, max_length=32)
    modeling = kind(given)
    rows = modeling.encode_all(tasks.examples(given)["test"])[-3:]
    assert len(rows[-1].tokens) < 32
    with torch.no_grad():
        together = modeling.predict(model, modeling.collate(rows))
        alone = [modeling.predict(model, modeling.collate([row], max_length=1))[0] for row in rows]
        losses, scored = token_losses(model, modeling.collate(rows))
    assert [loss.tokens for loss in together] == [len(row.tokens) - 1 for row in rows]
    assert [loss.total for loss in together] == pytest.approx([loss.total for loss in alone], rel=1e-5)
    assert losses[~scored].abs().sum() == 0


def test_a_run_by_perplexity_takes_less_for_better(wikitext: Path, make_recipe: MakeRecipe, run: Run) -> None:
    # Too large steps: what comes last is not what was best.
    recipe = make_recipe("task.name=wikitext", f"task.data={wikitext}", "max_length=16", "lr=5e-2", "eval_every=1")
    train(recipe)
    results = json.loads((recipe.directory / "evaluation.json").read_text())
    lines = [json.loads(line) for line in (recipe.directory / "metrics.jsonl").open()]
    dev = {line["step"]: line["dev_perplexity"] for line in lines if "dev_perplexity" in line}
    least = min(dev, key=lambda step: dev[step])
    assert len(set(dev.values())) > 1
    assert results["best"] == {"step": least, "metric": "perplexity", "value": dev[least]}
    low, high = results["tuned"]["interval_95"]
    assert low < results["tuned"]["perplexity"] < high
    assert results["tuned"]["perplexity"] > 1
    report = (recipe.directory / "report.md").read_text()
    assert f"| {results['tuned']['perplexity']:.4f} | {low:.4f} to {high:.4f} |" in report
    assert f"the perplexity was best after step {least}: {dev[least]:.4f}." in report
    assert "%" not in report.replace("95% interval", "")
    (entry,) = listing.compare([recipe.directory])
    assert entry["tuned"] == results["tuned"]["perplexity"]
    assert listing._cell(entry, "tuned") == f"{entry['tuned']:.4f}"
    code, out, _ = run("evaluate", recipe.directory)
    assert (code, f"95% interval {low:.4f} to {high:.4f}" in out) == (0, True)
    assert evaluate_recipe(recipe, "test", None)[0].metrics["perplexity"].value == results["tuned"]["perplexity"]


def test_zero_shot_perplexity_is_that_of_a_plain_loop(wikitext: Path, make_recipe: MakeRecipe) -> None:
    recipe = make_recipe("task.name=wikitext", f"task.data={wikitext}", "max_length=16", "task.test=100000")
    found, _ = evaluate_recipe(recipe, "test", 0)
    model = AutoModelForCausalLM.from_pretrained(recipe.model.name).eval()
    ids = material.tokenizer()("\n\n".join(LINES[2::3]))["input_ids"]
    total = count = 0.0
    with torch.no_grad():
        for start in range(0, len(ids), 16):
            block = torch.tensor([ids[start : start + 16]])
            if block.shape[1] > 1:
                total += float(model(input_ids=block, labels=block).loss) * (block.shape[1] - 1)
                count += block.shape[1] - 1
    assert found.metrics["perplexity"].value == pytest.approx(math.exp(total / count), rel=1e-5)


def test_the_tokens_of_blocks_are_shown(wikitext: Path, run: Run, model_folder: Path) -> None:
    arguments = ("tasks", "show", "wikitext", "--data", wikitext, "--split", "test", "--model", model_folder)
    code, out, _ = run(*arguments, "task.max_length=16", "-n", "2", "--json")
    shown = json.loads(out)
    assert (code, len(shown)) == (0, 2)
    assert [(one["length"], len(one["tokens"][0])) for one in shown] == [(16, 15)] * 2
    assert "".join(one["prompt"] for one in shown) in "\n\n".join(LINES[2::3])
    _, out, _ = run(*arguments, "task.max_length=16", "-n", "1")
    assert f"  scored: {' '.join(shown[0]['tokens'][0])}\n" in out
    code, out, _ = run(*arguments[:-2])
    assert (code, "= " in out) == (0, True)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"template": "{text}"}, "task.template is given, but task.name is wikitext, which poses no questions"),
        ({"candidates": ("a", "b")}, "task.candidates is given"),
        ({"k_per_class": 2}, "task.k_per_class is given"),
        ({"max_new_tokens": 2}, "task.max_new_tokens is given"),
        ({"temperature": 1.0}, "task.temperature is 1, but task.name is wikitext, which writes nothing"),
        ({"metric": "accuracy"}, "task.metric: found 'accuracy' for task.name=wikitext"),
        ({"text_column": "body"}, "task.text_column is given, but task.name is wikitext, which has no use for it"),
        ({"name": "text", "text_column": "texts"}, "has no column 'texts' (did you mean 'text'?)"),
        ({"answer_column": "x"}, "task.answer_column is given"),
    ],
)
def test_what_running_text_has_no_use_for_is_refused(wikitext: Path, fields: dict[str, Any], said: str) -> None:
    given = section(wikitext, **fields)
    with pytest.raises(RecipeError) as refused:
        blocks(given, "test")
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("abc\n", "leaves no text for dev"),
        ("one line", "has 1 tokens to this model, expected 2 or more"),
        ("", "has no rows"),
    ],
)
def test_too_little_text_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "mine.txt").write_text(text)
    given = section(tmp_path / "mine.txt", name="text")
    with pytest.raises(RecipeError) as refused:
        blocks(given, "train", "dev", "test")
    assert said in str(refused.value)


def test_a_row_that_is_no_text_is_refused_with_its_place(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text('{"text": "a"}\n{"text": 3}\n')
    with pytest.raises(RecipeError, match=r"line 2 of .*mine.jsonl has 3 in text, expected text"):
        read(section(tmp_path / "mine.jsonl", name="text"))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("method.name=icl",), "are no prompts that can follow one another"),
        (("method.name=linear_probe",), "do not all choose among the same answers"),
        (("train.balance=labels",), "train.balance is labels, which are none in this task"),
        (("train.objective=f1",), "train.objective: found 'f1' for task.name=wikitext; expected language_modeling"),
    ],
)
def test_methods_and_fields_that_need_answers_are_refused(
    wikitext: Path, tmp_path: Path, model_folder: Path, overrides: tuple[str, ...], said: str
) -> None:
    path = tmp_path / "plain.yaml"
    path.write_text(
        f"model: {{name: {model_folder}}}\ntask: {{name: wikitext, data: {wikitext}, max_length: 16}}\n"
        f"output: {{dir: {tmp_path / 'run'}}}\n"
    )
    with pytest.raises(MezoError) as refused:
        train(load(path, overrides))
    assert said in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_a_masked_model_has_no_perplexity(wikitext: Path, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    folder = masked.write_model("roberta", tmp_path / "roberta")
    with pytest.raises(MezoError, match="model.name is a masked language model, which fills in one token"):
        train(make_recipe("task.name=wikitext", f"task.data={wikitext}", "max_length=16", f"model.name={folder}"))


def test_the_kind_is_the_one_that_is_listed() -> None:
    named = tasks.known()["wikitext"].kind
    assert isinstance(named, tasks.NamedKind)
    assert (named.name, named.metric, named.made_by) == ("modeling", Modeling.metrics[0], Modeling.__name__)
