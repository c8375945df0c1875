"""Every example is run as its first lines say, and says of itself what it should."""

import re
import sys
from pathlib import Path

import pytest

from tests.support.fixtures import ROOT
from tests.support.launch import Launch

EXAMPLES = ROOT / "examples"
TORCHRUN = ("torchrun", "--standalone", "--nproc-per-node", "2")
SAYS = {
    "own_model": ((sys.executable,), r"loss (?P<first>[\d.]+) -> (?P<last>[\d.]+) in 200 steps, .* forward: True"),
    "hf_trainer": (TORCHRUN, "stopped after 10 steps, went on to 20 on 2 processes; replayed weights are equal: True"),
    "trl_sft": ((sys.executable,), r"losses \[5\.\d+, 5\.\d+\]; 21 of 21 parameters moved"),
    "accelerate_loop": (TORCHRUN, r"4 steps of 8 rows per process, on 2; lr 1\.0e-05, last loss 4\.\d+"),
    "lightning_manual": ((sys.executable,), r"80 steps, last loss 0\.\d+; resumed weights are equal: True"),
    "titan_like": (TORCHRUN, "resumed at step 3, went on to 6; weights are equal: True"),
    "peft_lora": ((sys.executable,), r"loss 4\.\d+; 28 of 49 parameters moved, adapters only: True; \d+ bytes saved"),
}


@pytest.mark.parametrize("name", SAYS)
def test_an_example_says_that_it_worked(name: str, launch: Launch) -> None:
    command, expected = SAYS[name]
    done = launch(*command, EXAMPLES / f"{name}.py")
    assert done.code == 0, done.output
    said = re.search(expected, done.output)
    assert said, done.output
    if "first" in said.groupdict():
        assert float(said["last"]) < float(said["first"]) / 2


def mine() -> list[Path]:
    return sorted(EXAMPLES.glob("*.py"))


def test_every_example_is_listed_short_and_run() -> None:
    listed = (EXAMPLES / "README.md").read_text()
    assert {path.stem for path in mine()} == SAYS.keys()
    for path in mine():
        assert f"[{path.name}]({path.name})" in listed
        assert len(path.read_text().splitlines()) <= 75, path.name
