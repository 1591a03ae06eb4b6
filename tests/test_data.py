"""Data sets and binarization."""

import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10

from data import DataUnavailable, ImageData, draw_bits, inputs_and_targets, load_dataset
from measure import make_test_set
from utils import UserError

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
    raw.mkdir(parents=True, exist_ok=True)
    arrays, random = {}, np.random.default_rng(0)
    for part, n in (("train", num_train), ("test", num_test)):
        prefix = f"emnist-digits-{part}" if name == "emnist-digits" else {"train": "train", "test": "t10k"}[part]
        arrays[part] = random.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        labels = (np.arange(n) % 10).astype(np.uint8)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(struct.pack(">4I", 2051, n, 28, 28) + arrays[part].tobytes())
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 2049, n) + labels.tobytes())
    return arrays


# ---------------------------------------------------------------------------------------------------------------------
# Data sets


def test_mnist_5k_is_the_beginning_of_mnist(digits: ImageData):
    assert (digits.name, digits.classes) == ("mnist-5k", list("0123456789"))
    assert (digits.train_images.shape, digits.test_images.shape) == ((5000, 1, 28, 28), (1000, 1, 28, 28))
    assert digits.train_labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert digits.test_labels[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    assert digits.train_images.float().mean() / 255 == pytest.approx(0.1307, abs=0.002)  # of all 60,000
    means = torch.stack([digits.train_images[digits.train_labels == i].float().mean(0).flatten() for i in range(10)])
    nearest = torch.cdist(digits.test_images.flatten(1).float(), means).argmin(1)
    assert (nearest == digits.test_labels).float().mean() > 0.75


@pytest.mark.parametrize("name", FOLDERS)
def test_torchvision_sets(name: str, tmp_path: Path, no_network: None):
    arrays = lay_out(tmp_path, name)
    data = load_dataset(name, tmp_path)
    train, test = arrays["train"], arrays["test"]
    if name == "emnist-digits":  # the files hold the images with rows and columns exchanged
        train, test = train.transpose(0, 2, 1), test.transpose(0, 2, 1)
    assert np.array_equal(data.train_images, train[:, None])
    assert np.array_equal(data.test_images, test[:, None])
    assert data.train_images.dtype == torch.uint8
    assert data.train_labels.tolist() == [i % 10 for i in range(30)]
    assert (data.name, len(data.classes)) == (name, 10)
    assert data.classes == list("0123456789") or name in ("fashion-mnist", "kmnist")


CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


@pytest.fixture
def write_in_colour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., np.ndarray]:
    """Writes random images in the file format of cifar10 or svhn -> the arrays (N, 3, 32, 32) of the part written."""

    def write(name: str, part: str) -> np.ndarray:
        images = np.random.default_rng(len(part)).integers(0, 256, (20, 3, 32, 32), dtype=np.uint8)
        labels = np.arange(20) % 10
        if name == "svhn":
            labels[labels == 0] = 10  # as its files have it
            arrays = {"X": images.transpose(2, 3, 1, 0), "y": labels[:, None]}
            pytest.importorskip("scipy.io").savemat(tmp_path / f"{part}_32x32.mat", arrays)
            return images
        folder = tmp_path / "cifar-10-batches-py"
        folder.mkdir(exist_ok=True)
        files = {f"{part}_batch": {"data": images.reshape(20, 3072), "labels": labels.tolist()}}
        for file, content in (files | {"batches.meta": {"label_names": CIFAR10_CLASSES}}).items():
            (folder / file).write_bytes(pickle.dumps(content))
        return images

    monkeypatch.setattr("torchvision.datasets.CIFAR10.train_list", [["train_batch", None]])  # with any checksum
    monkeypatch.setattr("torchvision.datasets.CIFAR10.test_list", [["test_batch", None]])
    monkeypatch.setattr("torchvision.datasets.CIFAR10.meta", CIFAR10.meta | {"md5": None})
    files = {part: [None, f"{part}_32x32.mat", None] for part in ("train", "test")}
    monkeypatch.setattr("torchvision.datasets.SVHN.split_list", files)
    return write


@pytest.mark.parametrize(("name", "classes"), [("cifar10", CIFAR10_CLASSES), ("svhn", list("0123456789"))])
def test_sets_in_colour(name: str, classes: list[str], write_in_colour: Callable, tmp_path: Path, no_network: None):
    train, test = write_in_colour(name, "train"), write_in_colour(name, "test")
    data = load_dataset(name, tmp_path)
    assert (data.name, data.classes, data.shape) == (name, classes, (3, 32, 32))
    assert np.array_equal(data.train_images, train)
    assert np.array_equal(data.test_images, test)
    assert data.train_labels.tolist() == data.test_labels.tolist() == [i % 10 for i in range(20)]
    gray = load_dataset(name, tmp_path, channels=1)
    assert gray.shape == (1, 32, 32)
    red, green, blue = train.astype(float).transpose(1, 0, 2, 3)
    assert abs(gray.train_images[:, 0].numpy() - (0.299 * red + 0.587 * green + 0.114 * blue)).max() < 0.51
    for file in tmp_path.rglob("test*"):
        file.write_bytes(b"not to be read")
    held = load_dataset(name, tmp_path, hold_out=4)
    assert np.array_equal(held.test_images, train[-4:])


