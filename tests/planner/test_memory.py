"""The planner's memory against what real processes take: the whole table is made by tools/plan_accuracy.py."""

import json
import pathlib
import subprocess
import sys

TOOL = pathlib.Path(__file__).parents[2] / "tools" / "plan_accuracy.py"


def test_two_ranks_take_the_memory_of_the_plan() -> None:
    """VmHWM of two gloo ranks that tune OPT-125M's shape, less what is resident after a step of a toy model."""
    command = [sys.executable, str(TOOL), "--cell", "opt-125m,2,16-bit,1,64"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    cell = json.loads(ran.stdout.splitlines()[-1])
    assert 0.3 < cell["plan_gib"] < 0.6
    assert abs(cell["error_percent"]) < 15
