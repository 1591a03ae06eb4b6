"""Data sets as tensors of bytes, and their binarization."""

import contextlib
import difflib
import functools
import os
import re
import socket
import sys
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from utils import UserError, one_line, raise_unless_damaged, rank_and_ranks

BINARIZED_DATASETS = ("mnist", "mnist-5k", "fashion-mnist", "kmnist", "emnist-digits")  # by default
DATASETS = ("auto", *BINARIZED_DATASETS, "cifar10", "svhn")
BINARIZE = ("dynamic", "threshold", "none")
MNIST_5K = Path(__file__).parent / "assets" / "mnist-5k.npz"
# Folders for training or testing, such as Training, val2017 or x-train, which are never classes; and hidden files
SPLIT = re.compile(r"(?:.*[-_ ])?(train|test|val)(?:ing|id|idation)?[-_ ]?(?:set|data|images|\d*)", re.IGNORECASE)
HIDDEN = re.compile(r"(^|/)(\.|__MACOSX)")
SUFFIXES = (".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


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
    test_names: list[str] | None = None  # of the test images' files, where there are files

    def __post_init__(self) -> None:
        for part in ("train", "test"):
            images = getattr(self, f"{part}_images")
            labels = getattr(self, f"{part}_labels")
            check_bytes(images, f"the {part} images of {self.name}")
            if images.dim() == 3:
                images = images[:, None]
                object.__setattr__(self, f"{part}_images", images)
            if images.dim() != 4 or len(images) < 2 or images.numel() == 0:
                shape = tuple(images.shape)
                raise UserError(f"the {part} images of {self.name} must be (N, C, H, W) with N > 1, not {shape}")
            if images.shape[1] not in (1, 3):
                raise UserError(f"the {part} images of {self.name} must have 1 or 3 channels, not {images.shape[1]}")
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

    def checksums(self) -> dict[str, int]:
        """CRC-32 of the images and their shapes, and of the labels, which detect changed data."""
        of_images = of_labels = 0
        for images in (self.train_images, self.test_images):
            of_images = zlib.crc32(repr(tuple(images.squeeze(1).shape)).encode(), of_images)
            of_images = zlib.crc32(images.cpu().contiguous().numpy(), of_images)
        for labels in (self.train_labels, self.test_labels):
            of_labels = zlib.crc32(labels.cpu().contiguous().numpy(), of_labels)
        return {"checksum": of_images, "labels_checksum": of_labels}


def load_dataset(
    name: str | Path = "auto",
    data_dir: str | Path = "data",
    image_size: int | None = None,
    hold_out: int = 0,
    channels: int | None = None,
) -> ImageData:
    """Loads one of DATASETS, a folder of pictures or an .npz file.

    torchvision downloads into data_dir what is missing there. "auto" is mnist, or mnist-5k after a warning if mnist is
    unavailable. Pictures from a folder become square, image_size wide (28 by default). An .npz file has uint8 images
    (N, H, W), (N, H, W, 3) or (N, 3, H, W), and may have labels (N,). With hold_out, the last hold_out training images
    take the test set's place, and the test set is not read. channels=1 turns colour into gray, channels=3 gray into
    RGB. Raises UserError for a damaged file or an unknown name, DataUnavailable for a failed download.
    """
    if not isinstance(name, str | Path):
        raise UserError(f"dataset must be a name, a path or ImageData, not {type(name).__name__}")
    if image_size and (name in DATASETS or Path(name).is_file()):
        raise UserError(f"--image-size is for a folder of images: those of {name} keep their size")

    def load() -> ImageData:
        if name in DATASETS:
            data = load_named(name, Path(data_dir), hold_out)
        else:
            data = load_path(Path(name), image_size or 28)
        train_images = to_channels(data.train_images, channels)
        test_images = to_channels(data.test_images, channels)
        return replace(data, train_images=train_images, test_images=test_images).hold_out(hold_out)

    if rank_and_ranks()[1] == 1:
        return load()
    group = dist.new_group(backend="gloo", timeout=timedelta(hours=2))
    is_first = os.environ["LOCAL_RANK"] == "0"  # on this machine, so it downloads for the others
    for turn in (True, False):
        if is_first == turn:
            dataset = load()
        dist.barrier(group)
    return dataset


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


def load_named(name: str, data_dir: Path, hold_out: int) -> ImageData:
    """Loads one of DATASETS. With hold_out, the training images may stand in the test set's place until held out."""
    if name != "mnist-5k":
        try:
            return load_from_torchvision("mnist" if name == "auto" else name, data_dir, hold_out)
        except DataUnavailable as reason:
            if name == "mnist":
                raise DataUnavailable(f"{reason}; --dataset mnist-5k needs no download") from reason
            if name != "auto":
                raise
            print(f"warning: {reason}. Using the 6,000 digits of mnist-5k, so results differ", file=sys.stderr)
    with np.load(MNIST_5K) as arrays:
        keys = ("train_images", "train_labels", "test_images", "test_labels")
        parts = [torch.from_numpy(arrays[key]) for key in keys]
    return ImageData("mnist-5k", list("0123456789"), *parts)


# ---------------------------------------------------------------------------------------------------------------------
# torchvision's data sets


def load_from_torchvision(name: str, data_dir: Path, hold_out: int) -> ImageData:
    try:
        from torchvision import datasets
    except (ImportError, RuntimeError) as error:  # RuntimeError: it was built for another version of torch
        raise DataUnavailable(
            f"{name} needs torchvision, which fails to import ({one_line(error)}): pip install -r requirements.txt"
        ) from error
    kinds = {
        "mnist": datasets.MNIST,
        "fashion-mnist": datasets.FashionMNIST,
        "kmnist": datasets.KMNIST,
        "emnist-digits": functools.partial(datasets.EMNIST, split="digits"),
        "cifar10": datasets.CIFAR10,
        "svhn": datasets.SVHN,
    }
    shape = (3, 32, 32) if name in ("cifar10", "svhn") else (1, 28, 28)
    tensors = []
    for train in (True, bool(hold_out)):  # with hold_out, the training images stand in the test set's place
        which = {"split": "train" if train else "test"} if name == "svhn" else {"train": train}
        try:
            part = read_or_download(functools.partial(kinds[name], **which), name, data_dir)
            images = channels_first(torch.as_tensor(part.data))
            classes = getattr(part, "classes", list("0123456789"))
            labels = torch.as_tensor(part.labels if name == "svhn" else part.targets)
            if images is None or images.shape != (len(labels), *shape) or not 0 <= labels.max() < len(classes):
                raise ValueError
        except ImportError as error:
            raise DataUnavailable(f"{name} needs scipy ({one_line(error)}): pip install scipy") from error
        except (AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise_unless_damaged(error)
            raise UserError(
                f"the files of {name} in {data_dir} are damaged: delete them, and the next run downloads them again"
            ) from error
        if name == "emnist-digits":  # stored with rows and columns exchanged
            images = images.transpose(2, 3)
        tensors += [images.contiguous(), labels]
    classes = [label.split(" - ")[0] for label in classes]  # torchvision's MNIST says "0 - zero"
    return ImageData(name, classes, *tensors)


def read_or_download(construct: Callable[..., Any], name: str, data_dir: Path) -> Any:
    """Downloads only what is missing. torchvision downloads damaged files of cifar10 and svhn again."""
    try:
        return construct(str(data_dir))
    except RuntimeError as error:
        if "not found" not in str(error):
            raise
    default_timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)  # torchvision sets none and would wait forever behind some firewalls
    try:
        return construct(str(data_dir), download=True)
    except (RuntimeError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]  # of the last mirror
        raise DataUnavailable(
            f"the folder {data_dir} has no intact copy of {name}, and the download failed ({reason})"
        ) from error
    finally:
        socket.setdefaulttimeout(default_timeout)


# ---------------------------------------------------------------------------------------------------------------------
# Your own images


class Pictures(NamedTuple):
    """All images of a folder or an .npz file, in order."""

    images: Tensor  # (N, C, H, W) uint8
    labels: Tensor  # (N,) int64
    classes: list[str]  # the labels' names
    names: list[str]  # paths in the folder, or places in the file
    is_test: Tensor  # (N,): whether each is for testing


def read_pictures(path: Path, image_size: int) -> Pictures:
    """Reads a folder or an .npz file. Arguments are load_dataset's. Raises UserError for other paths."""
    if path.is_dir():
        return read_folder(path.resolve(), image_size)
    if path.suffix == ".npz" and path.is_file():
        return read_npz(path)
    problem = "is neither a folder nor an .npz file" if path.exists() else "is not a known data set, nor a path"
    near = difflib.get_close_matches(str(path).lower(), DATASETS, 1)
    choices = f"choose from {', '.join(DATASETS)}, a folder of images or an .npz file"
    raise UserError(f"--dataset {path} {problem}: {f'did you mean {near[0]}?' if near else choices}")


def load_path(path: Path, image_size: int) -> ImageData:
    """Reads a folder or an .npz file. Sets about a tenth of the images aside for testing unless a folder is split."""
    images, labels, classes, names, is_test = read_pictures(path, image_size)
    name = path.resolve().name if path.is_dir() else path.stem
    num_test = int(is_test.sum())
    if not 2 <= num_test <= len(images) - 2:
        raise UserError(
            f"{path} holds {len(images)} images, {num_test} of them for testing: training and testing need at least "
            "two each"
        )
    parts = images[~is_test], labels[~is_test], images[is_test], labels[is_test]
    brightest = int(parts[0].max())
    if brightest < 64 and rank_and_ranks()[0] == 0:
        print(f"warning: {name} is almost black: its brightest value is {brightest} of 255", file=sys.stderr)
    test_names = [names[i] for i in is_test.nonzero().flatten().tolist()]
    return ImageData(name, classes, *parts, test_names=test_names)


def choose_test_images(names: Iterable[bytes]) -> Tensor:
    """Whether each image is for testing (N,): about a tenth, by a hash, so none changes sides when others are added."""
    hashes = torch.tensor([zlib.crc32(name) for name in names])
    is_test = hashes % 10 == 0
    is_balanced = 2 <= is_test.sum() <= len(hashes) - 2  # perhaps not among very few images
    return is_test if is_balanced else hashes <= hashes.sort().values[:2].max()


def read_folder(folder: Path, size: int) -> Pictures:
    """Reads a folder's pictures and prints what it read. Without folders in it, its name is the only class."""
    halves = find_halves(folder)
    found = [find_pictures(half) for half in halves]
    classes = found[0] | found[-1]
    pictures = list(classes)
    images = read_files(pictures, size)
    if rank_and_ranks()[0] == 0:
        colour = "gray" if images.shape[1] == 1 else "colour"
        resized = f"cropped square at the centre and resized to {size} x {size}"
        print(f"{folder}: {len(images):,} pictures in {colour}, {resized}")
    if len(halves) == 2:
        is_test = torch.arange(len(images)) >= len(found[0])
    else:
        is_test = choose_test_images(os.fsencode(path.relative_to(folder).as_posix()) for path in pictures)
    names = [path.relative_to(folder).as_posix() for path in pictures]
    no_class = "unlabelled" if any(classes.values()) else folder.name  # the one if only one half of a split has classes
    return Pictures(images, *number_classes([label or no_class for label in classes.values()]), names, is_test)


def find_halves(folder: Path) -> list[Path]:
    """A folder's training and test (or else validation) folders, or the folder itself if it lacks one of them."""
    folders = [path for path in sorted(folder.iterdir(), reverse=True) if path.is_dir()]  # of two, the first wins
    by_kind = {match[1].lower(): path for path in folders if (match := SPLIT.fullmatch(path.name))}
    train = by_kind.get("train")
    test = by_kind.get("test", by_kind.get("val"))
    return [train, test] if train and test else [folder]


def find_pictures(folder: Path) -> dict[Path, str]:
    """A folder's pictures, at any depth, and the class of each: one of the folders in it, or "" if it has none."""
    paths = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in SUFFIXES]
    paths = [path for path in paths if not HIDDEN.search(path.relative_to(folder).as_posix())]
    if not paths:
        raise UserError(f"{folder} holds no images ({', '.join(SUFFIXES)})")
    inside = [path.relative_to(folder).parts[:-1] for path in paths]  # the folders that each is in
    for path, folders in zip(paths, inside, strict=True):
        if any(map(SPLIT.fullmatch, folders)):
            raise UserError(
                f"{path.parent} is named like half of a split: --dataset must hold one folder for training and one for "
                "testing, or only classes"
            )
        if not folders and any(inside):
            raise UserError(f"{folder} holds folders, which would be classes, and images beside them, such as {path}")
    return {path: folders[0] if folders else "" for path, folders in zip(paths, inside, strict=True)}