@pytest.mark.parametrize("name", [*FOLDERS, "cifar10", "svhn"])
def test_a_named_set_never_falls_back(name: str, tmp_path: Path, no_network: None):
    for _ in range(2):
        with pytest.raises(DataUnavailable, match=f"no intact copy of {name}.*network is unreachable"):
            load_dataset(name, tmp_path)
        (tmp_path / "train_32x32.mat").write_bytes(b"damaged")
        (tmp_path / "cifar-10-batches-py").mkdir(exist_ok=True)
        (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"damaged")


def test_auto_is_mnist_where_it_is_and_else_falls_back_with_one_warning(tmp_path, no_network: None, capsys):
    assert load_dataset("auto", tmp_path).name == "mnist-5k"
    warning = capsys.readouterr().err
    assert warning.startswith("warning: ")
    assert warning.count("\n") == 1
    assert "network is unreachable" in warning
    lay_out(tmp_path, "mnist")
    assert load_dataset("auto", tmp_path).name == "mnist"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("part", "content"),
    [
        ("train-images-idx3-ubyte", bytes(25)),
        ("t10k-labels-idx1-ubyte", b""),
        ("train-images-idx3-ubyte", struct.pack(">4I", 2051, 30, 14, 56) + bytes(30 * 784)),
        ("train-labels-idx1-ubyte", struct.pack(">2I", 2049, 29) + bytes(29)),
        ("train-labels-idx1-ubyte", struct.pack(">2I", 2049, 30) + bytes([10] * 30)),
    ],
)
def test_damaged_files(part: str, content: bytes, tmp_path: Path, no_network: None):
    lay_out(tmp_path, "mnist")
    (tmp_path / "MNIST" / "raw" / part).write_bytes(content)
    for name in ("auto", "mnist"):
        with pytest.raises(UserError, match="damaged") as error:
            load_dataset(name, tmp_path)
        assert not isinstance(error.value, DataUnavailable)


# ---------------------------------------------------------------------------------------------------------------------
# Binarization


def test_dynamic_samples_with_the_gray_values_probability():
    gray = torch.arange(256, dtype=torch.uint8)
    images = gray.expand(20_000, 256)
    inputs, targets = inputs_and_targets(images, "dynamic")
    assert torch.equal(inputs, targets)
    assert set(inputs.unique().tolist()) == {0.0, 1.0}
    p = gray / 255
    tolerance = 5 * (p * (1 - p) / len(images)).sqrt()
    assert torch.all((inputs.mean(0) - p).abs() <= tolerance)  # 0 and 255 exactly
    again, _ = inputs_and_targets(images, "dynamic")
    assert not torch.equal(inputs, again)


def test_a_gpus_bits_are_as_evenly_spread_as_a_cpus(monkeypatch: pytest.MonkeyPatch):
    """With PyTorch's generator for the CPU in the place of the GPU's."""
    randint = torch.randint
    monkeypatch.setattr(torch, "randint", lambda *args, device, **how: randint(*args, **how))
    for device in ("cpu", "cuda"):
        bits = draw_bits(torch.Size([3, 40_001]), torch.device(device))
        assert (bits.shape, bits.dtype) == ((3, 40_001), torch.int16)
        counts = torch.histc(bits.float(), 8, -(2**15), 2**15)
        torch.testing.assert_close(counts, torch.full((8,), 120_003 / 8), rtol=0.05, atol=0)


def test_threshold_and_none():
    images = torch.tensor([[0, 127, 128, 255]], dtype=torch.uint8)
    inputs, targets = inputs_and_targets(images, "threshold")
    assert inputs.tolist() == (images / 255).tolist()
    assert targets.tolist() == [[0, 0, 1, 1]]
    inputs, targets = inputs_and_targets(images, "none")
    assert torch.equal(inputs, images / 255)
    assert torch.equal(targets, images / 255)


def test_the_test_set_has_the_sample_that_figures_were_published_for(digits: ImageData):
    """16 bits for each pixel from NumPy's Mersenne twister. Any other sample would move every figure in the README."""
    state, images = torch.get_rng_state(), digits.test_images
    inputs, targets = inputs_and_targets(images, "dynamic", torch.Generator().manual_seed(0))
    assert torch.equal(state, torch.get_rng_state())
    words = np.random.RandomState(0).randint(0, 2**32, images.numel() // 2, dtype=np.uint32)
    low_words_first = words.reshape(-1, 2)[:, ::-1].astype("<u4")
    draws = np.frombuffer(low_words_first.tobytes(), "<i2").reshape(images.shape) + 2.0**15
    assert torch.equal(inputs, targets)
    assert np.array_equal(inputs, draws < images.numpy() * (2**16 / 255))
    assert torch.equal(make_test_set(digits, "dynamic").targets, targets)
