"""What of a checkpoint is read: safetensors of its own folder, and nothing that could run or lies elsewhere."""

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mezo_scale.errors import ModelError
from mezo_scale.models import checkpoints
from tests.support import material
from tests.support.fixtures import ROOT

Damage = Callable[[Path], None]


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.proof),)


def edit(path: Path, **values: Any) -> None:
    tree = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(tree | values))


def index(folder: Path, file: str) -> None:
    """The folder's weights by an index that has all of them in `file`."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    edit(folder / "model.safetensors.index.json", metadata={}, weight_map=dict.fromkeys(weights, file))


def in_pickle(folder: Path) -> None:
    index(folder, "weights.bin")
    torch.save(load_file(folder / "part.safetensors"), folder / "weights.bin")


def payload(folder: Path) -> None:
    index(folder, "weights.bin")
    (folder / "weights.bin").write_bytes(pickle.dumps(Payload(folder / "proof")))


def outside(folder: Path) -> None:
    index(folder, "../other.safetensors")
    save_file(load_file(folder / "part.safetensors"), folder.parent / "other.safetensors", {"format": "pt"})


def absolute(folder: Path) -> None:
    index(folder, str(folder / "part.safetensors"))


def adapter_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "adapter_model.bin")
    edit(folder / "config.json", transformers_weights="adapter_model.bin")


def index_outside(folder: Path) -> None:
    index(folder, "part.safetensors")
    edit(folder / "config.json", transformers_weights="sub/x.safetensors.index.json")


def number(folder: Path) -> None:
    edit(folder / "model.safetensors.index.json", weight_map={"a": 3})


@pytest.mark.parametrize("damage", [in_pickle, payload, outside, absolute, adapter_pickle, index_outside, number])
def test_weights_in_anything_but_safetensors_of_the_folder_are_refused(tmp_path: Path, damage: Damage) -> None:
    folder = material.write_model("llama", tmp_path / "model")
    damage(folder)
    for read in (checkpoints.find, lambda name: checkpoints.read(name, torch.float32)):
        with pytest.raises(ModelError, match=r"names .* as a file of its weights, expected only files in its own") as e:
            read(str(folder))
        assert "\n" not in str(e.value)
    assert not (folder / "proof").exists()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 5}', "[" * 100_000, "\0"])
def test_an_index_that_is_none_is_one_line(tmp_path: Path, text: str) -> None:
    folder = material.write_model("llama", tmp_path / "model")
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ModelError, match="is no index of weights") as error:
        checkpoints.find(str(folder))
    assert "\n" not in str(error.value)


def test_several_files_of_safetensors_are_read(tmp_path: Path) -> None:
    folder = material.write_model("llama", tmp_path / "model")
    index(folder, "part.safetensors")
    assert isinstance(checkpoints.read(str(folder), torch.float32), torch.nn.Module)


@pytest.mark.parametrize("alone", [True, False])
def test_an_adapter_is_refused_with_what_to_do(tmp_path: Path, alone: bool) -> None:
    folder = material.write_model("llama", tmp_path / "model")
    edit(folder / "adapter_config.json", peft_type="LORA", base_model_name_or_path=str(folder), r=2)
    if alone:
        (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"\(adapter_config.json\): to tune it further, .* `mezo-scale merge "):
        checkpoints.find(str(folder))


def test_attention_code_from_the_hub_is_refused(tmp_path: Path) -> None:
    folder = material.write_model("llama", tmp_path / "model")
    edit(folder / "config.json", _attn_implementation="somebody/kernels")
    with pytest.raises(ModelError, match="'somebody/kernels', which is code from the hub"):
        checkpoints.find(str(folder))


def test_weights_that_are_cut_off_are_one_line(tmp_path: Path) -> None:
    folder = material.write_model("llama", tmp_path / "model")
    data = (folder / "model.safetensors").read_bytes()
    for damaged in (data[:-100], b"\xff" * 8 + data[8:], b""):
        (folder / "model.safetensors").write_bytes(damaged)
        with pytest.raises(ModelError, match="can't be read") as error:
            checkpoints.read(str(folder), torch.float32)
        assert "\n" not in str(error.value)


# Numba keeps what it compiled in a cache of its own, in pickle: it lies beside the code and is trusted like it.
WITHOUT_PICKLE = """
import os, pickle, sys, traceback

def refuse(real):
    def call(*args, **kwargs):
        frame = sys._getframe(1)
        if frame.f_globals.get("__name__") == "numba.core.caching":
            return real(*args, **kwargs)
        traceback.print_stack()
        print("UNPICKLED", flush=True)
        os._exit(99)
    return call

class Unpickler(pickle.Unpickler):
    __init__ = refuse(pickle.Unpickler.__init__)

pickle.load, pickle.loads, pickle.Unpickler = refuse(pickle.load), refuse(pickle.loads), Unpickler
import torch
torch.load = refuse(torch.load)
if sys.argv[1] == "unpickle":
    pickle.loads(b"")
from mezo_scale.cli import main
main()
"""


def without_pickle(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT_PICKLE, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def test_a_whole_run_unpickles_nothing(recipe_file: Path, tmp_path: Path) -> None:
    assert without_pickle("unpickle").returncode == 99
    done = without_pickle("train", recipe_file, "train.steps=2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "run" / "checkpoint" / "model.safetensors").is_file()
