"""Devices, checkpoints and run folders."""

import errno
import itertools
import os
import pickle
import signal
import stat
from pathlib import Path

import pytest
import torch

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


def test_several_processes_use_gpus_where_each_has_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert utils.choose_device("auto").type == "cuda"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert utils.choose_device("auto").type == "cpu"
    with pytest.raises(UserError, match="no cuda device for each of 3 processes"):
        utils.choose_device("cuda")


def test_every_epoch_of_every_seed_has_draws_of_its_own():
    draws = set()
    for seed, epoch in itertools.product(range(5), range(5)):
        utils.seed_epoch(seed, epoch)
        first = torch.rand(3)
        utils.seed_epoch(seed, epoch)
        assert torch.equal(first, torch.rand(3))
        draws.add(tuple(first.tolist()))
    assert len(draws) == 25


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_graph_calls_its_function():
    state = torch.zeros(3, device="cuda")

    def function(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        state.add_(x.sum())
        return x * scale + torch.rand(len(x), device="cuda")

    call = utils.CudaGraph(function)
    results = []
    for i in range(8):
        x = torch.full((5 if i % 3 else 4,), float(i), device="cuda")
        results.append(call(x, torch.tensor(10.0, device="cuda")).tolist())
    assert state.tolist() == [sum(i * (5 if i % 3 else 4) for i in range(8))] * 3
    for i, result in enumerate(results):
        assert len(result) == (5 if i % 3 else 4)
        assert all(10 * i <= value < 10 * i + 1 for value in result)
    draws = [value % 1 for result in results for value in result]
    assert len(set(draws)) == len(draws)


def test_a_command_leaves_signals_as_they_were():
    def handler(*_: object) -> None:
        pass

    previous = signal.signal(signal.SIGTERM, handler)
    try:
        utils.command(lambda: None)()
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, previous)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints and run folders


