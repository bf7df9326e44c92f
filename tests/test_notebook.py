"""The tutorial runs from its first cell to its last in a separate kernel."""

import json

import nbformat
import pytest
from nbclient import NotebookClient

from tests.running import ROOT

NOTEBOOK = ROOT / "docs" / "notebooks" / "allconvnet.ipynb"


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_tutorial_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("NOTEBOOK_RUNS", str(tmp_path))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(
        notebook, timeout=1200, kernel_name="python3", resources={"metadata": {"path": str(NOTEBOOK.parent)}}
    ).execute()
    pictures = [output for cell in notebook.cells for output in cell.get("outputs", ()) if "image/png" in output.get("data", {})]
    assert len(pictures) == 7
    for name in ("allconvnet", "vgg11_bn"):
        assert json.loads((tmp_path / name / "results.json").read_text())["status"] == "completed"


def test_the_notebook_is_committed_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert all(not cell.outputs and cell.execution_count is None for cell in notebook.cells if cell.cell_type == "code")
