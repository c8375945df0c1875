"""A tiny image classifier with its processor, and images of three colours to show it."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from tests.support.material import with_large_weights

NAMES = ("red", "green", "blue")
SIDE = 8


def config() -> ViTConfig:
    return ViTConfig(
        image_size=SIDE,
        patch_size=4,
        hidden_size=20,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=27,  # odd, so that shards are uneven
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        id2label=dict(enumerate(NAMES)),
        label2id={name: number for number, name in enumerate(NAMES)},
    )


def build(seed: int = 0) -> Any:
    return with_large_weights(lambda: ViTForImageClassification(config()), seed)


def write_model(folder: Path, seed: int = 0) -> Path:
    build(seed).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return folder


def png(number: int, label: int, side: int = SIDE) -> bytes:
    """An image that is mostly of the label's colour; every number gives another one."""
    pixels = np.random.default_rng(number).integers(0, 90, (side, side, 3)).astype(np.uint8)
    pixels[..., label] += 120
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def row(number: int, **changes: Any) -> dict[str, Any]:
    """In the hub's schema."""
    data = base64.b64encode(png(number, number % 3)).decode()
    return {"img": {"bytes": data, "path": f"{number}.png"}, "label": number % 3} | changes


def write_rows(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return path


def write_data(folder: Path) -> Path:
    """A folder of splits: 48, 12 and 24 images."""
    folder.mkdir()
    for name, numbers in (("train", range(48)), ("validation", range(48, 60)), ("test", range(60, 84))):
        write_rows(folder / f"{name}.jsonl", *map(row, numbers))
    return folder
