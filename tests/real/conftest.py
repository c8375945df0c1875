"""The demo's model and data: real weights and real sentences, made once per checkout by the demo's own tool."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="session")
def demo() -> pathlib.Path:
    """The folder with `model` and `rotten_tomatoes.csv`."""
    folder = ROOT / ".demo"
    tool = [sys.executable, str(ROOT / "tools" / "prepare_demo.py"), "--out", str(folder)]
    done = subprocess.run(tool, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder
