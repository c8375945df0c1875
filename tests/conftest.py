"""For every test: one thread, so that tests and their workers do not fight over the cores; no surprises in CI.

Lanes are markers, and which one a test is in follows from the fixture that it asks for: `ranks` (a process group),
`launch` (real launchers as subprocesses), `slurm` (a real SLURM cluster), `real` (pretrained weights).
"""

import gc
import os
import pathlib

import hypothesis
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything imports torch
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# No deadlines: on a busy machine they measure the machine. CI tries the same examples every time.
hypothesis.settings.register_profile("project", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("project")

pytest_plugins = ("tests.support.fixtures", "tests.support.launch", "tests.support.cluster")

LANES = {"ranks": "ranks", "launch": "launch", "cluster": "slurm", "demo": "real"}
SLOW_FIRST = ("slurm", "launch", "real", "ranks")  # a long file that began last would keep one core waiting


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    why = None
    if not os.environ.get("MEZO_TEST_SLURM"):
        why = "sets up a SLURM cluster, with packages and network namespaces: make test-launch"
    elif os.geteuid() != 0:
        why = "network namespaces need root"
    for item in items:
        for name in {LANES[name] for name in getattr(item, "fixturenames", ()) if name in LANES}:
            item.add_marker(name)
            if name == "slurm" and why:
                item.add_marker(pytest.mark.skip(reason=why))
    slow: dict[pathlib.Path, int] = {}  # whole files: xdist keeps a file's tests together
    for item in items:
        place = next((place for place, name in enumerate(SLOW_FIRST) if item.get_closest_marker(name)), len(SLOW_FIRST))
        slow[item.path] = min(slow.get(item.path, place), place)
    items.sort(key=lambda item: slow[item.path])


_unfreeze, _thawed = gc.unfreeze, []


def pytest_configure() -> None:
    """Notes that a session has ended, which unfreezes all: to count what is frozen takes as long as a small test."""

    def unfreeze() -> None:
        _unfreeze()
        _thawed.append(True)

    gc.unfreeze = unfreeze


def pytest_collection_finish() -> None:
    """What is imported stays: a collection, of which sessions make many, need not walk it each time."""
    gc.collect()
    gc.freeze()


def pytest_runtest_logfinish() -> None:
    if _thawed:
        _thawed.clear()
        pytest_collection_finish()


def pytest_unconfigure() -> None:
    gc.unfreeze = _unfreeze
    gc.unfreeze()  # or nanobind takes what is never collected for leaks, and says so
