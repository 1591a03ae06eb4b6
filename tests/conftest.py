import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import utils


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def digits() -> utils.Dataset:
    return utils.load_dataset("mnist-5k")


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
