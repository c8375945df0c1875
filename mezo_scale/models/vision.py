"""What an image classifier reads its images with: transformers' image processor, and the names of the classes."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoImageProcessor

from mezo_scale.errors import ModelError, one_line

_MODES = {1: "L", 3: "RGB"}  # PIL's, by a model's channels


class ImageReader:
    """Turns image files into what a model takes: it stands where a language model has its tokenizer.

    Attributes:
        processor: transformers' own.
        labels: the names of the classes, by their numbers.
    """

    reads_images = True

    def __init__(self, processor: Any, labels: Sequence[str], channels: int) -> None:
        self.processor, self.labels = processor, tuple(labels)
        self._mode = _MODES[channels]

    @classmethod
    def load(cls, name: str, config: Any) -> "ImageReader":
        """That of a checkpoint. Raises ModelError if it has none, or is for other images than grey or RGB ones."""
        try:
            # The same pixels whether torchvision is there or not.
            processor = AutoImageProcessor.from_pretrained(name, backend="pil", trust_remote_code=False)
        except Exception as error:  # transformers raises anything here
            raise ModelError(f"model.name: the image processor of {name} can't be read ({one_line(error)})") from None
        channels = getattr(config, "num_channels", 3)
        if channels not in _MODES:
            raise ModelError(f"model.name: {name} takes images of {channels} channels, expected 3 (RGB) or 1 (grey)")
        return cls(processor, [str(config.id2label[number]) for number in range(config.num_labels)], channels)

    def __call__(self, files: Sequence[bytes]) -> Tensor:
        """Pixel values, float32 [files, channels, height, width], of image files by their bytes.

        Raises whatever PIL and the processor do at what is no image, or not of the others' size.
        """
        from PIL import Image, ImageOps

        images = []
        for data in files:
            with Image.open(io.BytesIO(data)) as image:
                images.append(ImageOps.exif_transpose(image).convert(self._mode))
        pixels: Tensor = self.processor(images=images, return_tensors="pt")["pixel_values"]
        return pixels.to(torch.float32)

    def rules(self) -> dict[str, Any]:
        """All that decides what becomes of an image, for a digest."""
        found = self.processor.to_dict()
        found.pop("_processor_class", None)
        return {"class": type(self.processor).__name__, "mode": self._mode, **found}

    def save_pretrained(self, folder: Path) -> None:
        """As transformers saves it, into a folder that is there."""
        self.processor.save_pretrained(folder)
