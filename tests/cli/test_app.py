"""The command line: what is wrong is said in one line, with exit code 2, before anything is written."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from mezo_scale import recipe as recipes

ROOT = Path(__file__).parents[2]


Run = Callable[..., tuple[int, str, str]]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(run: Run, folder: Path, *arguments: object) -> str:
    """The message of a command that must fail in one line and leave `folder` as it is."""
    before = contents(folder)
    code, _, err = run(*arguments)
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert contents(folder) == before
    return err


def test_the_commands_are_these(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    for name in ("bench", "train", "evaluate", "replay", "verify", "plan", "recipe"):
        assert f"\n  {name} " in out


def test_the_help_of_train_explains_every_field(run: Run) -> None:
    code, out, _ = run("train", "--help")
    assert code == 0
    words = " ".join(out.split())
    for field in recipes.options():
        assert field.key in words
        assert " ".join(field.description.split()) in words


def test_recipe_prints_the_reference_page(run: Run) -> None:
    assert run("recipe") == (0, recipes.reference(), "")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["train.step=3"], "unknown key train.step; did you mean train.steps?"),
        (["train.steps=soon"], "train.steps: found 'soon' (text), expected an integer"),
        (["optimizer.lr=0"], "optimizer.lr: found 0 (an integer), expected greater than 0"),
        (["optimizer.eps=.inf"], "optimizer.eps: found inf (a number), expected a finite number"),
        (["model.name=./nowhere"], "model.name: there is no folder ./nowhere; expected a Hugging Face checkpoint"),
        (["task.data=./nowhere.csv"], "task.data: there is no file ./nowhere.csv; expected one in .csv,"),
        (["task.name=sentimental"], "task.name: found 'sentimental'; did you mean sentiment?"),
        (["task.train=5000"], "but the data has 128 different examples: ask for fewer"),
        (["sharding.replicate=2"], "sharding.replicate is 2, but sharding.strategy is single"),
        (["strategy=hsdp", "replicate=2"], "sharding.replicate is 2, but WORLD_SIZE is 1, which 2 does not divide"),
        (["cpu_offload=true"], "sharding.cpu_offload is for fsdp2 and hsdp, but sharding.strategy is single"),
        (["strategy=zero3", "ds_config=no.json"], "sharding.ds_config: there is no file no.json"),
        (["strategy=zero3", "dtype=bfloat16"], "bf16.enabled false, but model.dtype is bfloat16: make them agree"),
    ],
)
def test_a_recipe_that_cannot_run_is_refused_before_anything_is_written(
    run: Run, recipe_file: Path, tmp_path: Path, overrides: list[str], said: str
) -> None:
    assert said in refused(run, tmp_path, "train", recipe_file, *overrides)


def test_a_folder_without_a_checkpoint_is_refused(run: Run, recipe_file: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    message = refused(run, tmp_path, "train", recipe_file, f"model.name={tmp_path / 'empty'}")
    assert "empty holds no checkpoint" in message
    assert message.rstrip().endswith(": give a folder that does")


def with_config(model: Path, to: Path, **changes: object) -> Path:
    to.mkdir()
    for path in model.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(config | changes))
    return to


def test_a_quantised_model_is_refused(run: Run, recipe_file: Path, model_folder: Path, tmp_path: Path) -> None:
    scheme = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    model = with_config(model_folder, tmp_path / "4bit", quantization_config=scheme)
    assert "is quantised" in refused(run, tmp_path, "train", recipe_file, f"model.name={model}")


def test_a_model_that_writes_no_text_is_refused(
    run: Run, recipe_file: Path, model_folder: Path, tmp_path: Path
) -> None:
    model = with_config(model_folder, tmp_path / "vit", model_type="vit")
    message = refused(run, tmp_path, "train", recipe_file, f"model.name={model}")
    assert "is an image classifier, but task.name is sentiment, which is for a language model" in message
    model = with_config(model_folder, tmp_path / "speech", model_type="wav2vec2")
    message = refused(run, tmp_path, "train", recipe_file, f"model.name={model}")
    assert "is a wav2vec2 model, expected a causal or a masked language model, or an image classifier" in message


def test_a_checkpoint_that_lacks_weights_is_refused(
    run: Run, recipe_file: Path, model_folder: Path, tmp_path: Path
) -> None:
    model = with_config(model_folder, tmp_path / "deeper", num_hidden_layers=3)
    message = refused(run, tmp_path, "train", recipe_file, f"model.name={model}")
    assert "lacks 9 weights of a causal language model" in message


def test_weights_in_a_pickle_are_not_read(run: Run, recipe_file: Path, model_folder: Path, tmp_path: Path) -> None:
    model = with_config(model_folder, tmp_path / "pickled")
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    message = refused(run, tmp_path, "train", recipe_file, f"model.name={model}")
    assert "can't be read" in message
    assert "model.safetensors" in message


def test_a_trajectory_of_another_model_is_refused(
    run: Run, recipe_file: Path, model_folder: Path, tmp_path: Path
) -> None:
    from tests.support import material

    assert run("train", recipe_file, "output.checkpoint=false")[0] == 0
    other = material.write_model("llama", tmp_path / "other", seed=1)
    run_dir, log = tmp_path / "run", tmp_path / "run" / "trajectory.mezo"
    saved = yaml.safe_load((run_dir / "recipe.yaml").read_text())
    saved["model"]["name"] = str(other)
    (run_dir / "recipe.yaml").write_text(yaml.safe_dump(saved))
    assert "holds a run with model.name" in refused(run, tmp_path, "train", run_dir, "steps=6")
    (run_dir / "environment.json").unlink()  # where nothing says what the recipe was, the log still does
    for arguments in (
        ("train", run_dir, "steps=6"),
        ("verify", run_dir),
        ("evaluate", run_dir),
        ("replay", "--base", other, "--trajectory", log, "--out", tmp_path / "out"),
    ):
        assert "starts from other weights" in refused(run, tmp_path, *arguments)
    deeper = material.write_model("opt", tmp_path / "opt")
    arguments = ("replay", "--base", deeper, "--trajectory", log, "--out", tmp_path / "out")
    assert "belongs to another model" in refused(run, tmp_path, *arguments)


def test_a_file_that_is_no_trajectory_is_refused(
    run: Run, model_folder: Path, recipe_file: Path, tmp_path: Path
) -> None:
    options = ("replay", "--base", model_folder, "--out", tmp_path / "out", "--trajectory")
    assert "is not a trajectory" in refused(run, tmp_path, *options, recipe_file)
    assert "can't be read" in refused(run, tmp_path, *options, tmp_path / "absent.mezo")


def test_replay_does_not_write_over_anything(run: Run, recipe_file: Path, model_folder: Path, tmp_path: Path) -> None:
    options = ("replay", "--base", model_folder, "--trajectory", tmp_path / "absent.mezo", "--out", tmp_path)
    assert "is there already" in refused(run, tmp_path, *options)


def test_an_error_is_one_line_without_a_traceback_in_a_process_of_its_own(recipe_file: Path, tmp_path: Path) -> None:
    before = contents(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "mezo_scale.cli", "train", str(recipe_file), "train.batch_size=0"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    expected = "train.batch_size: found 0 (an integer), expected greater than or equal to 1"
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {recipe_file}: {expected}\n"
    assert contents(tmp_path) == before
