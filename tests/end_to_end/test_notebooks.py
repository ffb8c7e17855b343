"""Every notebook runs from its first cell to its last."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


def test_first_look(tiny_run, monkeypatch):
    monkeypatch.setenv("LMX_WORKDIR", str(tiny_run))
    notebook = nbformat.read(NOTEBOOKS / "first_look.ipynb", as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(NOTEBOOKS)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(output.get("text", "") for output in outputs)
    assert "4 layers of 4 heads" in text and "The statement " in text
    assert "decoder/layer_3/attention/weights" in text
    assert any("image/png" in output.get("data", {}) for output in outputs)


def test_every_notebook_has_a_test():
    tested = Path(__file__).read_text(encoding="utf-8")
    missing = [path.name for path in NOTEBOOKS.glob("*.ipynb") if path.name not in tested]
    assert not missing


@pytest.mark.parametrize("path", NOTEBOOKS.glob("*.ipynb"), ids=lambda path: path.name)
def test_notebooks_are_kept_without_outputs(path):
    cells = nbformat.read(path, as_version=4).cells
    assert not any(cell.get("outputs") for cell in cells)
