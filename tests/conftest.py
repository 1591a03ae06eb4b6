import multiprocessing
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

# Set before PyTorch reads them: on work this small, more threads and compiler processes only cost time
os.environ |= {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}

import numpy as np
import torch
from torch import Tensor, nn

import evaluate
import measure
import train
from data import ImageData, load_dataset
from model import VAE

SIZE = 49  # 7 x 7 images, so that integrals over the latents are quick

is_windows = sys.platform == "win32"
processes = multiprocessing.get_context("spawn" if is_windows else "forkserver")
if not is_windows:  # each process is there at once, with PyTorch imported
    processes.set_forkserver_preload(["torch._dynamo", "torch.distributed.nn", "tqdm", "matplotlib.figure", "pytest"])
not_windows = pytest.mark.skipif(is_windows, reason="needs signals, limits or renames as POSIX has them")
linux = pytest.mark.skipif(sys.platform != "linux", reason="measures as only Linux does")


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
def few_digits(digits: ImageData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """556 digits in a file that other processes read at once."""
    few, path = thinned(digits, 9), tmp_path_factory.mktemp("data") / "few.npz"
    np.savez(path, images=few.train_images.squeeze(1), labels=few.train_labels)
    return path


@pytest.fixture(scope="session")
def small(digits: ImageData) -> ImageData:
    """Every fifth of the bundled digits, as 7 x 7 images."""

    def shrink(images: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(images.float(), 4).to(torch.uint8)

    few = thinned(digits, 5)
    return replace(few, train_images=shrink(few.train_images), test_images=shrink(few.test_images))


def as_test_set(x: Tensor, labels: Tensor | None = None) -> measure.TestSet:
    """Values x (N, ...) in [0, 1], as the inputs and targets of a test."""
    labels = torch.zeros(len(x), dtype=torch.int64) if labels is None else labels
    return measure.TestSet(x, x, labels, (255 * x).byte(), "none")


def saved(run: Path) -> dict:
    """A run's checkpoint."""
    return torch.load(run / "checkpoint.pt", weights_only=True)


def same_weights(a: Path, b: Path) -> bool:
    """Whether two runs have the same model and the same weights in training, bit for bit."""
    a, b = saved(a), saved(b)
    parts = ("model_state_dict", "training_weights")
    return all(torch.equal(a[part][name], b[part][name]) for part in parts for name in a[part])


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither training nor evaluation draws, which takes most of the time."""
    monkeypatch.setattr(train, "draw", lambda *args: None)
    monkeypatch.setattr(evaluate, "draw_all", lambda *args: ())


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs a command's main with arguments."""

    def run(main: Callable[[], None], *args: object) -> None:
        monkeypatch.setattr(sys, "argv", [f"{main.__module__}.py", *map(str, args)])
        main()

    return run


@pytest.fixture
def short_chains(monkeypatch: pytest.MonkeyPatch) -> None:
    """Completions take two steps of their Markov chains."""
    complete = VAE.complete
    monkeypatch.setattr(VAE, "complete", lambda *args, **how: complete(*args, **how | {"steps": 2}))


@pytest.fixture
def quick_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traces what is compiled, as always, but then runs PyTorch's own operations, which need no C++ compiler."""
    compile = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, **_: compile(function, fullgraph=True, dynamic=False, backend="eager")
    )


@pytest.fixture
def fails(call: Callable[..., None], capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """Runs a command's main with arguments that it must refuse with one line and exit code 2 -> that line."""

    def run(main: Callable[[], None], *args: object) -> str:
        with pytest.raises(SystemExit) as stop:
            call(main, *args)
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith(f"{main.__module__}.py: error: ")
        assert error.count("\n") == 1
        return error

    return run


# ---------------------------------------------------------------------------------------------------------------------
# Several processes


def run_ranks(ranks: int, function: Callable, *args: object) -> list[str]:
    """Runs a function in as many processes, as torchrun would but sooner -> what each printed.

    They start in the current folder, and leave what they print there.
    """
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": store.host, "MASTER_PORT": store.port}
    shared |= {"TORCHELASTIC_RUN_ID": 0, "TORCHELASTIC_RESTART_COUNT": 0, "TORCHELASTIC_USE_AGENT_STORE": True}
    started = [
        processes.Process(target=_as_rank, args=(shared | {"RANK": rank, "LOCAL_RANK": rank}, function, args))
        for rank in range(ranks)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(100)
        process.kill()
    printed = [Path(f"printed-{rank}").read_text() for rank in range(ranks)]
    assert [process.exitcode for process in started] == [0] * ranks, printed
    return printed


def _as_rank(environment: dict[str, object], function: Callable, args: tuple) -> None:
    os.environ |= {name: str(value) for name, value in environment.items()}
    sys.stdout = sys.stderr = (Path.cwd() / f"printed-{environment['RANK']}").open("w", buffering=1)
    function(*args)
