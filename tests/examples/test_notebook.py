"""The notebook, run by a Jupyter kernel, on the demo's model."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.support.fixtures import ROOT

NOTEBOOK = ROOT / "examples" / "notebook.ipynb"


def test_the_notebook_tunes_a_real_model_and_makes_it_again(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODEL", str(demo / "model"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    said = "".join(output.text for output in outputs if output.output_type == "stream")
    before, after = (float(re.search(rf"loss {when}: ([\d.]+)", said)[1]) for when in ("before", "after"))
    assert after < before - 0.1
    assert re.search(r"12 steps of [\d,]+ bytes; the weights are equal: True", said)
    assert any("image/png" in output.get("data", ()) for output in outputs)


def test_it_is_kept_without_what_a_run_of_it_left() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert all(not cell.outputs and cell.execution_count is None for cell in notebook.cells if "outputs" in cell)
