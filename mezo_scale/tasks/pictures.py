"""Tasks whose rows have an image, which is told what it shows."""

import base64
import binascii
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mezo_scale.errors import RecipeError
from mezo_scale.recipe import TaskSection, means_disk
from mezo_scale.tasks.example import Picture
from mezo_scale.tasks.rows import column
from mezo_scale.tasks.tables import Row
from mezo_scale.tasks.task import SEEING, Task

_REFUSED = ("template", "candidates", "max_new_tokens")


def pictures(about: str, image: str, *, takes: tuple[str, ...] = ()) -> Task:
    """A task of images in a column, and their classes in `label`; or in those that the recipe names.

    An image is a struct with its file's `bytes` (in JSON as base64) or its `path`, as the hub has it, or a path alone;
    a path is taken from the folder of the data.
    """

    def pose(section: TaskSection, row: Row) -> Picture:
        for name in _REFUSED:
            if getattr(section, name) is not None:
                raise RecipeError(
                    f"task.{name} is given, but task.name is {section.name}, whose classes are the model's: leave it "
                    "out"
                )
        label = column(row, section.label_column or "label", "name the one that is meant in task.label_column")
        if isinstance(label, bool) or not isinstance(label, int | str):
            raise RecipeError(f"task.data: {row.place} has the label {label!r:.60}, expected a number or a name")
        where = section.image_column or image
        value = column(row, where, "name the one that is meant in task.image_column")
        return Picture(_bytes(value, where, row, section), label, row.place)

    return Task.of_rows(pose, SEEING, about, (image, "label"), takes=takes)


def _bytes(value: Any, name: str, row: Row, section: TaskSection) -> bytes:
    """The file of a row's image. Raises RecipeError, in one line, if there is none."""
    data, path = (value.get("bytes"), value.get("path")) if isinstance(value, Mapping) else (None, value)
    if isinstance(data, bytes) and data:
        return data
    if isinstance(data, str) and data:
        try:
            return base64.b64decode(data, validate=True)
        except (binascii.Error, ValueError):
            raise RecipeError(
                f"task.data: {row.place} has bytes in {name} that are no base64, as JSON must have them: mend it"
            ) from None
    if data is None and isinstance(path, str) and path:
        file = Path(path)
        if means_disk(section.data):
            folder = Path(section.data)
            file = (folder if folder.is_dir() else folder.parent) / file
        try:
            return file.read_bytes()
        except OSError as error:
            raise RecipeError(
                f"task.data: {row.place} names the image {path[:100]!r} in {name}, and {file} can't be read "
                f"({error.strerror}): a path is taken from the folder of the data"
            ) from None
    raise RecipeError(
        f"task.data: {row.place} has {value!r:.60} in {name}, expected an image: a path, or a struct of bytes and path"
    )
