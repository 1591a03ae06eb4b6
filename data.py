"""Data sets as tensors of bytes, and their binarization."""

import functools
import os
import socket
import sys
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from utils import UserError, one_line, rank_and_ranks

DATASETS = ("auto", "mnist", "mnist-5k", "fashion-mnist", "kmnist", "emnist-digits", "cifar10", "svhn")
BINARIZE = ("dynamic", "threshold", "none")
MNIST_5K = Path(__file__).parent / "assets" / "mnist-5k.npz"


class DataUnavailable(UserError):
    """A data set is not in the data folder and cannot be downloaded."""


@dataclass(frozen=True)
class ImageData:
    """Images of one size with their classes. Raises UserError for tensors of other types or shapes than these."""

    name: str  # of the data set that was loaded, so never "auto"
    classes: list[str]  # the labels' names
    train_images: Tensor  # (N, C, H, W) uint8, or (N, H, W) for one channel
    train_labels: Tensor  # (N,) int64
    test_images: Tensor
    test_labels: Tensor
    num_held_out: int = 0  # if not 0, the test images are training images that hold_out put aside

    def __post_init__(self) -> None:
        for part in ("train", "test"):
            images, labels = getattr(self, f"{part}_images"), getattr(self, f"{part}_labels")
            check_bytes(images, f"the {part} images of {self.name}")
            if images.dim() == 3:
                images = images[:, None]
                object.__setattr__(self, f"{part}_images", images)
            if images.dim() != 4 or len(images) < 2 or images.numel() == 0:
                shape = tuple(images.shape)
                raise UserError(f"the {part} images of {self.name} must be (N, C, H, W) with N > 1, not {shape}")
            fits = isinstance(labels, Tensor) and labels.dtype == torch.int64 and labels.shape == images.shape[:1]
            if not (fits and 0 <= labels.min() <= labels.max() < len(self.classes)):
                raise UserError(f"the {part} labels of {self.name} must be (N,) int64 in [0, {len(self.classes) - 1}]")
        if self.train_images.shape[1:] != self.test_images.shape[1:]:
            raise UserError(f"the training and test images of {self.name} must be of the same size")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        return tuple(self.train_images.shape[1:])

    @property
    def input_size(self) -> int:
        """C * H * W, the number of values of an image."""
        return self.train_images[0].numel()

    def hold_out(self, n: int) -> "ImageData":
        """Puts the last n training images (of a fixed shuffle if they are sorted by label) in the test set's place.

        Changes nothing if n are held out already. Raises UserError unless at least two are held out and two are left.
        """
        if n == self.num_held_out:
            return self
        num_left = len(self.train_images) - n
        if n < 2 or num_left < 2:
            raise UserError(f"--hold-out must be from 2 to {len(self.train_images) - 2} for {self.name}, not {n}")
        order = torch.arange(len(self.train_images))
        if (self.train_labels.diff() >= 0).all():
            order = torch.randperm(len(order), generator=torch.Generator().manual_seed(0))
        parts = [part[side] for side in order.split([num_left, n]) for part in (self.train_images, self.train_labels)]
        return ImageData(self.name, self.classes, *parts, num_held_out=n)

    def checksum(self) -> int:
        """CRC-32 of the images and their shapes, which detects changed data."""
        checksum = 0
        for images in (self.train_images, self.test_images):
            checksum = zlib.crc32(repr(tuple(images.squeeze(1).shape)).encode(), checksum)
            checksum = zlib.crc32(images.cpu().contiguous().numpy(), checksum)
        return checksum


