"""A checkpoint is there whole, or the one before it is."""

from __future__ import annotations

import pathlib

import pytest
import torch

from mezo_scale.models import checkpoints
from tests.support import models


class NoTokenizer:
    def save_pretrained(self, folder: pathlib.Path) -> None:
        pass


def test_after_a_death_between_the_two_renames_the_older_checkpoint_outlives_a_save_that_fails(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, place = models.build("llama"), tmp_path / "checkpoint"
    checkpoints.write(model, NoTokenizer(), place)
    before = (place / "model.safetensors").read_bytes()
    place.rename(tmp_path / "checkpoint.old")  # where a process died that was about to put the new one in place

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(model, "save_pretrained", full)
        with pytest.raises(OSError, match="No space"):
            checkpoints.write(model, NoTokenizer(), place)
    assert (place / "model.safetensors").read_bytes() == before
    with torch.no_grad():
        next(model.parameters()).add_(1)
    checkpoints.write(model, NoTokenizer(), place)
    assert (place / "model.safetensors").read_bytes() != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"]
