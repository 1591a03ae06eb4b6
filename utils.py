"""Errors and commands, devices and processes."""

import argparse
import contextlib
import difflib
import functools
import operator
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

DEVICES = ("auto", "cuda", "mps", "cpu")


# ---------------------------------------------------------------------------------------------------------------------
# Errors and commands


class UserError(Exception):
    """Says in one line what is wrong and what to do about it. A command prints it and exits with code 2."""


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Prints the description as it is, and the default of each option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        return action.help + ("" if action.default in (None, argparse.SUPPRESS) else f" (default: {action.default})")


class ArgumentParser(argparse.ArgumentParser):
    """Complains in one line. An argument @FILE stands for those in a file, with quotes and comments."""

    def __init__(self, **kwargs: Any):
        super().__init__(formatter_class=HelpFormatter, fromfile_prefix_chars="@", allow_abbrev=False, **kwargs)

    def convert_arg_line_to_args(self, line: str) -> list[str]:
        words = shlex.shlex(line, posix=True)
        words.whitespace_split = True
        words.escape = ""  # a backslash belongs to a Windows path
        try:
            return list(words)
        except ValueError as error:
            self.error(f"{line}: {error}")

    def error(self, message: str) -> None:
        unknown = re.search(r"unrecognized arguments:.*? (-[\w-]+)", message)
        near = difflib.get_close_matches(unknown[1], self._option_string_actions, 1, 0.75) if unknown else []
        raise UserError(f"{message} ({f'did you mean {near[0]}?' if near else 'see --help'})")


def number(kind: type[int] | type[float], low: float, high: float) -> Callable[[Any], Any]:
    """Returns a function that checks a number from low to high, or parses its text, as an argparse type."""

    def check(value: Any) -> Any:
        with contextlib.suppress(TypeError, ValueError):
            is_text = isinstance(value, str)
            number = kind(value) if is_text or kind is float else operator.index(value)  # which takes no 2.5
            if low <= number <= high and not isinstance(value, bool):
                return number
        kinds = f"whole number from {low} to {high}" if kind is int else f"number from {low:g} to {high:g}"
        raise argparse.ArgumentTypeError(f"must be a {kinds}, not {value}")

    return check


count = number(int, 1, 2**31)


def text(value: Any) -> str:
    """An argparse type: a name or a path."""
    if not isinstance(value, str | Path) or not str(value):
        raise argparse.ArgumentTypeError(f"must be a name or a path, not {value!r}")
    return str(value)


def flag(name: str) -> str:
    """batch_size -> --batch-size."""
    return f"--{name.replace('_', '-')}"


def one_line(error: BaseException) -> str:
    """An exception's message without line breaks, or its name if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def raise_unless_damaged(error: Exception) -> None:
    """Raises the error again unless the file is to blame. Lack of memory or of permission says nothing about it."""
    is_from_system = getattr(error, "errno", None) is not None
    if isinstance(error, MemoryError) or is_from_system or "allocate memory" in str(error):
        raise error


def shell_line(*args: object) -> str:
    """A command to paste into this system's shell."""
    join = subprocess.list2cmdline if os.name == "nt" else shlex.join
    return join([str(arg) for arg in args])


def command(main: Callable[..., None]) -> Callable[..., None]:
    """Decorates a command's main function: a user's errors become one line on stderr and an exit code."""

    @functools.wraps(main)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            return main(*args, **kwargs)
        except (UserError, UnicodeError) as error:
            message = one_line(error)
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            message = where + (error.strerror or one_line(error))
        except (RuntimeError, MemoryError) as error:
            if not (isinstance(error, MemoryError) or re.search("out of memory|allocate memory|overflow", str(error))):
                raise
            message = f"out of memory, try smaller sizes ({one_line(error)})"
        except KeyboardInterrupt:
            print(f"{Path(sys.argv[0]).name}: interrupted", file=sys.stderr)
            sys.exit(130)
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
        sys.exit(2)

    return wrapped


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
    dist.init_process_group("cpu:gloo,cuda:nccl" if has_gpus() else "gloo")
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
