"""Several processes, as torchrun starts them, train as one does."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import data
import measure
import runs
import train
import utils
from data import ImageData
from model import VAE, DiagonalNormal
from tests.conftest import not_windows, run_ranks, thinned

ROOT = Path(__file__).parent.parent
OPTIONS = {"hidden_size": 32, "latent_size": 4, "dataset": "mnist-5k", "device": "cpu"}
ARGS = [f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS.items()]
HEADER = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
import train
train.draw = lambda *args: None
train.load_dataset = lambda *args: torch.load("digits.pt", weights_only=False)
"""

pytestmark = [
    not_windows,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch is built without distributed"),
]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, digits: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundled digits in a file, from which processes read them sooner."""
    monkeypatch.chdir(tmp_path)
    torch.save(digits, "digits.pt")


def torchrun(ranks: int, script: Path, *args: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, str(script), *args], capture_output=True, text=True, timeout=100, env=env)


class Shaded(VAE):
    """Has a buffer in which ranks differ."""

    def __init__(self):
        super().__init__(784, 32, 4)
        self.register_buffer("shade", torch.tensor(float(utils.rank_and_ranks()[0])))


def three_steps(data: ImageData) -> tuple[tuple[float, ...], dict[str, torch.Tensor]]:
    """The test losses, and Adam's average of the gradients of three batches of 127, at the same weights.

    With noise that depends on the image. Every rank tests with the buffers of the first.
    """
    rank, ranks = utils.rank_and_ranks()
    DiagonalNormal.rsample = lambda q, shape=(): q.mu + torch.exp(0.5 * q.logvar) * torch.sin(10 * q.mu.detach())
    torch.manual_seed(0)
    model = Shaded()
    losses = train.compute_test_losses(model, measure.make_test_set(data, "threshold"))
    assert model.shade == 0
    adam = train.Adam(model.parameters(), lr=1e-3)
    step = train.make_step(model, adam, train.make_options())
    for first in (0, 127, 254):
        share = slice(first + rank, first + 127, ranks)
        x = (data.train_images[share] / 255).round()
        step(x, x, data.train_labels[share], torch.tensor([0.0, 1e-8, 0.7]))
    return losses, dict(zip(dict(model.named_parameters()), adam.first, strict=True))


def save_three_steps(data: ImageData) -> None:
    with utils.process_group():
        torch.save(three_steps(data), f"steps-{utils.rank_and_ranks()[0]}.pt")


def test_gradients_and_test_losses_are_those_of_one_process(digits: ImageData, monkeypatch: pytest.MonkeyPatch):
    few = thinned(digits, 10)
    run_ranks(2, save_three_steps, few)
    with monkeypatch.context() as patch:
        patch.setattr(DiagonalNormal, "rsample", DiagonalNormal.rsample)  # to restore it
        expected_losses, expected = three_steps(few)
    for rank in range(2):
        losses, gradients = torch.load(f"steps-{rank}.pt")
        assert losses == pytest.approx(expected_losses)
        for name, gradient in expected.items():
            assert torch.linalg.norm(gradients[name] - gradient) <= 1e-5 * torch.linalg.norm(gradient)


def run_command(*args: str) -> None:
    """python train.py, in this process."""
    train.draw = lambda *args: None
    train.load_dataset = lambda *args: torch.load("digits.pt", weights_only=False)
    sys.argv = ["train.py", *args]
    train.main()


def test_two_ranks_follow_one_process_and_one_continues_from_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """And both when another objective takes over, with the second epoch."""
    monkeypatch.setattr(train, "draw", lambda *args: None)
    run = tmp_path / "runs" / "001-mnist-5k-z4"
    iwae = {"objective": "iwae", "importance_samples": 3, "elbo_epochs": 1}
    changed = [f"--{name.replace('_', '-')}={value}" for name, value in iwae.items()]
    printed = run_ranks(2, run_command, *ARGS, *changed, "--epochs=2")
    assert [text.count("epoch 2/2") for text in printed] == [text.count("done: now try") for text in printed] == [1, 0]
    assert [text.count(" on cpu, 2 processes; writing to ") for text in printed] == [1, 0]
    assert list((tmp_path / "runs").iterdir()) == [run]
    _, history, _ = train.train(**OPTIONS, **iwae, epochs=3, out_dir=tmp_path / "runs")
    _, resumed, _ = train.resume(run, epochs=3)
    for name in ("train_loss", "test_loss"):
        expected = [row[name] for row in history]
        assert [row[name] for row in resumed] == pytest.approx(expected, rel=0.04)  # with other noise
    run_ranks(2, run_command, f"--resume={run}", "--epochs=4")
    assert runs.load_checkpoint(run)[1]["epoch"] == 4


def train_models_of_their_own(data: ImageData) -> None:
    train.draw = lambda *args: None
    with utils.process_group():
        rank, _ = utils.rank_and_ranks()
        torch.manual_seed(rank)
        options = {"batch_size": 128, "epochs": 1, "device": "cpu", "out_dir": "runs"}
        model, _, _ = train.train(data, VAE(784, 8, 2), **options)
        torch.save(model.state_dict(), f"weights-{rank}.pt")


def test_all_ranks_train_the_first_ones_weights(digits: ImageData):
    """Three share the last batch of 116 images."""
    run_ranks(3, train_models_of_their_own, thinned(digits, 10))
    first, *others = (torch.load(f"weights-{rank}.pt") for rank in range(3))
    for weights in others:
        for name, weight in first.items():
            torch.testing.assert_close(weights[name], weight)


def test_a_rank_that_dies_ends_the_job_and_leaves_a_good_checkpoint(tmp_path: Path, digits: ImageData):
    torch.save(thinned(digits, 10), "digits.pt")
    (tmp_path / "script.py").write_text(
        HEADER
        + """
train_epoch = train.train_epoch
def dying(*args):
    if args[6] == 3 and os.environ["RANK"] == "1":
        os._exit(9)
    return train_epoch(*args)
train.train_epoch = dying
train.main()
"""
    )
    done = torchrun(2, tmp_path / "script.py", *ARGS, "--epochs=50", f"--out-dir={tmp_path / 'runs'}")
    assert done.returncode != 0
    assert runs.load_checkpoint(tmp_path / "runs" / "001-mnist-5k-z4")[1]["epoch"] == 2


def load_in_turn() -> None:
    """Reads a data set that the first process takes a while to download."""
    downloaded, rank = Path("downloaded"), os.environ["LOCAL_RANK"]

    def load(*args: object, **kwargs: object) -> ImageData:
        if rank == "0":
            time.sleep(0.5)
            downloaded.touch()
        assert downloaded.exists()
        return torch.load("digits.pt", weights_only=False)

    data.load_named = load
    with utils.process_group():
        assert len(data.load_dataset("mnist").train_images) == 5000


def test_the_first_process_downloads_for_the_others():
    run_ranks(2, load_in_turn)
