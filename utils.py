"""Errors and commands, devices and processes, checkpoints and run folders."""

import argparse
import contextlib
import difflib
import errno
import functools
import importlib
import io
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from model import VAE

DEVICES = ("auto", "cuda", "mps", "cpu")


# ---------------------------------------------------------------------------------------------------------------------
# Errors and commands


class UserError(Exception):
    """Says in one line what is wrong and what to do about it. A command prints it and exits with code 2."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM during training, raised between two steps."""

    def __init__(self, number: int):
        super().__init__("terminated" if number == signal.SIGTERM else "interrupted")
        self.exit_code = 128 + number


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Prints the description as it is, the default of each option that has one, and N or X for a number."""

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return getattr(action.type, "metavar", action.dest.upper())

    def _get_help_string(self, action: argparse.Action) -> str:
        return action.help + ("" if action.default in (None, argparse.SUPPRESS) else f" (default: {action.default})")


class ArgumentParser(argparse.ArgumentParser):
    """Complains in one line. An argument @FILE stands for those in a UTF-8 file, with quotes and comments."""

    def __init__(self, **kwargs: Any):
        super().__init__(formatter_class=HelpFormatter, allow_abbrev=False, **kwargs)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[argparse.Namespace, list[str]]:
        words = sys.argv[1:] if args is None else args
        words = [word for arg in words for word in (self.read_words(arg[1:]) if arg.startswith("@") else [arg])]
        return super().parse_known_args(words, namespace)

    def read_words(self, path: str) -> list[str]:
        try:
            words = shlex.shlex(Path(path).read_text(encoding="utf-8-sig"), posix=True)
            words.whitespace_split, words.escape = True, ""  # a backslash belongs to a Windows path
            return list(words)
        except (OSError, ValueError) as error:
            self.error(f"the argument file {path}: {one_line(error)}")

    def error(self, message: str) -> None:
        unknown = re.search(r"unrecognized arguments:.*? (-[\w-]+)", message)
        near = difflib.get_close_matches(unknown[1], self._option_string_actions, 1, 0.75) if unknown else []
        raise UserError(f"{message} ({f'did you mean {near[0]}?' if near else 'see --help'})")


def number(kind: type, low: float, high: float) -> Callable[[str], Any]:
    """An argparse type: an int or a float from low to high."""

    def parse(value: str) -> Any:
        with contextlib.suppress(ValueError):
            if low <= (parsed := kind(value)) <= high:
                return parsed
        what = f"whole number from {low} to {high}" if kind is int else f"number from {low:g} to {high:g}"
        raise argparse.ArgumentTypeError(f"must be a {what}, not {value}")

    parse.metavar = "N" if kind is int else "X"
    return parse


count = number(int, 1, 2**31)


def text(value: str) -> str:
    """An argparse type: a name or a path."""
    if not value:
        raise argparse.ArgumentTypeError("must not be empty")
    return value


def flag(name: str) -> str:
    """batch_size -> --batch-size."""
    return f"--{name.replace('_', '-')}"


def one_line(error: BaseException) -> str:
    """An exception's message without line breaks, or its name if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def shell_line(*args: object) -> str:
    """A command to paste into this system's shell."""
    join = subprocess.list2cmdline if os.name == "nt" else shlex.join
    return join([str(arg) for arg in args])


def command(main: Callable[..., None]) -> Callable[..., None]:
    """Decorates a command's main function: a user's errors become one line on stderr and an exit code."""

    @functools.wraps(main)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        os.environ.pop("MPLBACKEND", None)  # commands need none, and a notebook's may not be installed here
        try:
            return main(*args, **kwargs)
        except (UserError, UnicodeError) as error:
            message, code = f"error: {one_line(error)}", 2
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            message, code = f"error: {where}{error.strerror or one_line(error)}", 2
        except (RuntimeError, MemoryError) as error:
            if not (isinstance(error, MemoryError) or re.search("out of memory|allocate memory|overflow", str(error))):
                raise
            message, code = f"error: out of memory, try smaller sizes ({one_line(error)})", 2
        except KeyboardInterrupt as error:
            message, code = one_line(error), getattr(error, "exit_code", 130)
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
        sys.exit(code)

    return wrapped


@contextlib.contextmanager
def hold_signals() -> Iterator[Callable[[], None]]:
    """Defers Ctrl-C and SIGTERM. Yields a function that raises Interrupted if one has arrived.

    An exception that a signal raises inside a library can get lost. Only Python's main thread gets signals.
    """
    received: list[int] = []

    def check() -> None:
        if received:
            raise Interrupted(received[0])

    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    handlers = {number: signal.signal(number, lambda number, _: received.append(number)) for number in numbers}
    try:
        yield check
        check()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------------------------------------------------------------
# Devices and processes


