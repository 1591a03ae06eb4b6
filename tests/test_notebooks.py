"""The notebooks run top to bottom, and are committed with their outputs."""

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
from nbclient import NotebookClient

import data
import measure
from data import ImageData
from tests.conftest import thinned

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
FIRST = """
import torch, data, train
data.load_dataset = train.load_dataset = lambda *args: torch.load({!r}, weights_only=False)
train.draw = lambda *args: None
%config InlineBackend.print_figure_kwargs = dict(dpi=20, bbox_inches=None)
"""  # pictures that are sooner rendered


def test_there_are_four():
    names = ["completing_digits", "train_and_eval", "understanding_the_loss", "visualizing_manifold"]
    assert [path.stem for path in NOTEBOOKS] == names


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_ends_with_three_exercises(path: Path):
    """Each question is followed by code that answers it, which JupyterLab folds away with what it shows."""
    *_, first, _, second, _, third, _ = cells = nbformat.read(path, as_version=4).cells
    assert "\n\n**1.** " in first.source
    assert second.source.startswith("**2.** ")
    assert third.source.startswith("**3.** ")
    assert [cell.source.split("\n")[0] for cell in cells].count("## Exercises") == 1
    assert first.source.startswith("## Exercises\n")
    answers = [cell for cell in cells if "answer" in cell.metadata.get("tags", ())]
    assert answers == cells[-5::2]
    for answer in answers:
        assert answer.cell_type == "code"
        assert answer.metadata["jupyter"] == {"source_hidden": True, "outputs_hidden": True}
        assert answer.outputs


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_show_no_warnings_and_no_places(path: Path):
    for cell in nbformat.read(path, as_version=4).cells:
        for output in cell.get("outputs", []):
            assert output.get("name") != "stderr", cell.source
            text = output.get("text", "") + output.get("data", {}).get("text/plain", "")
            assert not re.search(r"/tmp|/home|/root|/Users|[A-Z]:\\|images/s", text), cell.source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path: Path, digits: ImageData, tmp_path: Path):
    """In a kernel of its own, on few digits and for one epoch: a line of each notebook decides how many.

    Every cell, be it an answer to an exercise or another, shows what its stored outputs show: text or a picture.
    """
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    stored = [kinds(cell) for cell in code]
    assert sum(map(len, stored)) >= 4
    assert "error" not in set().union(*stored)
    replaced = 0
    for cell in code:
        cell.source, count = re.subn("^epochs = .*", "epochs = 1", cell.source, flags=re.MULTILINE)
        replaced += count
        cell.source = cell.source.replace("frames=20", "frames=2")
    assert replaced == 1
    torch.save(thinned(digits, 10), tmp_path / "few.pt")
    first = nbformat.v4.new_code_cell(FIRST.format(str(tmp_path / "few.pt")))
    notebook.cells.insert(notebook.cells.index(code[0]) + 1, first)  # that makes the modules importable
    NotebookClient(notebook, timeout=400, resources={"metadata": {"path": str(path.parent)}}).execute()
    for cell, before in zip(code, stored, strict=True):
        assert kinds(cell) == before, cell.source


def kinds(cell: nbformat.NotebookNode) -> set[str]:
    """What a cell shows: image/png and so on, stream for text that it prints."""
    return {kind for output in cell.outputs for kind in output.get("data", [output.output_type])}


@pytest.mark.parametrize("name", ["train_and_eval", "visualizing_manifold"])
def test_starts_from_trained_weights(name: str, digits: ImageData, monkeypatch: pytest.MonkeyPatch):
    """With pretrained = True, up to the cell that trains otherwise."""
    path = next(path for path in NOTEBOOKS if path.stem == name)
    code = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    last = next(i for i, source in enumerate(code) if "pretrained = False" in source)
    monkeypatch.chdir(path.parent)
    monkeypatch.setattr(data, "load_dataset", lambda *args: digits)
    namespace: dict[str, Any] = {}
    for source in code[: last + 1]:
        source = source.replace("%matplotlib inline", "").replace("pretrained = False", "pretrained = True")
        exec(source, namespace)
    reconstruction = measure.encode(namespace["vae"], measure.make_test_set(digits, "dynamic")).reconstruction
    assert reconstruction.mean() < 150
    assert "history" not in namespace
