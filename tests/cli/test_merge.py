"""`mezo-scale merge` and `replay` of an adapter: what they print, and what they refuse in one line."""

import re
from collections.abc import Callable
from pathlib import Path

from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.support import material

Run = Callable[..., tuple[int, str, str]]


def write_adapter(base: Path, folder: Path) -> Path:
    model = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(folder)
    return folder


def refused(run: Run, *arguments: object) -> str:
    code, _, err = run(*arguments)
    assert (code, err.count("\n")) == (2, 1)
    return err


def test_merge_makes_a_checkpoint_and_says_of_what(run: Run, tmp_path: Path, model_folder: Path) -> None:
    adapter, out = write_adapter(model_folder, tmp_path / "adapter"), tmp_path / "merged"
    code, said, _ = run("merge", adapter, out)
    assert (code, said) == (0, f"{out}: {model_folder} with {adapter} merged into it\n")
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= {path.name for path in out.iterdir()}
    assert not (out / "adapter_config.json").exists()
    assert "is there already" in refused(run, "merge", adapter, out)


def test_merge_takes_another_base(run: Run, tmp_path: Path, model_folder: Path) -> None:
    adapter = write_adapter(model_folder, tmp_path / "adapter")
    config = adapter / "adapter_config.json"
    config.write_text(
        re.sub(r'"base_model_name_or_path": "[^"]*"', '"base_model_name_or_path": null', config.read_text())
    )
    assert "does not say which model it is an adapter of: give --base" in refused(
        run, "merge", adapter, tmp_path / "out"
    )
    assert run("merge", adapter, tmp_path / "out", "--base", model_folder)[0] == 0


def test_merge_refuses_what_is_no_adapter_or_anothers(run: Run, tmp_path: Path, model_folder: Path) -> None:
    assert "has no adapter_config.json" in refused(run, "merge", model_folder, tmp_path / "out")
    adapter = write_adapter(model_folder, tmp_path / "adapter")
    gpt2 = material.write_model("gpt2", tmp_path / "gpt2")
    assert "can't be merged" in refused(run, "merge", adapter, tmp_path / "out", "--base", gpt2)
    text = (adapter / "adapter_config.json").read_text()
    (adapter / "adapter_config.json").write_text(text.replace('"peft_type"', '"later_field": 3, "peft_type"'))
    assert "LORA has no such field" in refused(run, "merge", adapter, tmp_path / "out")
    (adapter / "adapter_model.safetensors").write_bytes(b"no tensors")
    assert "can't be read" in refused(run, "merge", adapter, tmp_path / "out")
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    assert "has no adapter_model.safetensors" in refused(run, "merge", adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
