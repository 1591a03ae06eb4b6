import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from data import ImageData, load_dataset

SIZE = 49  # 7 x 7 images, of which integrals over the latents are quick


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


@pytest.fixture(scope="session")
def small() -> ImageData:
    """Every fifth of the bundled digits, as 7 x 7 images."""

    def shrink(images: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(images.float(), 4).to(torch.uint8)

    few = thinned(load_dataset("mnist-5k"), 5)
    return replace(few, train_images=shrink(few.train_images), test_images=shrink(few.test_images))


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
