"""Saving in any layout: an ordinary checkpoint, bit for bit, whole or not at all, and never a whole model in memory."""

import errno
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ByT5Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.core_model_loading import revert_weight_conversion

from mezo_scale.distributed.layout import Strategy
from mezo_scale.distributed.memory import PeakMemory
from mezo_scale.errors import SharedError
from mezo_scale.models import checkpoints, conversion, save, stream
from mezo_scale.planner.architecture import architecture
from mezo_scale.planner.memory import saving
from mezo_scale.planner.workload import Workload
from tests.support import layouts, material, models
from tests.support.pool import Ranks

NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def saved(layout: str, name: str, dtype: torch.dtype, out: Path, max_file_bytes: int) -> None:
    sharded = layouts.shard(layout, models.build(name, dtype=dtype))
    save.write(sharded.model, ByT5Tokenizer(), out, max_file_bytes=max_file_bytes)
    sharded.close()


CELLS = [
    ("plain", "gpt2", 1, torch.float32),
    ("plain", "llama-tied", 2, torch.float32),
    ("fsdp1", "llama-tied", 2, torch.float32),
    ("fsdp1-flat", "llama", 3, torch.float32),
    ("fsdp2", "llama-tied", 1, torch.bfloat16),
    ("fsdp2", "mixtral", 2, torch.float32),
    ("fsdp2-offload", "opt", 3, torch.float16),
    ("hsdp", "llama-tied", 4, torch.bfloat16),
    ("zero3", "llama-tied", 3, torch.bfloat16),
    ("zero3-persisted", "mixtral", 4, torch.float32),
    ("tp", "llama", 2, torch.float32),
]


@pytest.mark.parametrize(("layout", "name", "world_size", "dtype"), CELLS)
def test_what_is_saved_loads_as_the_model(
    ranks: Ranks, tmp_path: Path, layout: str, name: str, world_size: int, dtype: torch.dtype
) -> None:
    ranks(world_size, saved, layout=layout, name=name, dtype=dtype, out=tmp_path / "out", max_file_bytes=4000)
    wanted = models.build(name, dtype=dtype)
    found, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto", output_loading_info=True)
    assert not any(report.values())
    wanted_state, found_state = wanted.state_dict(), found.state_dict()
    assert wanted_state.keys() == found_state.keys()
    for key, value in wanted_state.items():
        assert value.dtype == found_state[key].dtype
        assert torch.equal(value, found_state[key]), key