def choose_device(name: str | torch.device = "auto") -> torch.device:
    """The device of that name; auto is the first of cuda, mps and cpu. Raises UserError if this machine lacks it."""
    name = str(name)
    available = {"cuda": has_gpus(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device in available if available[device])
    if not available.get(name):
        each = f" for each of {ranks} processes" if (ranks := os.environ.get("LOCAL_WORLD_SIZE", "1")) != "1" else ""
        raise UserError(f"PyTorch {torch.__version__} finds no {name} device{each} on this machine: try --device auto")
    return torch.device(name)


def has_gpus() -> bool:
    """Whether every process on this machine can have a GPU of its own."""
    return torch.cuda.is_available() and torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Joins the processes that torchrun started, each with its own GPU if there are enough. Else does nothing."""
    if not dist.is_torchelastic_launched():
        yield
        return
    if has_gpus():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if has_gpus() else "gloo", timeout=timedelta(seconds=60))
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank_and_ranks() -> tuple[int, int]:
    """This process's number and the number of processes: 0, 1 without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def on_rank_0(function: Callable[[], Any]) -> Any:
    """Calls the function on rank 0 and returns its result on every rank."""
    rank, ranks = rank_and_ranks()
    result = [function() if rank == 0 else None]
    if ranks > 1:
        dist.broadcast_object_list(result)
    return result[0]


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Adds up the tensors of all ranks, in place."""
    if rank_and_ranks()[1] > 1:
        dist.all_reduce(tensor)
    return tensor


def broadcast(tensors: Iterable[Tensor]) -> None:
    """Gives every rank the tensors of the first, in place."""
    if rank_and_ranks()[1] > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def sum_gradients(gradients: Sequence[Tensor]) -> Sequence[Tensor]:
    """Adds up the gradients of all ranks."""
    if rank_and_ranks()[1] == 1:
        return gradients
    whole = sum_over_ranks(torch.cat([gradient.flatten() for gradient in gradients]))  # one message, not many
    parts = whole.split([gradient.numel() for gradient in gradients])
    return [part.view_as(gradient) for part, gradient in zip(parts, gradients, strict=True)]


def seed_epoch(seed: int, epoch: int, rank: int = 0) -> None:
    """Seeds PyTorch for one epoch, so a resumed run draws what the uninterrupted one would have."""
    torch.manual_seed((seed * 2**20 + epoch + rank * 0x9E3779B97F4A7C15) % 2**63)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def write_atomically(path: Path, data: bytes | memoryview) -> None:
    """Replaces a file atomically, so a crash leaves either the old or the new one. Raises OSError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")  # another process may write the same file
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            sync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        error.filename = str(path)  # a full disk does not say so itself
        raise


def sync(descriptor: int) -> None:
    """Waits until a file is on the disk, if its file system can say so. Raises OSError."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # as some network mounts do
            raise


def save_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    """Saves a dict of tensors and plain Python values atomically. Raises OSError."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    write_atomically(path, buffer.getbuffer())


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads the checkpoint of a run or a file to the CPU. Runs no code in it. Raises UserError if it is damaged."""
    path = checkpoint_path(path)
    data = path.read_bytes()
    try:
        if data[:4] == b"PK\3\4":  # files of old versions of PyTorch have no checksums
            archive = zipfile.ZipFile(io.BytesIO(data))
            if sum(member.file_size for member in archive.infolist()) > len(data) or archive.testzip():
                raise ValueError("it is compressed, or a checksum is wrong")
        checkpoint = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load does not document what it raises for a damaged file
        raise UserError(f"{path} is damaged, or is not a checkpoint of plain tensors") from error
    kinds = {"model": dict, "model_state_dict": dict, "class": str, "options": dict, "epoch": int, "checksum": int}
    if not isinstance(checkpoint, dict) or not {"model", "model_state_dict"} <= checkpoint.keys():
        raise UserError(f"{path} is not a checkpoint of this VAE: it has no model and model_state_dict")
    for name, kind in kinds.items():
        if not isinstance(checkpoint.get(name, kind()), kind):
            raise UserError(f"{path} is not a checkpoint of this VAE: its {name} is of another type")
    return checkpoint


def load_checkpoint(path: str | Path, model: VAE | None = None) -> tuple[VAE, dict[str, Any]]:
    """Loads the checkpoint of a run folder or a file -> the model, in eval mode, and the checkpoint's dict.

    The checkpoint of a subclass of your own needs a `model` of that class to load into. A file needs only model and
    model_state_dict, as the repository that this one grew from wrote them. Raises UserError if the file is damaged or
    does not fit the model.
    """
    path = checkpoint_path(path)
    checkpoint = read_checkpoint(path)
    return load_weights(checkpoint, path, model), checkpoint


def load_weights(checkpoint: dict[str, Any], path: Path, model: VAE | None = None) -> VAE:
    """Does what load_checkpoint does, for a checkpoint that has been read."""
    name, config, weights = checkpoint.get("class", "VAE"), checkpoint["model"], checkpoint["model_state_dict"]
    is_new, kind = model is None, find_class(name) if model is None else type(model)
    # The module's name does not count, because a module may be run as __main__ or imported
    if name.rpartition(".")[1:] != class_name(kind).rpartition(".")[1:]:
        how = f"run its script with --resume, or load_checkpoint(path, model={name.split('.')[-1]}(...))"
        raise UserError(f"{path} is of the class {name}, not {class_name(kind)}: {how}")
    try:
        if is_new:
            if max(config.get("encoder_layers", 1), config.get("decoder_layers", 1)) > len(weights):
                raise ValueError("it has fewer weights than layers")
            with torch.device("meta"):  # takes no memory, however large the file says the model is
                model = kind(**config)
        for key in sorted(config.keys() & model.config.keys()):
            if config[key] != model.config[key]:
                raise ValueError(f"its {key} is {config[key]}, not {model.config[key]}")
        like = model.state_dict()
        check_tensors(weights, like)
        model.load_state_dict({name: weights[name].to(like[name].dtype) for name in like}, assign=is_new)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not a checkpoint of this {class_name(kind)}: {one_line(error)[:200]}") from error
    return model.eval()


def find_class(name: str) -> type[VAE]:
    """The class in experiments/ that a checkpoint names, or else VAE. Imports no other class that a file names."""
    name = name.rpartition(".")[2]
    for path in sorted((Path(__file__).parent / "experiments").glob("*.py")):
        if re.search(rf"^class {re.escape(name)}\(\w*VAE\):", path.read_text(encoding="utf-8"), re.MULTILINE):
            return getattr(importlib.import_module(f"experiments.{path.stem}"), name)
    return VAE


def check_tensors(tensors: dict[str, Any], like: dict[str, Tensor]) -> None:
    """Raises ValueError unless the tensors have the names, shapes and kinds of `like`."""
    if others := like.keys() ^ tensors.keys():
        raise ValueError(f"unexpected or missing tensors: {', '.join(sorted(map(str, others)))}")
    for name, tensor in tensors.items():
        # A tensor that is not contiguous may repeat one value, and so claim any size
        is_whole = isinstance(tensor, Tensor) and tensor.is_contiguous() and not tensor.is_meta
        shape, dtype = like[name].shape, like[name].dtype
        if not is_whole or tensor.shape != shape or tensor.is_floating_point() != dtype.is_floating_point:
            raise ValueError(f"its {name} is not a tensor of shape {tuple(shape)} and type {dtype}")


def class_name(kind: type[VAE]) -> str:
    """How a checkpoint names its class: VAE, or a subclass with its module."""
    return "VAE" if kind is VAE else f"{kind.__module__}.{kind.__qualname__}"


# ---------------------------------------------------------------------------------------------------------------------
# Run folders


def checkpoint_path(run: str | Path) -> Path:
    """The checkpoint of a run folder, of the newest run in a folder of runs, or the file itself.

    Raises UserError if there is none.
    """
    path = Path(run)
    if path.is_dir():
        path = (path if (path / "checkpoint.pt").is_file() else newest_run(path)) / "checkpoint.pt"
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}: train one with python train.py")
    return path


def newest_run(out_dir: str | Path) -> Path:
    """The run folder with the highest number that has a checkpoint, and so has finished an epoch.

    Says so if a newer run has none. Raises UserError if there is no such run, or if a copy has the same number.
    """
    runs = sorted(_runs(Path(out_dir)), reverse=True)
    finished = [(number, run) for number, run in runs if (run / "checkpoint.pt").is_file()]
    if not finished:
        how = "a run writes its first after an epoch; train one with python train.py"
        raise UserError(f"no checkpoint at {out_dir}, nor in a run there: {how}")
    newest, *copies = sorted(run for number, run in finished if number == finished[0][0])
    if copies:
        raise UserError(f"{newest} and {copies[0]} have the same number: name the one you mean")
    if runs[0][0] > finished[0][0]:
        print(f"{runs[0][1]} has not finished an epoch yet; taking {newest}", file=sys.stderr)
    return newest


def new_run_folder(out_dir: str | Path, dataset: str, latent_size: int) -> Path:
    """Makes out_dir/NNN-dataset-zLATENT, numbered after the highest there is. Raises OSError."""
    out_dir, dataset = Path(out_dir), re.sub(r'[\x00-\x1f\x7f<>:"/\\|?*]', "_", dataset)[:60]
    out_dir.mkdir(parents=True, exist_ok=True)
    while True:
        number = 1 + max((number for number, _ in _runs(out_dir)), default=0)
        claim = out_dir / f"{number:03d}"
        with contextlib.suppress(FileExistsError):  # only one of several runs that start at once makes this folder
            claim.mkdir()
            if [run for taken, run in _runs(out_dir) if taken == number] == [claim]:
                return claim.rename(f"{claim}-{dataset}-z{latent_size}")
            claim.rmdir()


def _runs(out_dir: Path) -> list[tuple[int, Path]]:
    runs = out_dir.iterdir() if out_dir.is_dir() else ()
    return [(int(match[1]), run) for run in runs if (match := re.match(r"(\d+)(-|$)", run.name))]
