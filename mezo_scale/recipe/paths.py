"""Whether a name that a recipe gives is a path or a name on the hub."""

import os.path

_FILES = (".csv", ".tsv", ".jsonl", ".json", ".parquet", ".txt", ".gz")


def means_disk(name: str) -> bool:
    """Whether a name of a model or of data can only be a path: hub names are `name` or `owner/name`."""
    looks = name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith(_FILES)
    return looks or os.path.exists(name)