def headers(folder: Path) -> dict[str, tuple[str, list[int], dict[str, str]]]:
    """File, shape and metadata of every tensor, as the library reads them."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in sorted(file.keys()):
                found[key] = (path.name, file.get_slice(key).get_shape(), file.metadata())
    return found


@pytest.mark.parametrize(
    ("name", "max_file_bytes"), [("llama-tied", 5000), ("opt", 5000), ("opt", 10**9), ("mixtral", 10**9)]
)
def test_the_folder_is_the_one_that_transformers_writes(tmp_path: Path, name: str, max_file_bytes: int) -> None:
    model: Any = models.build(name)
    save.write(model, ByT5Tokenizer(), tmp_path / "ours", max_file_bytes=max_file_bytes)
    model.save_pretrained(tmp_path / "theirs", max_shard_size=max_file_bytes)
    ByT5Tokenizer().save_pretrained(tmp_path / "theirs")
    ours, theirs = ({path.name for path in (tmp_path / who).iterdir()} for who in ("ours", "theirs"))
    assert ours == theirs
    assert headers(tmp_path / "ours") == headers(tmp_path / "theirs")
    for file in [name for name in ours if name.endswith(".json")]:
        ours_text, theirs_text = ((tmp_path / who / file).read_text() for who in ("ours", "theirs"))
        assert json.loads(ours_text).get("weight_map") == json.loads(theirs_text).get("weight_map")


def test_parameters_that_make_one_tensor_together_are_turned_back_together() -> None:
    def fuse(model: Any, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A checkpoint that keeps query and key in one tensor, transposes what is square, and leaves the rest."""
        fused = {name: tensor for name, tensor in state.items() if name not in ("q", "k", "square")}
        if parts := [state[name] for name in ("q", "k") if name in state]:
            fused["qk"] = torch.cat(parts)
        if "square" in state:
            fused["square"] = state["square"].T.contiguous()
        return fused

    state = {"q": torch.randn(2, 3), "other": torch.randn(4), "k": torch.randn(1, 3), "square": torch.randn(5, 5)}
    empty = {name: tensor.to("meta") for name, tensor in state.items()}
    with mock.patch.object(conversion, "revert_weight_conversion", fuse):
        plan = conversion.pieces(None, empty)
        assert {piece.sources for piece in plan} == {("q", "k"), ("other",), ("square",)}
        found = {}
        for piece in plan:
            found |= piece.turned_back(None, {name: state[name] for name in piece.sources})
    wanted = fuse(None, state)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_where_it_is_not_certain_all_parameters_are_turned_back_together() -> None:
    def either(model: Any, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if len(state) < 2:
            raise KeyError("b")
        return {"ab": torch.cat([state["a"], state["b"]])}

    empty = {"a": torch.empty(1, device="meta"), "b": torch.empty(2, device="meta")}
    with mock.patch.object(conversion, "revert_weight_conversion", either):
        assert [piece.sources for piece in conversion.pieces(None, empty)] == [("a", "b")]


def test_experts_are_turned_back_one_tensor_at_a_time() -> None:
    model = models.build("mixtral")
    empty = {name: tensor.to("meta") for name, tensor in model.state_dict().items()}
    plan = conversion.pieces(model, empty)
    assert {len(piece.sources) for piece in plan} == {1}
    assert sum(len(piece.targets) for piece in plan) == len(revert_weight_conversion(model, dict(empty)))


def broken(out: Path, where: str) -> str:
    """What rank 0 and the others say where writing fails on rank 0."""
    rename = Path.rename

    def renamed(path: Path, target: Path) -> Path:
        if path.suffix == ".partial":
            raise NO_SPACE
        return rename(path, target)

    fails = mock.Mock(side_effect=NO_SPACE)
    at: dict[str, tuple[Any, str, Any]] = {
        "configuration": (LlamaConfig, "save_pretrained", fails),
        "weights": (stream.WeightFiles, "write", fails),
        "sync": (os, "fsync", fails),
        "first rename": (Path, "rename", fails),
        "second rename": (Path, "rename", renamed),
    }
    sharded = layouts.shard("fsdp2", models.build("llama"))
    with mock.patch.object(*at[where]), pytest.raises(SharedError) as caught:
        save.write(sharded.model, ByT5Tokenizer(), out)
    return str(caught.value)


@pytest.mark.parametrize("where", ["configuration", "weights", "sync", "first rename", "second rename"])
def test_a_full_disk_is_one_line_and_leaves_the_older_checkpoint(ranks: Ranks, tmp_path: Path, where: str) -> None:
    out = tmp_path / "out"
    save.write(models.build("gpt2"), ByT5Tokenizer(), out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    said = ranks(2, broken, out=out, where=where)
    assert said[0] == said[1]
    assert f"{out} can't be written (No space left on device)" in said[0]
    assert "\n" not in said[0]
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_disk_that_has_not_enough_room_is_refused_before_a_weight_is_written(tmp_path: Path) -> None:
    with (
        mock.patch.object(save.shutil, "disk_usage", return_value=mock.Mock(free=1000)),
        mock.patch.object(save, "WeightFiles") as files,
        pytest.raises(SharedError, match=r"out can't be written \(it takes 0.00 GB and 0.00 GB are free\)"),
    ):
        save.write(models.build("gpt2"), ByT5Tokenizer(), tmp_path / "out")
    files.assert_not_called()
    assert list(tmp_path.iterdir()) == []


def test_an_older_checkpoint_survives_a_death_between_the_renames_and_the_next_failure(tmp_path: Path) -> None:
    out = tmp_path / "out"
    save.write(models.build("gpt2"), ByT5Tokenizer(), out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    out.rename(tmp_path / "out.old")  # as a kill leaves it
    (tmp_path / "out.partial").mkdir()
    with mock.patch.object(stream.WeightFiles, "write", side_effect=NO_SPACE), pytest.raises(SharedError):
        save.write(models.build("gpt2"), ByT5Tokenizer(), out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_every_file_is_on_the_disk_before_the_folder_has_its_name(tmp_path: Path) -> None:
    order: list[str] = []
    rename = Path.rename

    def synced(paths: Iterable[Path]) -> None:
        order.extend(path.name for path in paths)

    def renamed(path: Path, target: Path) -> Path:
        order.append("renamed")
        return rename(path, target)

    with mock.patch.object(save, "sync", synced), mock.patch.object(Path, "rename", renamed):
        save.write(models.build("gpt2"), ByT5Tokenizer(), tmp_path / "out")
    before = order[: order.index("renamed")]
    assert set(before) == {path.name for path in (tmp_path / "out").iterdir()} | {"out.partial"}
    assert order[len(before) + 1 :] == [tmp_path.name]


TALL = LlamaConfig(
    vocab_size=40000,
    hidden_size=512,
    intermediate_size=2048,
    num_hidden_layers=16,
    num_attention_heads=8,
    tie_word_embeddings=True,
)


def test_a_file_system_that_syncs_no_folders_is_written_to(tmp_path: Path) -> None:
    fsync = os.fsync

    def synced(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(descriptor)

    with mock.patch.object(os, "fsync", synced):
        save.write(models.build("gpt2"), ByT5Tokenizer(), tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()


def peak(layout: str, out: Path) -> int:
    """Bytes that saving takes over what there was; not the first time, when libraries make room for themselves."""
    sharded = layouts.shard(layout, LlamaForCausalLM(TALL).eval())
    save.write(sharded.model, ByT5Tokenizer(), out)
    memory = PeakMemory(torch.device("cpu"))
    memory.reset()
    before = memory.now()
    save.write(sharded.model, ByT5Tokenizer(), out)
    most = memory.peak() - before
    sharded.close()
    return most


@pytest.mark.parametrize("layout", ["fsdp2", "fsdp1", "zero3"])
def test_saving_takes_the_largest_parameter_as_planned_and_not_the_model(
    ranks: Ranks, tmp_path: Path, layout: str
) -> None:
    first, second = ranks(2, peak, fresh=True, layout=layout, out=tmp_path / "out")
    planned = saving(architecture(TALL), Strategy("fsdp2", shard=2), Workload(dtype="float32"))
    assert planned == pytest.approx(1.5 * 4 * 40000 * 512)
    assert first == pytest.approx(planned, rel=0.2)
    assert second < 0.5 * planned
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > 2.8 * planned


def test_a_token_that_pads_for_want_of_another_is_an_ordinary_one_where_it_is_saved(tmp_path: Path) -> None:
    folder = material.write_model("llama", tmp_path / "model")
    bare = PreTrainedTokenizerFast(tokenizer_object=material.tokenizer()._tokenizer)
    bare.save_pretrained(folder)
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    processor = checkpoints.load_processor(str(folder))
    assert (processor.eos_token, processor.pad_token_id) == (None, 0)
    save.write(material.build("llama"), processor, tmp_path / "saved")
    assert processor.pad_token_id == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").pad_token is None