def load_dataset(
    name: str = "auto",
    data_dir: str | Path = "data",
    image_size: int | None = None,
    hold_out: int = 0,
    channels: int | None = None,
) -> ImageData:
    """Loads one of DATASETS, a folder of pictures or an .npz file.

    torchvision downloads into data_dir what is missing there. "auto" is mnist, or mnist-5k after a warning if mnist is
    unavailable. Pictures from a folder become square, image_size wide (28 by default). An .npz file has uint8 images
    (N, H, W), and may have labels (N,). With hold_out, the last hold_out training images
    take the test set's place, and the test set is not read. channels=1 turns colour into gray, channels=3 gray into
    RGB. Raises UserError for a damaged file or an unknown name, DataUnavailable for a failed download.
    """
    if image_size and (name in DATASETS or Path(name).is_file()):
        raise UserError(f"--image-size is for a folder of images: those of {name} keep their size")
    arguments = name, Path(data_dir), image_size or 28, hold_out, channels
    if rank_and_ranks()[1] == 1:
        return _load(*arguments)
    group = dist.new_group(backend="gloo", timeout=timedelta(hours=2))
    is_first = os.environ["LOCAL_RANK"] == "0"  # on this machine, so it downloads for the others
    for turn in (True, False):
        if is_first == turn:
            dataset = _load(*arguments)
        dist.barrier(group)
    return dataset


def _load(name: str, data_dir: Path, image_size: int, hold_out: int, channels: int | None) -> ImageData:
    """Does load_dataset's work in one process."""
    data = _load_named(name, data_dir, hold_out) if name in DATASETS else _load_path(Path(name), image_size)
    images = {part: to_channels(getattr(data, part), channels) for part in ("train_images", "test_images")}
    return replace(data, **images).hold_out(hold_out)


def to_channels(images: Tensor, channels: int | None) -> Tensor:
    """Converts (N, C, H, W) uint8 to gray (1 channel, ITU-R 601 luminance) or to RGB (3). None leaves it as it is."""
    if channels == 1 and images.shape[1] == 3:
        red, green, blue = images.int().unbind(1)
        return ((19595 * red + 38470 * green + 7471 * blue + 2**15) >> 16).to(torch.uint8)[:, None]  # as PIL rounds
    return images if channels is None else images.expand(-1, channels, -1, -1).contiguous()


def channels_first(images: Tensor) -> Tensor | None:
    """(N, H, W), (N, H, W, C) or else (N, C, H, W), where C is 1 or 3 -> (N, C, H, W). None for other shapes."""
    if images.dim() == 3:
        return images[:, None]
    if images.dim() == 4 and images.shape[3] in (1, 3):
        return images.permute(0, 3, 1, 2).contiguous()
    return images.contiguous() if images.dim() == 4 and images.shape[1] in (1, 3) else None


def _load_named(name: str, data_dir: Path, hold_out: int) -> ImageData:
    """Loads one of DATASETS. With hold_out, the training images may stand in the test set's place until held out."""
    if data_dir.exists() and not data_dir.is_dir():
        raise UserError(f"--data-dir {data_dir} is a file, not a folder")
    if name != "mnist-5k":
        try:
            return _load_from_torchvision("mnist" if name == "auto" else name, data_dir, hold_out)
        except DataUnavailable as reason:
            if name != "auto":
                raise
            what = "Using mnist-5k, the bundled 5,000 + 1,000 digits; results differ from those on the full MNIST"
            print(f"warning: {reason}. {what}", file=sys.stderr)
    with np.load(MNIST_5K) as arrays:
        keys = ("train_images", "train_labels", "test_images", "test_labels")
        parts = [torch.from_numpy(arrays[key]) for key in keys]
    return ImageData("mnist-5k", list("0123456789"), *parts)


# ---------------------------------------------------------------------------------------------------------------------
# torchvision's data sets