def read_files(paths: list[Path], size: int) -> Tensor:
    """Reads images (N, 3, size, size), or (N, 1, size, size) if all are gray. Raises UserError for a damaged file."""
    images = torch.empty(len(paths), 3, size, size, dtype=torch.uint8)
    bar = tqdm(paths, "reading", unit=" images", leave=False, disable=True if rank_and_ranks()[0] else None)
    for image, path in zip(images, bar, strict=True):
        try:
            with Image.open(path) as picture:
                image.copy_(torch.from_numpy(to_square(picture, size)).permute(2, 0, 1))
        except Exception as error:  # PIL does not document what it raises
            raise_unless_damaged(error)
            raise UserError(f"{path} is damaged or not an image ({one_line(error)}): fix or remove it") from error
    is_gray = (images == images[:, :1]).all()
    return images[:, :1].contiguous() if is_gray else images


def to_square(picture: Any, size: int) -> np.ndarray:
    """A PIL image -> (size, size, 3) uint8, upright, on white where it is transparent."""
    picture.load()
    with contextlib.suppress(Exception):  # on invalid EXIF tags, PIL fails after it has turned the picture
        ImageOps.exif_transpose(picture, in_place=True)
    if picture.mode.startswith("I;16"):  # PIL would clip at 255
        picture = Image.fromarray((np.array(picture) // 256).astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise ValueError("its pixels have 32 bits, with no fixed value for white")
    if picture.has_transparency_data:
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA"))
    return np.array(ImageOps.fit(picture.convert("RGB"), (size, size)))


def read_npz(path: Path) -> Pictures:
    """Reads an .npz file's images. Without labels, their class is the file's name."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            arrays = {key: arrays[key] for key in ("images", "labels") if key in arrays}
    except Exception as error:  # numpy does not document what it raises for a damaged file
        raise_unless_damaged(error)
        raise UserError(f"{path} is damaged, or not an .npz file of plain arrays ({one_line(error)})") from error
    if "images" not in arrays:
        raise UserError(f"{path} has no array named images")
    array = arrays["images"]
    images = channels_first(torch.from_numpy(array)) if array.dtype == np.uint8 and array.size else None
    if images is None:
        shapes = "(N, H, W), (N, H, W, 3) or (N, 3, H, W)"
        raise UserError(f"{path}: images must be {shapes} of type uint8, not {array.shape} of type {array.dtype}")
    labels = arrays.get("labels", np.full(len(images), path.stem))
    if labels.dtype.kind == "S":
        labels = labels.astype(str)
    if labels.shape != images.shape[:1]:
        raise UserError(f"{path}: labels must be ({len(images)},), one per image, not {labels.shape}")
    names = list(map(str, range(len(images))))
    return Pictures(images, *number_classes(labels), names, choose_test_images(map(str.encode, names)))


def number_classes(names: list[str] | np.ndarray) -> tuple[Tensor, list[str]]:
    """The class of each image, by its name -> labels (N,) int64, and the sorted names that they stand for."""
    classes, labels = np.unique(names, return_inverse=True)
    return torch.from_numpy(labels).long(), list(map(str, classes))


# ---------------------------------------------------------------------------------------------------------------------
# Binarization


def inputs_and_targets(
    images: Tensor, binarize: str, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Turns uint8 images into float input and target, both in [0, 1] and of the same shape.

    dynamic: both are one Bernoulli sample with the gray values as probabilities (Burda et al. 2016). threshold: gray
    input, target gray > 0.5. none: both gray, for which a Bernoulli is not a likelihood. Raises UserError for another
    mode, and as check_bytes does.
    """
    check_bytes(images, "images")
    if binarize == "dynamic":
        uniform = draw_bits(images.shape, images.device, generator) + 2.0**15
        sample = torch.empty(images.shape, device=images.device)
        torch.lt(uniform, images * (2**16 / 255), out=sample)  # 0 is never on, and 255 always
        return sample, sample
    gray = images / 255
    if binarize == "threshold":
        return gray, (gray > 0.5).float()
    if binarize == "none":
        return gray, gray
    raise UserError(f"binarize must be one of {', '.join(BINARIZE)}, not {binarize!r}")


def check_bytes(images: Any, what: str) -> None:
    """Raises UserError unless images are a tensor of bytes. Other types have no fixed value for white."""
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise UserError(
            f"{what} must be a tensor of bytes from 0 to 255 (torch.uint8), not {kind}: for x in [0, 1], use "
            "torch.as_tensor(255 * x).round().to(torch.uint8)"
        )


def draw_bits(shape: torch.Size, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """Draws 16 random bits for each pixel: int16 of that shape, from -2^15 up."""
    if device.type != "cpu":
        return torch.randint(-(2**15), 2**15, shape, generator=generator, device=device, dtype=torch.int16)
    # The CPU's generator is slow, so each call makes 64 bits, for four pixels
    calls = torch.empty(-(-shape.numel() // 4), dtype=torch.int64).random_(-(2**63), None, generator=generator)
    return calls.view(torch.int16)[: shape.numel()].view(shape)
