"""The README's Python examples run, and what it names is there."""

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
    """On few digits."""
    monkeypatch.chdir(tmp_path)
    few = thinned(digits, 10)
    for module in (train, evaluate):
        monkeypatch.setattr(module, "load_dataset", lambda *args: few)
    exec(compile(code, "README.md", "exec"), {})


def test_files_it_names_exist():
    named = re.findall(r"\]\(([^)#:]+)\)|src=\"([^\":]+)\"", README)
    for link in filter(None, (a or b for a, b in named)):
        assert (ROOT / link).exists(), link
