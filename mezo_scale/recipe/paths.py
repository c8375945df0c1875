"""Where what a recipe names is: on disk or on the hub, and what comes along with the package."""

import os.path
import sysconfig
from pathlib import Path

_FILES = (".csv", ".tsv", ".jsonl", ".json", ".parquet", ".txt", ".gz")


def means_disk(name: str) -> bool:
    """Whether a name of a model or of data can only be a path: hub names are `name` or `owner/name`."""
    looks = name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith(_FILES)
    return looks or os.path.exists(name)


BESIDE = (Path(__file__).parents[2], Path(sysconfig.get_path("data")) / "share" / "mezo-scale")
"""Where launch scripts and configurations of DeepSpeed are: in a checkout, else where the package was installed."""


def find_beside(name: str) -> Path | None:
    """A file in one of the folders BESIDE."""
    return next((place / name for place in BESIDE if (place / name).is_file()), None)
