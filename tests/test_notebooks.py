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
import data, model, torch, train
complete = model.VAE.complete
data.load_dataset = train.load_dataset = lambda *args: torch.load({!r}, weights_only=False)
train.draw = lambda *args: None
model.VAE.complete = lambda *args, **how: complete(*args, **how | {{"steps": 2}})
%config InlineBackend.print_figure_kwargs = dict(dpi=20, bbox_inches=None)
"""  # few digits, short chains, and pictures that are sooner rendered


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_ends_with_three_exercises(path: Path):
    """Each question is followed by code that answers it, which JupyterLab folds away with what it shows."""
    cells = nbformat.read(path, as_version=4).cells
    for number, (question, answer) in enumerate(zip(cells[-6::2], cells[-5::2], strict=True), 1):
        assert f"**{number}.** " in question.source
        assert answer.metadata["jupyter"] == {"source_hidden": True, "outputs_hidden": True}
        assert answer.outputs


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_show_no_warnings_and_no_places(path: Path):
    for cell in nbformat.read(path, as_version=4).cells:
        for output in cell.get("outputs", []):
            assert output.get("name") != "stderr", cell.source
            text = output.get("text", "") + output.get("data", {}).get("text/plain", "")
            assert not re.search(r"/tmp|/home|/root|/Users|[A-Z]:\\|images/s", text), cell.source


def test_run(digits: ImageData, tmp_path: Path):
    """One after the other in one kernel, on few digits and for one epoch: a line of each decides how many.

    Every cell, be it an answer to an exercise or another, shows what its stored outputs show: text or a picture.
    """
    torch.save(thinned(digits, 20), tmp_path / "few.pt")
    sources, stored = [], []
    for path in NOTEBOOKS:
        code = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
        shown = [kinds(cell) for cell in code]
        assert sum(map(len, shown)) >= 4
        assert "error" not in set().union(*shown)
        changed = [re.sub("^epochs = .*", "epochs = 1", cell.source, flags=re.MULTILINE) for cell in code]
        assert [cell.source for cell in code] != changed
        changed = [
            source.replace("frames=20", "frames=2").replace("(1, 10, 100, 1000)", "(1, 10)") for source in changed
        ]
        sources += ["%reset -f", *changed]
        stored += [set(), *shown]
    sources.insert(2, FIRST.format(str(tmp_path / "few.pt")))  # after the cell that makes the modules importable
    stored.insert(2, set())
    run = [nbformat.v4.new_code_cell(source) for source in sources]
    notebook = nbformat.v4.new_notebook(cells=run)
    NotebookClient(notebook, timeout=400, resources={"metadata": {"path": str(NOTEBOOKS[0].parent)}}).execute()
    for cell, before in zip(run, stored, strict=True):
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
