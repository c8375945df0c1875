"""Makes mezo_scale/planner/known.json: the published shapes, read from the models' modules.

python tools/known_shapes.py
"""

import json
from dataclasses import asdict

from mezo_scale.models.shapes import SHAPES
from mezo_scale.planner.architecture import KNOWN, architecture


def known() -> dict[str, dict[str, object]]:
    """Each shape as plain values."""
    return {
        name: asdict(architecture(shape.kind(**shape.fields))) | {"hub": shape.hub} for name, shape in SHAPES.items()
    }


if __name__ == "__main__":
    lines = (f"{json.dumps(name)}: {json.dumps(tree)}" for name, tree in known().items())
    KNOWN.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
