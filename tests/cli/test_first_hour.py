"""What a newcomer asks of the command line besides training: a rehearsal, samples, runs side by side, the schema."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import mezo_scale
from mezo_scale.recipe import Recipe
from tests.cli.test_app import refused
from tests.support.suite import ROWS

Run = Callable[..., tuple[int, str, str]]


def test_the_version_is_printed(run: Run) -> None:
    assert run("--version") == (0, f"mezo-scale {mezo_scale.__version__}\n", "")


def test_without_deepspeed_zero3_is_refused_and_the_rest_runs(
    run: Run, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = "DeepSpeed is not installed: pip install 'mezo-scale[zero3]', or take sharding.strategy=fsdp2"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "deepspeed", None)
        assert message in refused(run, tmp_path, "train", recipe_file, "strategy=zero3")
    program = (
        "import sys; sys.modules['deepspeed'] = None\n"
        "from mezo_scale.cli import main\n"
        f"sys.argv[1:] = ['train', {str(recipe_file)!r}]\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "tuned, 4 steps" in done.stdout


def test_the_schema_names_every_section_and_forbids_unknown_keys(run: Run) -> None:
    schema = json.loads(run("recipe", "--schema")[1])
    assert schema["properties"].keys() == Recipe.model_fields.keys()
    assert schema["additionalProperties"] is False
    assert schema["$defs"]["TrainSection"]["properties"]["steps"]["minimum"] == 1


def test_a_dry_run_shows_the_data_and_the_plan_and_writes_nothing(run: Run, recipe_file: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run("train", recipe_file, "--dry-run")
    assert (code, err) == (0, "")
    assert "train: 48 examples of " in out
    assert "--- training example 2 ---" in out
    assert "It was\n" in out
    assert "GiB planned for a step" in out
    assert "4 steps about" in out
    assert out.count("  * '") == 2
    assert sorted(tmp_path.rglob("*")) == before


def test_a_dry_run_says_that_answers_begin_alike(run: Run, recipe_file: Path) -> None:
    alike = "the answers begin alike"
    numbers = ("task.name=choice", "task.label_column=label", 'task.labels=["0","1"]')
    apart = (*numbers, 'task.template="{text}, so: "', 'task.candidates=["0","1"]')
    together = (*numbers, 'task.template="{text}, so:"', 'task.candidates=[" 0"," 1"]')
    assert alike not in run("train", recipe_file, "--dry-run", *apart)[1]
    rows = [{**ROWS["copa"], "choice1": f"It is {number}.", "choice2": "It is not."} for number in range(24)]
    data = recipe_file.parent / "copa.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ("task.name=copa", f"task.data={data}", "task.train=12", "task.dev=6", "task.test=6")
    assert alike not in run("train", recipe_file, "--dry-run", *given)[1]  # whose answers are not the recipe's
    assert f"{alike}: 1 of the 2 tokens in the first one" in run("train", recipe_file, "--dry-run", *together)[1]


def test_a_dry_run_of_a_run_that_has_begun_says_how_far_it_is_and_leaves_it(run: Run, recipe_file: Path) -> None:
    assert run("train", recipe_file)[0] == 0
    directory = recipe_file.parent / "run"
    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    code, out, _ = run("train", directory, "steps=6", "--dry-run")
    assert code == 0
    assert f"{directory} holds 4 steps of 6 already" in out
    assert {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()} == before


def test_a_dry_run_refuses_what_a_run_refuses(run: Run, recipe_file: Path, tmp_path: Path) -> None:
    assert "there is no file" in refused(run, tmp_path, "train", recipe_file, "task.data=./no.csv", "--dry-run")


@pytest.fixture
def two_runs(run: Run, recipe_file: Path, tmp_path: Path) -> Path:
    for name, lr in (("fast", 1e-2), ("slow", 1e-3)):
        arguments = (f"output.dir={tmp_path / 'all' / name}", f"optimizer.lr={lr}", "output.checkpoint=false")
        assert run("train", recipe_file, *arguments)[0] == 0
    return tmp_path / "all"


def test_runs_are_compared_by_the_fields_in_which_they_differ(run: Run, two_runs: Path, tmp_path: Path) -> None:
    code, out, _ = run("runs", two_runs, "--plot", tmp_path / "runs.png")
    assert code == 0
    assert "optimizer.lr" in out.splitlines()[0]
    assert "optimizer.eps" not in out
    assert "output.dir" not in out
    assert (tmp_path / "runs.png").read_bytes().startswith(b"\x89PNG")

    fast, slow = json.loads(run("runs", two_runs, "--json")[1])
    assert (fast["run"], fast["optimizer.lr"], slow["optimizer.lr"]) == (str(two_runs / "fast"), 1e-2, 1e-3)
    results = json.loads((two_runs / "slow" / "evaluation.json").read_text())
    assert (slow["steps"], slow["of"], slow["metric"]) == (4, 4, "accuracy")
    assert slow["tuned"] == results["tuned"]["accuracy"]
    assert slow["zero_shot"] == results["zero_shot"]["accuracy"]


def test_runs_on_different_data_are_told_apart(run: Run, two_runs: Path) -> None:
    assert " data " not in run("runs", two_runs)[1].splitlines()[0]
    path = two_runs / "slow" / "environment.json"
    (session,) = json.loads(path.read_text())
    path.write_text(json.dumps([session | {"inputs": {"data": "0" * 16}}]))
    assert "data" in run("runs", two_runs)[1].splitlines()[0]
    fast, slow = json.loads(run("runs", two_runs, "--json")[1])
    assert slow["data"] == "0" * 16 != fast["data"]


def test_a_result_is_not_listed_beside_steps_that_came_after_it(run: Run, two_runs: Path) -> None:
    (two_runs / "slow" / "report.md").unlink()
    results = json.loads((two_runs / "slow" / "evaluation.json").read_text())
    for part in ("tuned", "ended"):
        results[part]["step"] = 2  # as if the run had gone on from there, and were stopped after step 4
    (two_runs / "slow" / "evaluation.json").write_text(json.dumps(results))
    _, slow = json.loads(run("runs", two_runs, "--json")[1])
    assert (slow["steps"], slow["tuned"]) == (4, None)


def test_a_run_that_cannot_be_read_is_a_row_with_its_reason(run: Run, two_runs: Path) -> None:
    log = two_runs / "fast" / "trajectory.mezo"
    data = bytearray(log.read_bytes())
    data[-40] ^= 1
    log.write_bytes(data)
    fast, slow = json.loads(run("runs", two_runs, "--json")[1])
    assert "damaged" in fast["error"]
    assert slow["steps"] == 4
    assert "damaged" in run("runs", two_runs)[1]


def test_a_folder_without_runs_is_refused(run: Run, tmp_path: Path) -> None:
    assert "holds no run" in refused(run, tmp_path, "runs", tmp_path)
    assert "is no folder" in refused(run, tmp_path, "runs", tmp_path / "nowhere")


def test_a_run_writes_with_the_weights_that_its_steps_made(run: Run, recipe_file: Path, model_folder: Path) -> None:
    assert run("train", recipe_file, "optimizer.lr=0.1")[0] == 0
    directory, prompt = recipe_file.parent / "run", "the movie was"
    tuned = AutoModelForCausalLM.from_pretrained(directory / "checkpoint").eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        for _ in range(5):
            ids = torch.cat([ids, tuned(ids).logits[:, -1:].argmax(-1)], 1)
    expected = tokenizer.decode(ids[0, -5:], skip_special_tokens=True)

    options = ("-p", prompt, "--max-new-tokens", 5)
    assert run("generate", directory, *options)[1] == f"--- {prompt}\n{expected}\n\n"
    before = run("generate", model_folder, *options)
    assert before[0] == 0
    assert run("generate", directory, *options, "--until", 0)[1] == before[1]
    assert any(
        not torch.equal(weight, load_file(model_folder / "model.safetensors")[name])
        for name, weight in load_file(directory / "checkpoint" / "model.safetensors").items()
    )


def test_samples_depend_on_their_seed_alone(run: Run, model_folder: Path) -> None:
    options = ("generate", model_folder, "-p", "a", "--temperature", 1.0, "--max-new-tokens", 12)
    one, again, other = (run(*options, "--seed", seed)[1] for seed in (1, 1, 2))
    assert one == again != other


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("-p", " "), "prompt 1 is empty"),
        (("-p", "a", "--until", 3), "--until is 3, but"),
    ],
)
def test_what_cannot_be_continued_is_refused(
    run: Run, model_folder: Path, tmp_path: Path, arguments: tuple[object, ...], said: str
) -> None:
    assert said in refused(run, tmp_path, "generate", model_folder, *arguments)


@pytest.mark.parametrize("loss", ["steps", "all"])
def test_a_run_whose_log_has_lost_steps_is_not_graded(run: Run, recipe_file: Path, loss: str, tmp_path: Path) -> None:
    short = ("train.steps=2", "output.checkpoint=false", f"output.dir={tmp_path / 'two'}")
    assert run("train", recipe_file, *short)[0] == 0
    assert run("train", recipe_file, "output.checkpoint=false")[0] == 0
    directory = recipe_file.parent / "run"
    log = directory / "trajectory.mezo"
    if loss == "steps":
        log.write_bytes((tmp_path / "two" / "trajectory.mezo").read_bytes())
    else:
        log.unlink()
    code, _, err = run("evaluate", directory)
    assert (code, err.count("\n")) == (2, 1)
    assert "trajectory.mezo" in err
    if loss == "steps":
        assert "holds 2 steps" in run("generate", directory, "-p", "a")[2]
        (entry,) = json.loads(run("runs", directory, "--json")[1])
        assert "holds 2 steps" in entry["error"]


@pytest.mark.parametrize(
    ("options", "evaluations"),
    [((), 2), (("num_directions=3",), 6), (("estimator=one_sided", "num_directions=3"), 3)],
)
def test_a_dry_run_counts_the_evaluations_of_the_estimator(
    run: Run, recipe_file: Path, options: tuple[str, ...], evaluations: int
) -> None:
    assert f"a step of {evaluations} takes" in run("train", recipe_file, "--dry-run", *options)[1]
