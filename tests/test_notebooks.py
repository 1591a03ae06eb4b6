"""The notebooks run top to bottom, and are committed with their outputs."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


def test_there_are_three():
    assert [path.stem for path in NOTEBOOKS] == ["train_and_eval", "understanding_the_loss", "visualizing_manifold"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path: Path):
    """With few epochs: one line of each decides how many."""
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert sum(len(cell.outputs) for cell in code) >= 4
    assert not any(output.output_type == "error" for cell in code for output in cell.outputs)
    replaced = 0
    for cell in code:
        cell.source, count = re.subn("^epochs = .*", "epochs = 1", cell.source, flags=re.MULTILINE)
        replaced += count
    assert replaced == 1
    NotebookClient(notebook, timeout=400, resources={"metadata": {"path": str(path.parent)}}).execute()
