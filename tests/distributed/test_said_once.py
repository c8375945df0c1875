"""What can't run on several ranks is one line, whoever meets it first."""

from pathlib import Path

import pytest

from tests.support.launch import BIN, Launch


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["train.batch_size=1"], "train.batch_size is 1, but there are 2 processes: give each at least one row"),
        (["train.steps=0"], "train.steps: found 0 (an integer), expected greater than or equal to 1"),
    ],
)
def test_what_cannot_run_on_two_ranks_is_said_once(
    launch: Launch, recipe_file: Path, tmp_path: Path, overrides: list[str], said: str
) -> None:
    torchrun = (BIN / "torchrun", "--standalone", "--nproc-per-node", "2", "-m", "mezo_scale.cli")
    done = launch(*torchrun, "train", recipe_file, f"output.dir={tmp_path / 'run'}", *overrides)
    assert done.code != 0
    assert done.output.count("error: ") == 1
    assert said in done.output
    assert "mezo_scale/" not in done.output.split("error: ")[0]
    assert not (tmp_path / "run").exists()


def test_an_error_is_said_though_the_ranks_that_keep_silent_meet_it_first(launch: Launch, tmp_path: Path) -> None:
    late = tmp_path / "late.py"
    late.write_text(
        "import os, sys, time\n"
        "time.sleep(3 if os.environ['RANK'] == '0' else 0)\n"
        "sys.argv[1:] = ['train', 'no-such-recipe.yaml']\n"
        "from mezo_scale.cli import main\n"
        "main()\n"
    )
    done = launch(BIN / "torchrun", "--standalone", "--nproc-per-node", "2", late)
    assert done.code != 0
    assert done.output.count("error: ") == 1