def _load_from_torchvision(name: str, data_dir: Path, hold_out: int) -> ImageData:
    try:
        from torchvision import datasets
    except (ImportError, RuntimeError) as error:  # RuntimeError: it was built for another version of torch
        reason = f"{name} needs torchvision, which fails to import ({one_line(error)})"
        raise DataUnavailable(f"{reason}: pip install -r requirements.txt") from error
    kinds = {"mnist": datasets.MNIST, "fashion-mnist": datasets.FashionMNIST, "kmnist": datasets.KMNIST}
    kinds |= {"emnist-digits": functools.partial(datasets.EMNIST, split="digits"), "cifar10": datasets.CIFAR10}
    kind, shape = kinds.get(name, datasets.SVHN), (3, 32, 32) if name in ("cifar10", "svhn") else (1, 28, 28)
    tensors = []
    for train in (True, bool(hold_out)):  # with hold_out, the training images stand in the test set's place
        which = {"split": "train" if train else "test"} if name == "svhn" else {"train": train}
        try:
            part = _read_or_download(functools.partial(kind, str(data_dir), **which), name, data_dir)
            images, classes = channels_first(torch.as_tensor(part.data)), getattr(part, "classes", list("0123456789"))
            labels = torch.as_tensor(part.labels if name == "svhn" else part.targets)
            if images is None or images.shape != (len(labels), *shape) or not 0 <= labels.max() < len(classes):
                raise ValueError
        except ImportError as error:
            raise DataUnavailable(f"{name} needs scipy ({one_line(error)}): pip install scipy") from error
        except (AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
            how = "delete them, and the next run downloads them again"
            raise UserError(f"the files of {name} in {data_dir} are damaged: {how}") from error
        if name == "emnist-digits":  # stored with rows and columns exchanged
            images = images.transpose(2, 3)
        tensors += [images.contiguous(), labels]
    classes = [label.split(" - ")[0] for label in classes]  # torchvision's MNIST says "0 - zero"
    return ImageData(name, classes, *tensors)


def _read_or_download(construct: Callable[..., Any], name: str, data_dir: Path) -> Any:
    """Downloads only if files are missing, so that damaged files are reported as such."""
    try:
        return construct()
    except RuntimeError as error:
        if "not found" not in str(error):
            raise
    default_timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)  # torchvision sets none and would wait forever behind some firewalls
    try:
        return construct(download=True)
    except (RuntimeError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]  # of the last mirror
        message = f"the folder {data_dir} has no intact copy of {name}, and the download failed ({reason})"
        raise DataUnavailable(message) from error
    finally:
        socket.setdefaulttimeout(default_timeout)


# ---------------------------------------------------------------------------------------------------------------------
# Your own images


def _load_path(path: Path, image_size: int) -> ImageData:
    """Uses a folder's train and test folders if it has both. Otherwise sets about a tenth of the images aside."""
    name = path.resolve().name if path.is_dir() else path.stem
    if (path / "train").is_dir() and (path / "test").is_dir():
        classes, _, *train = _read_folder(path / "train", name, image_size)
        test_classes, _, images, labels = _read_folder(path / "test", name, image_size)
        if unknown := sorted(set(test_classes) - set(classes)):
            raise UserError(f"{path / 'test'} has classes that {path / 'train'} lacks: {', '.join(unknown)}")
        return ImageData(name, classes, *train, images, torch.tensor([classes.index(test_classes[i]) for i in labels]))
    if path.is_dir():
        classes, keys, images, labels = _read_folder(path, name, image_size)
    elif path.suffix == ".npz" and path.is_file():
        classes, keys, images, labels = _read_npz(path)
    else:
        what = "is neither a folder nor an .npz file" if path.exists() else "is not a known data set, nor a path"
        choices = f"{', '.join(DATASETS)}, a folder of images or an .npz file"
        raise UserError(f"--dataset {path} {what}: choose from {choices}")
    if len(images) < 4:
        raise UserError(f"{path} holds {len(images)} images: training and testing need at least two each")
    # Split by a hash of the name (in an .npz file, of the index), so that no image changes sides when others are added
    hashes = torch.tensor([zlib.crc32(key.encode()) for key in keys])
    is_test = hashes % 10 == 0
    if is_test.sum() < 2:  # among very few images
        is_test = hashes <= hashes.sort().values[1]
    return ImageData(name, classes, images[~is_test], labels[~is_test], images[is_test], labels[is_test])


