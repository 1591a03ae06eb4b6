"""The README's Python examples run, and what it and docs/ name is there."""

import re
from pathlib import Path

import pytest

import evaluate
import train
from data import ImageData
from tests.conftest import thinned

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_there_are_examples():
    assert EXAMPLES


@pytest.mark.parametrize("code", EXAMPLES)
def test_example(code: str, digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """On few digits, and without pictures."""
    if "tensorboard" in code:
        pytest.importorskip("tensorboard")
    monkeypatch.chdir(tmp_path)
    few = thinned(digits, 10)
    for module in (train, evaluate):
        monkeypatch.setattr(module, "load_dataset", lambda *args: few)
    monkeypatch.setattr(train, "draw", lambda *args: None)
    monkeypatch.setattr(evaluate, "draw_all", lambda *args: ())
    exec(compile(code.replace("weights/", f"{ROOT}/weights/"), "README.md", "exec"), {})


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "weights/README.md"]
)
def test_files_it_names_exist(page: Path):
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / link).exists(), link
