"""Every notebook runs from its first cell to its last."""

import ast
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.interop.test_opening import published

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


def executed(name):
    """The outputs of all cells."""
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(NOTEBOOKS)}}).execute()
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def test_first_look(tiny_run, monkeypatch):
    monkeypatch.setenv("LMX_WORKDIR", str(tiny_run))
    outputs = executed("first_look.ipynb")
    text = "".join(output.get("text", "") for output in outputs)
    assert "4 layers of 4 heads" in text and "The statement " in text
    assert "decoder/layer_3/attention/weights" in text
    assert any("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.slow
def test_bert_classifier(tmp_path, monkeypatch):
    monkeypatch.setenv("LMX_BERT", str(published(tmp_path / "bert")))
    text = "".join(output.get("text", "") for output in executed("bert_classifier.ipynb"))
    losses = [float(loss) for loss in re.findall(r"epoch \d: loss ([\d.]+)", text)]
    assert len(losses) == 3 and all(0 < loss < 3 for loss in losses)
    assert "(4, 8) int32" in text and "complete at step 20" in text
    whole, adapters = re.findall(r"(?:whole|adapters) .*?MB  (\{.*\})", text)
    whole, adapters = ast.literal_eval(whole), ast.literal_eval(adapters)
    assert whole["label"] == adapters["label"] and abs(whole["probability"] - adapters["probability"]) < 1e-4


def test_every_notebook_has_a_test():
    tested = Path(__file__).read_text(encoding="utf-8")
    missing = [path.name for path in NOTEBOOKS.glob("*.ipynb") if path.name not in tested]
    assert not missing


@pytest.mark.parametrize("path", NOTEBOOKS.glob("*.ipynb"), ids=lambda path: path.name)
def test_notebooks_are_kept_without_outputs(path):
    cells = nbformat.read(path, as_version=4).cells
    assert not any(cell.get("outputs") for cell in cells)
