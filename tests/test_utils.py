"""Devices, checkpoints and run folders."""

import itertools
from pathlib import Path

import pytest
import torch

import runs
import utils
from model import VAE
from utils import UserError

# ---------------------------------------------------------------------------------------------------------------------
# Devices and seeds


def test_auto_prefers_cuda_then_mps_then_cpu(monkeypatch: pytest.MonkeyPatch):
    for cuda, mps in itertools.product([True, False], repeat=2):
        monkeypatch.setattr("torch.cuda.is_available", lambda cuda=cuda: cuda)
        monkeypatch.setattr("torch.cuda.device_count", lambda cuda=cuda: int(cuda))
        monkeypatch.setattr("torch.backends.mps.is_available", lambda mps=mps: mps)
        assert utils.choose_device("auto").type == ("cuda" if cuda else "mps" if mps else "cpu")
        for name, available in (("cuda", cuda), ("mps", mps), ("cpu", True)):
            if available:
                assert utils.choose_device(name).type == name
            else:
                with pytest.raises(UserError, match=name):
                    utils.choose_device(name)


def test_several_processes_use_gpus_if_each_has_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert utils.choose_device("auto").type == "cuda"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert utils.choose_device("auto").type == "cpu"
    with pytest.raises(UserError, match="no cuda device for each of 3 processes"):
        utils.choose_device("cuda")


def test_every_seed_epoch_and_rank_has_draws_of_its_own():
    draws = set()
    for place in itertools.product(range(3), range(3), range(3)):
        utils.seed_epoch(*place)
        first = torch.rand(3)
        utils.seed_epoch(*place)
        assert torch.equal(first, torch.rand(3))
        draws.add(tuple(first.tolist()))
    assert len(draws) == 27


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints and run folders


SMALL = {"model": {"input_size": 4}, "model_state_dict": VAE(4).state_dict()}


@pytest.mark.parametrize(
    "content",
    [
        {"model": {"input_size": 4}},
        SMALL | {"model": {"input_size": 4, "depth": 3}},
        SMALL | {"model": {"input_size": 5}},
        SMALL | {"model": [4, 2, 1]},
        SMALL | {"model_state_dict": 3},
        SMALL | {"model_state_dict": dict.fromkeys(VAE(4).state_dict(), 0)},
        [1, 2, 3],
    ],
)
def test_not_a_checkpoint(content: object, tmp_path: Path):
    torch.save(content, tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match="is not a checkpoint of this VAE"):
        runs.load_checkpoint(tmp_path)


def test_no_checkpoint(tmp_path: Path):
    for path in (tmp_path, tmp_path / "missing", tmp_path / "missing.pt"):
        with pytest.raises(UserError, match="no checkpoint at"):
            runs.load_checkpoint(path)


def test_run_folders_count_on(tmp_path: Path):
    out_dir = tmp_path / "deep" / "runs"
    assert runs.new_run_folder(out_dir, "mnist", 20) == out_dir / "001-mnist-z20"
    assert runs.new_run_folder(out_dir, "mnist-5k", 2) == out_dir / "002-mnist-5k-z2"
    for name in ("041-mine", "999-x", "notes"):
        (out_dir / name).mkdir()
    assert runs.new_run_folder(out_dir, "mnist", 20) == out_dir / "1000-mnist-z20"
    assert runs.new_run_folder(out_dir, "../a/b\\c\n", 2) == out_dir / "1001-.._a_b_c_-z2"

    with pytest.raises(UserError, match="train one"):
        runs.checkpoint_path(out_dir)
    for name in ("002-mnist-5k-z2", "1000-mnist-z20", "041-mine"):
        (out_dir / name / "checkpoint.pt").touch()
    assert runs.checkpoint_path(out_dir) == out_dir / "1000-mnist-z20" / "checkpoint.pt"


def test_weights_in_any_layout_and_buffers_that_are_not_saved(tmp_path: Path):
    class Convolving(VAE):
        def __init__(self, input_size: int = 16):
            super().__init__(input_size, 4, 2)
            self.conv = torch.nn.Conv2d(3, 3, 2).to(memory_format=torch.channels_last)
            self.register_buffer("scale", torch.tensor(2.0), persistent=False)

    model = Convolving()
    runs.save_checkpoint(
        tmp_path / "model.pt",
        {"class": "mine.Convolving", "model": {"input_size": 16}, "model_state_dict": model.state_dict()},
    )
    loaded, _ = runs.load_checkpoint(tmp_path / "model.pt", Convolving)
    assert loaded.scale == 2
    assert torch.equal(loaded.conv.weight, model.conv.weight)