def _read_folder(folder: Path, name: str, size: int) -> tuple[list[str], list[str], Tensor, Tensor]:
    """Reads a folder's classes (its folders, or else `name`), file names, images (N, 1, size, size) and labels (N,)."""
    from PIL import Image
    from torchvision import datasets

    folder = folder.resolve()
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    beside = [path for path in folder.iterdir() if path.suffix.lower() in datasets.folder.IMG_EXTENSIONS]
    if classes and beside:
        raise UserError(f"{folder} holds folders, which would be classes, and images beside them, such as {beside[0]}")
    root, folders = (folder, classes) if classes else (folder.parent, [folder.name])
    try:
        indices = {name: i for i, name in enumerate(folders)}
        files = datasets.ImageFolder.make_dataset(str(root), indices, datasets.folder.IMG_EXTENSIONS)
    except FileNotFoundError as error:
        raise UserError(f"{folder} is not a folder of images: {one_line(error)}") from error
    images = torch.empty(len(files), 1, size, size, dtype=torch.uint8)
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
    if picture.mode.startswith("I;16"):  # PIL would clip at 255
        picture = Image.fromarray((np.array(picture) // 256).astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise ValueError("its pixels have 32 bits, with no fixed value for white")
    if picture.has_transparency_data:
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA"))
    return np.array(ImageOps.fit(picture.convert("L"), (size, size)))


def _read_npz(path: Path) -> tuple[list[str], Iterable[str], Tensor, Tensor]:
    """Reads an .npz file's classes (without labels, its name), places, images (N, H, W) and labels (N,)."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            arrays = {key: arrays[key] for key in ("images", "labels") if key in arrays}
    except Exception as error:  # numpy does not document what it raises for a damaged file
        raise UserError(f"{path} is damaged, or not an .npz file of plain arrays ({one_line(error)})") from error
    if "images" not in arrays:
        raise UserError(f"{path} has no array named images")
    images = arrays["images"]
    if images.dtype != np.uint8 or images.ndim != 3 or 0 in images.shape:
        raise UserError(f"{path}: images must be (N, H, W) of type uint8, not {images.shape} of type {images.dtype}")
    labels = arrays.get("labels", np.full(len(images), path.stem))
    if labels.shape != images.shape[:1]:
        raise UserError(f"{path}: labels must be ({len(images)},), one per image, not {labels.shape}")
    classes, labels = np.unique(labels, return_inverse=True)
    places = map(str, range(len(images)))
    return [str(label) for label in classes], places, torch.from_numpy(images), torch.from_numpy(labels).long()


# ---------------------------------------------------------------------------------------------------------------------
# Binarization


def binarize(
    images: Tensor, mode: str, generator: torch.Generator | None = None, bits: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Turns uint8 images into float input and target, both in [0, 1] and of the same shape.

    dynamic: both are one Bernoulli sample with the gray values as probabilities (Burda et al. 2016), from the generator
    or from bits that draw_bits made. threshold: gray input, target gray > 0.5. none: both gray, for which a Bernoulli
    is not a likelihood. Raises ValueError for another mode, and UserError as check_bytes does.
    """
    check_bytes(images, "images")
    if mode == "dynamic":
        uniform = (draw_bits(images.shape, images.device, generator) if bits is None else bits) + 2.0**15
        sample = torch.empty(images.shape, device=images.device)
        torch.lt(uniform, images * (2**16 / 255), out=sample)  # 0 is never on, and 255 always
        return sample, sample
    gray = images / 255
    if mode == "threshold":
        return gray, (gray > 0.5).float()
    if mode == "none":
        return gray, gray
    raise ValueError(f"mode must be one of {', '.join(BINARIZE)}, not {mode!r}")


def check_bytes(images: Any, what: str) -> None:
    """Raises UserError unless images are a tensor of bytes. Other types have no fixed value for white."""
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
        how = "for x in [0, 1], use torch.as_tensor(255 * x).round().to(torch.uint8)"
        raise UserError(f"{what} must be a tensor of bytes from 0 to 255 (torch.uint8), not {kind}: {how}")


def draw_bits(shape: torch.Size, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """Draws 16 random bits for each pixel: int16 of that shape, from -2^15 up."""
    if device.type != "cpu":
        return torch.randint(-(2**15), 2**15, shape, generator=generator, device=device, dtype=torch.int16)
    # The CPU's generator is slow, so each call makes 64 bits, for four pixels
    calls = torch.empty(-(-shape.numel() // 4), dtype=torch.int64).random_(-(2**63), None, generator=generator)
    return calls.view(torch.int16)[: shape.numel()].view(shape)


def binarize_test_set(images: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    """Binarizes (N, ...) uint8 with one sample, the same in every run and on every device -> input, target (N, ...)."""
    inputs, targets = binarize(images.cpu(), mode, torch.Generator().manual_seed(0))
    return inputs.to(images.device), targets.to(images.device)
