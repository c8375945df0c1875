"""For every lane: one thread each, so that tests and their workers do not fight over the cores; no surprises in CI."""

import os

import hypothesis

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything imports torch
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# No deadlines: on a busy machine they measure the machine. CI tries the same examples every time.
hypothesis.settings.register_profile("project", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("project")
