"""`mezo-scale init`: a first recipe that trains as it is, from a model and a table alone."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cli.test_app import refused
from tests.support import masked

Run = Callable[..., tuple[int, str, str]]
WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]


def text(number: int) -> str:
    return f"the {WORDS[number % 10]} {WORDS[number // 10 % 10]} of {WORDS[number // 100 % 10]}"


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def written(run: Run, model: Path, data: Path, *options: object) -> dict[str, Any]:
    out = data.with_suffix(".yaml")
    code, said, err = run("init", model, data, "--out", out, *options)
    assert (code, err) == (0, "")
    assert f"next: mezo-scale train {out} --dry-run" in said
    recipe: dict[str, Any] = yaml.safe_load(out.read_text())
    return recipe


def test_a_table_with_labels_becomes_a_choice_that_trains_as_it_is(
    run: Run, model_folder: Path, tmp_path: Path
) -> None:
    data = tmp_path / "mail.csv"
    rows = [f"{number},{text(number)},{('ham', 'spam')[number % 2]}" for number in range(60)]
    data.write_text("id,text,kind\n" + "\n".join(rows) + "\n")
    recipe = written(run, model_folder, data)
    assert recipe["task"] == {
        "name": "choice",
        "data": str(data),
        "template": "{text}\nKind:",
        "candidates": [" ham", " spam"],
        "label_column": "kind",
        "labels": ["ham", "spam"],
        "train": 42,
        "dev": 6,
        "test": 12,
        "max_length": recipe["task"]["max_length"],
    }
    assert recipe["task"]["max_length"] % 16 == 0
    assert recipe["sharding"]["strategy"] == "single"
    code, said, _ = run("train", data.with_suffix(".yaml"), "steps=2", f"output.dir={tmp_path / 'run'}")
    assert code == 0
    assert "tuned, 2 steps" in said


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            lambda n: {"question": text(n), "answer": f"it is {text(n + 1)}"},
            {"name": "answer", "template": "{question}\nAnswer:", "answer_column": "answer"},
        ),
        (
            lambda n: {"a": text(n), "b": text(n + 3), "label": n % 3},
            {
                "name": "choice",
                "template": "{a}\n{b}\nLabel: ",  # this tokenizer has the space before a number as a token
                "candidates": ["0", "1", "2"],
                "labels": ["0", "1", "2"],
            },
        ),
        (
            lambda n: {"word": WORDS[n % 10] * (1 + n // 10), "stars": n % 5, "year": 1900 + n},
            {"name": "choice", "template": "{word}\nStars: ", "label_column": "stars"},
        ),
        (
            lambda n: {"said": text(n), "label": ("great", "terrible")[n % 2]},
            {"name": "choice", "template": "{said}\nLabel:", "candidates": [" great", " terrible"]},
        ),
    ],
)
def test_what_is_to_be_learned_is_read_off_the_columns(
    run: Run,
    model_folder: Path,
    tmp_path: Path,
    row: Callable[[int], dict[str, Any]],
    expected: dict[str, Any],
) -> None:
    data = write(tmp_path / "data.jsonl", [row(number) for number in range(40)])
    task = written(run, model_folder, data)["task"]
    assert {name: task[name] for name in expected} == expected


@pytest.mark.parametrize(("pays", "expected"), [(True, ("bfloat16", 4e-3)), (False, (None, 1e-3))])
def test_layers_compute_in_bfloat16_where_the_processor_is_fast_in_it(
    run: Run, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pays: bool, expected: tuple[Any, Any]
) -> None:
    monkeypatch.setattr("mezo_scale.runs.first_recipe._bfloat16_pays", lambda: pays)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    data = write(tmp_path / "mail.jsonl", [{"text": text(n), "label": n % 2} for n in range(40)])
    recipe = written(run, model_folder, data)
    assert (recipe["model"].get("compute_dtype"), recipe["optimizer"]["eps"]) == expected
    assert recipe["model"]["dtype"] == "float32"


@pytest.mark.parametrize(
    ("labels", "metric", "train"),
    [
        ([n % 2 for n in range(60)], None, (16, "labels")),
        ([0] * 60 + [1] * 25, "balanced_accuracy", (16, "labels")),
        ([n % 3 for n in range(90)], None, (18, "labels")),
        ([0] * 60 + [1] * 15, "balanced_accuracy", (16, None)),  # so few of one would come again and again
    ],
)
def test_uneven_labels_are_graded_and_dealt_out_evenly(
    run: Run, model_folder: Path, tmp_path: Path, labels: list[int], metric: str | None, train: tuple[int, str | None]
) -> None:
    data = write(tmp_path / "mail.jsonl", [{"text": text(n), "label": label} for n, label in enumerate(labels)])
    recipe = written(run, model_folder, data)
    assert recipe["task"].get("metric") == metric
    assert (recipe["train"]["batch_size"], recipe["train"].get("balance")) == train
    code, said, err = run("train", data.with_suffix(".yaml"), "steps=2", f"output.dir={tmp_path / 'run'}")
    assert code == 0, err
    assert (metric or "accuracy") in said


def test_numbers_can_be_given_words(run: Run, model_folder: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "mail.jsonl", [{"text": text(n), "label": n % 2} for n in range(60)])
    _, said, _ = run("init", model_folder, data, "--out", tmp_path / "numbers.yaml")
    assert "the labels are numbers, 0, 1, which say nothing to a model" in said
    task = written(run, model_folder, data, "--words", "great, terrible")["task"]
    assert (task["template"], task["candidates"]) == ("{text}\nLabel:", [" great", " terrible"])
    assert task["labels"] == ["0", "1"]
    _, said, _ = run("init", model_folder, data, "--out", tmp_path / "words.yaml", "--words", "great,terrible")
    assert "the labels are numbers" not in said


@pytest.mark.parametrize(("labels", "expected"), [(2, (16, 4)), (3, (18, 6)), (5, (15, 5)), (12, (12, None))])
def test_groups_have_all_labels_in_equal_number(
    run: Run, model_folder: Path, tmp_path: Path, labels: int, expected: tuple[int, int | None]
) -> None:
    data = write(tmp_path / "mail.jsonl", [{"text": text(n), "label": n % labels} for n in range(300)])
    recipe = written(run, model_folder, data)
    assert (recipe["train"]["batch_size"], recipe["optimizer"].get("group_size")) == expected
    assert recipe["optimizer"].get("estimator") == (None if expected[1] is None else "grouped")
    assert recipe["optimizer"]["lr"] == (1e-4 if labels == 2 else 2e-5)


def test_rows_of_like_length_share_a_step(run: Run, model_folder: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "mail.jsonl", [{"text": text(n), "label": n % 2} for n in range(60)])
    assert written(run, model_folder, data)["train"]["sort_window"] == 8


def test_a_target_that_is_named_is_taken(run: Run, model_folder: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "data.jsonl", [{"text": text(n), "label": n % 2, "reply": text(n + 1)} for n in range(40)])
    task = written(run, model_folder, data, "--target", "reply")["task"]
    assert (task["name"], task["answer_column"], task["template"]) == ("answer", "reply", "{text}\nAnswer:")


def test_a_folder_of_splits_keeps_them(run: Run, model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "parts.d"
    folder.mkdir()
    for part, (first, last) in {"train": (0, 30), "validation": (30, 40), "test": (40, 60)}.items():
        write(folder / f"{part}.jsonl", [{"text": text(n), "label": n % 2} for n in range(first, last)])
    task = written(run, model_folder, folder)["task"]
    assert (task["train"], task["dev"], task["test"]) == (30, 10, 20)


@pytest.mark.parametrize(
    ("rows", "options", "said"),
    [
        (
            [{"x": text(n), "y": text(n + 1)} for n in range(40)],
            (),
            "which of the columns x, y is to be learned: say it",
        ),
        ([{"x": text(n), "label": n % 2} for n in range(40)], ("--target", "labl"), "--target"),
        ([{"x": text(n), "label": n % 2} for n in range(8)], (), "has 8 different examples, expected 20 or more"),
        ([{"n": n, "label": n % 2} for n in range(40)], (), "besides label no column has text"),
        (
            [{"x": text(n), "label": n % 2} for n in range(40)],
            ("--words", "good"),
            "--words is good, expected 2 different ones with commas between them, for the values of label in this "
            "order: 0, 1",
        ),
        ([{"x": text(n), "label": n % 2} for n in range(40)], ("--words", "bad, bad"), "expected 2 different ones"),
        ([{"x": text(n), "label": n % 2} for n in range(40)], ("--words", "bad,"), "expected 2 different ones"),
        (
            [{"x": text(n), "answer": f"{text(n)} {n}"} for n in range(40)],
            ("--words", "a,b"),
            "what is learned from answer are texts: leave it out",
        ),
    ],
)
def test_what_can_t_be_told_is_refused(
    run: Run, model_folder: Path, tmp_path: Path, rows: list[dict[str, Any]], options: tuple[str, ...], said: str
) -> None:
    data = write(tmp_path / "data.jsonl", rows)
    assert said in refused(run, tmp_path, "init", model_folder, data, "--out", tmp_path / "r.yaml", *options)


def test_a_recipe_that_is_there_is_not_written_over(run: Run, model_folder: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "data.jsonl", [{"x": text(n), "label": n % 2} for n in range(40)])
    (tmp_path / "r.yaml").write_text("mine: 1\n")
    assert "is there already" in refused(run, tmp_path, "init", model_folder, data, "--out", tmp_path / "r.yaml")


def test_a_masked_model_is_asked_at_a_mask(run: Run, tmp_path: Path) -> None:
    model = masked.write_model("bert", tmp_path / "model")
    rows = [{"text": one, "mood": ("bad", "good")[number % 2]} for number, one in enumerate(masked.sentences())]
    recipe = written(run, model, write(tmp_path / "reviews.jsonl", rows), "--target", "mood")
    assert (recipe["task"]["template"], recipe["task"]["candidates"]) == ("{text}\nMood: {mask}", [" bad", " good"])
    data = write(tmp_path / "asked.jsonl", [{"text": text(n), "answer": f"{text(n + 7)} {n}"} for n in range(60)])
    assert "which fills in one token, and task.name is answer" in refused(run, tmp_path, "init", model, data)
