"""Something small to launch: a Llama checkpoint with a tokenizer, a labelled CSV file, and a recipe over them.

By hand: python -m tests.support.workload FOLDER
"""

import sys
from pathlib import Path

import yaml

from tests.support import material

STEPS = 6


def make(folder: Path) -> Path:
    """Fills `folder` and returns the path of the recipe in it, whose own paths are absolute."""
    recipe = {
        "model": {"name": str(material.write_model("llama", folder / "model"))},
        "task": {
            "data": str(material.write_reviews(folder / "reviews.csv")),
            "train": 64,
            "dev": 16,
            "test": 32,
            "max_length": 40,
        },
        "optimizer": {"lr": 1e-3, "eps": 1e-3},
        "train": {"steps": STEPS, "batch_size": 8, "eval_every": 0, "log_every": 1},
        "sharding": {"strategy": "fsdp2"},
        "output": {"dir": str(folder / "run")},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


if __name__ == "__main__":
    sys.stdout.write(f"{make(Path(sys.argv[1]).absolute())}\n")
