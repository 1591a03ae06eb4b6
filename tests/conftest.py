import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data import ImageData, load_dataset


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def digits() -> ImageData:
    return load_dataset("mnist-5k")


def thinned(dataset: ImageData, step: int) -> ImageData:
    """Every step-th image of a data set."""
    names = ("train_images", "train_labels", "test_images", "test_labels")
    return replace(dataset, **{name: getattr(dataset, name)[::step] for name in names})


@pytest.fixture
def fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """Runs a command's main with arguments that it must refuse with one line and exit code 2 -> that line."""

    def run(main: Callable[[], None], *args: str | Path) -> str:
        monkeypatch.setattr(sys, "argv", [f"{main.__module__}.py", *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith(f"{main.__module__}.py: error: ")
        assert error.count("\n") == 1
        return error

    return run