def test_write_atomically_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "file"
    utils.write_atomically(path, b"old")

    def full_disk(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        utils.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_on_the_disk_before_its_name_and_then_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """So that after a power cut either the old or the new file is there, whole."""
    done, replace = [], os.replace
    monkeypatch.setattr("os.fsync", lambda fd: done.append("folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file"))
    monkeypatch.setattr("os.replace", lambda *paths: done.append("name") or replace(*paths))
    utils.write_atomically(tmp_path / "file", b"new")
    assert done == ["file", "name", "folder"]


def test_a_reader_never_sees_half_a_file(tmp_path: Path):
    path = tmp_path / "file"
    (tmp_path / f".file.{os.getpid()}.part").write_text("left by a killed process of this number")
    utils.write_atomically(path, b"old")
    with open(path, "rb") as reader:
        utils.write_atomically(path, b"new")
        assert reader.read() == b"old"
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_original_checkpoint(tmp_path: Path):
    """As the original repository writes it: three keys, and the published parameter names."""
    vae = VAE(784, 32, 4)
    optimizer = torch.optim.Adam(vae.parameters())
    vae(torch.rand(2, 784))[0].sum().backward()
    optimizer.step()
    checkpoint = {
        "model_state_dict": vae.state_dict(),
        "optimizer_state_dict": optimizer.state_dict(),
        "model": {"input_size": 784, "hidden_size": 32, "latent_size": 4},
    }
    torch.save(checkpoint, tmp_path / "original.pt")
    loaded, _ = utils.load_checkpoint(tmp_path / "original.pt")
    x = torch.rand(3, 784)
    assert torch.equal(loaded.reconstruct(x), vae.reconstruct(x))


class RunsCode:
    def __reduce__(self) -> tuple:
        return os.system, ("touch owned",)


@pytest.mark.parametrize(
    "content",
    [
        {"model": {"input_size": 4}},
        {"model": {"input_size": 4, "hidden_size": 0, "latent_size": 1}, "model_state_dict": {}},
        {"model": {"input_size": 4, "hidden_size": 2, "latent_size": 1}, "model_state_dict": {}},
        {"model": {"input_size": 4, "depth": 3}, "model_state_dict": VAE(4).state_dict()},
        {"model": {"input_size": 5}, "model_state_dict": VAE(4).state_dict()},
        {"model": [4, 2, 1], "model_state_dict": VAE(4).state_dict()},
        {"model": {"input_size": 4}, "model_state_dict": 3},
        {"model": {}, "model_state_dict": VAE().state_dict(), "options": [1]},
        {"model": {}, "model_state_dict": VAE().state_dict(), "options": {"dataset": ["mnist"]}},
        {"model": {}, "model_state_dict": VAE().state_dict(), "options": {"binarize": ["dynamic"]}},
        {"model": {}, "model_state_dict": VAE().state_dict(), "epoch": "3"},
        {"model": {}, "model_state_dict": VAE().state_dict(), "epoch": -1},
        {"model": {}, "model_state_dict": VAE().state_dict(), "checksum": torch.zeros(0)},
        {"model": {}, "model_state_dict": VAE().state_dict(), "epoch": 2**40},
        {"model": {}, "model_state_dict": {name: weight.int() for name, weight in VAE().state_dict().items()}},
        {"model": {"hidden_size": 2**30}, "model_state_dict": VAE().state_dict()},
        {"model": {}, "model_state_dict": {name: weight * torch.nan for name, weight in VAE().state_dict().items()}},
        [1, 2, 3],
        7,
    ],
)
def test_not_a_checkpoint(content: object, tmp_path: Path):
    torch.save(content, tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match="is not a checkpoint of this VAE"):
        utils.load_checkpoint(tmp_path)


def test_damaged_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "checkpoint.pt"
    vae = VAE(4, 2, 1)
    utils.save_checkpoint(path, {"model": vae.config, "model_state_dict": vae.state_dict()})
    whole = path.read_bytes()
    assert utils.load_checkpoint(path)[0].config == vae.config
    for length in range(0, len(whole), len(whole) // 25):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="damaged"):
            utils.load_checkpoint(path)
    monkeypatch.chdir(tmp_path)
    path.write_bytes(pickle.dumps(RunsCode(), protocol=2))
    with pytest.raises(UserError, match="damaged"):
        utils.load_checkpoint(path)
    torch.save({"model": RunsCode()}, path)
    with pytest.raises(UserError, match="damaged"):
        utils.load_checkpoint(path)
    assert not Path("owned").exists()


def test_no_checkpoint(tmp_path: Path):
    for path in (tmp_path, tmp_path / "missing", tmp_path / "missing.pt"):
        with pytest.raises(UserError, match="no checkpoint at"):
            utils.checkpoint_path(path)


def test_run_folders_count_on(tmp_path: Path):
    runs = tmp_path / "deep" / "runs"
    assert utils.new_run_folder(runs, "mnist", 20) == runs / "001-mnist-z20"
    assert utils.new_run_folder(runs, "mnist-5k", 2) == runs / "002-mnist-5k-z2"
    (runs / "041-mine").mkdir()
    (runs / "notes").mkdir()
    assert utils.new_run_folder(runs, "mnist", 20) == runs / "042-mnist-z20"
    (runs / "1000-mnist-z2").mkdir()
    assert utils.new_run_folder(runs, "mnist", 20).name == "1001-mnist-z20"

    assert utils.new_run_folder(runs, "../a/b\\c\n", 2) == runs / "1002-.._a_b_c_-z2"
    assert utils.new_run_folder(runs, "é" * 1000, 2).parent == runs

    with pytest.raises(UserError, match="train one"):
        utils.newest_run(runs)
    for name in ("002-mnist-5k-z2", "1000-mnist-z2", "042-mnist-z20"):
        (runs / name / "checkpoint.pt").touch()
    assert utils.newest_run(runs).name == "1000-mnist-z2"
    with pytest.raises(UserError, match="train one"):
        utils.newest_run(tmp_path / "nowhere")
