"""Errors and commands, devices and processes, checkpoints and run folders."""

import argparse
import contextlib
import functools
import io
import os
import pickletools
import re
import shlex
import signal
import sys
import threading
import warnings
import zipfile
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributions import Distribution

from model import VAE

DEVICES = ("auto", "cuda", "mps", "cpu")
PRECISIONS = ("highest", "medium", "bfloat16")
GLOBALS = r"torch \w+Storage|torch\._utils _rebuild_(tensor_v2|parameter)|collections OrderedDict"  # of a checkpoint


# ---------------------------------------------------------------------------------------------------------------------
# Errors that a user can cause


class UserError(Exception):
    """What is wrong and what to do about it, in one line: a command prints it and exits with code 2."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, as batch systems send it before they kill: treated as Ctrl-C, with its own exit code."""


class ArgumentParser(argparse.ArgumentParser):
    """An argparse parser that complains in one line too, and whose argument files may hold comments."""

    def __init__(self, **kwargs: Any):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **kwargs)

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        try:
            return shlex.split(arg_line, comments=True)
        except ValueError as error:
            raise UserError(f"in the argument file, {arg_line!r}: {one_line(error)}") from error

    def parse_known_args(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().parse_known_args(*args, **kwargs)
        except UnicodeDecodeError as error:
            raise UserError(f"an argument file is not text ({one_line(error)})") from error
        except RecursionError as error:
            raise UserError("an argument file names itself") from error

    def error(self, message: str) -> None:
        raise UserError(f"{message} (see --help)")


def count(text: str) -> int:
    """An argparse type: a whole number above 0."""
    if not (text.isdecimal() and 0 < int(text) < 2**31):
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 to 2^31, not {text}")
    return int(text)


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def printable(text: str) -> str:
    """Text without the codes that a terminal obeys: part of it may be from somebody else's file."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def shell_line(*args: object) -> str:
    """A command that can be pasted into a shell."""
    return shlex.join(map(str, args))


def open_streams() -> None:
    """Sees to it that stdout and stderr can be written to: also where they are closed, or can't show every letter."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, this one, before another file does
    sys.stdout, sys.stderr = (
        os.fdopen(os.open(os.devnull, os.O_WRONLY), "w") if stream is None else stream
        for stream in (sys.stdout, sys.stderr)
    )
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def command(main: Callable[..., None]) -> Callable[..., None]:
    """Decorates a command's main function: what a user can cause ends in one line on stderr, without a traceback."""

    @functools.wraps(main)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        def terminate(*_: Any) -> None:
            raise Terminated("terminated")

        open_streams()
        previous = signal.signal(signal.SIGTERM, terminate)
        try:
            main(*args, **kwargs)
        except UserError as error:
            message, code = one_line(error), 2
        except ModuleNotFoundError as error:
            message, code = f"the package {error.name} is missing: pip install -r requirements.txt", 2
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            message, code = f"{where}{error.strerror or one_line(error)}", 2
        except (RuntimeError, MemoryError) as error:
            if not isinstance(error, MemoryError) and not re.search(
                "out of memory|allocate memory|size calculation", str(error)
            ):
                raise
            message, code = f"out of memory: try smaller sizes ({one_line(error)})", 2
        except KeyboardInterrupt as error:
            message, code = str(error) or "interrupted", 143 if isinstance(error, Terminated) else 130
        else:
            return
        finally:
            signal.signal(signal.SIGTERM, previous)
        name = Path(sys.argv[0]).name + (f" on rank {os.environ['RANK']}" if "RANK" in os.environ else "")
        print(f"{name}: {'error: ' if code == 2 else ''}{printable(message)}", file=sys.stderr)
        sys.exit(code)

    return wrapped


_pending: list[Callable[[], Any]] = []  # what the signals that are held back would do


@contextlib.contextmanager
def interrupts_held() -> Iterator[None]:
    """Holds back Ctrl-C and SIGTERM until the end, or until let_interrupts_through is called.

    What they raise in the middle of a library may be lost there, or end in another exception: PyTorch takes it for a no
    where it checks whether a compiled function fits its arguments, and tqdm releases a lock that it has not got. Only
    Python's main thread gets signals: in any other this does nothing.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    in_main_thread = threading.current_thread() is threading.main_thread()
    held = {number: handler for number, handler in handlers.items() if callable(handler) and in_main_thread}
    for number, handler in held.items():
        signal.signal(number, lambda *args, handler=handler: _pending.append(functools.partial(handler, *args)))
    try:
        yield
    finally:
        for number, handler in held.items():
            signal.signal(number, handler)
        let_interrupts_through()


def let_interrupts_through() -> None:
    """Does what the first signal that is held back would have done, if there is one."""
    if _pending:
        first, *_ = _pending
        _pending.clear()
        first()


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


def copy_from_rank_0(module: torch.nn.Module) -> None:
    """Gives a module's buffers on every rank the values of rank 0: statistics, say, of that rank's share of batches."""
    if rank_and_ranks()[1] > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Adds up a tensor of every rank, in place."""
    if rank_and_ranks()[1] > 1:
        dist.all_reduce(tensor)
    return tensor


@contextlib.contextmanager
def matmul_precision(name: str | None, device: str | torch.device) -> Iterator[None]:
    """Of matrix products: highest or medium, as torch.set_float32_matmul_precision calls them, or bfloat16 (autocast).

    None leaves it as it is, and medium rounds the factors of float32 products to bfloat16 or TF32, on a CPU or GPU that
    has units for those. Steps of training may follow each other within: autocast's cache of rounded weights, which
    would keep those of the first step, is off.
    """
    before, autocast = torch.get_float32_matmul_precision(), contextlib.nullcontext()
    if name == "bfloat16":
        name, autocast = "highest", torch.autocast(torch.device(device).type, torch.bfloat16, cache_enabled=False)
    torch.set_float32_matmul_precision(name or before)
    try:
        with autocast:
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def choose_precision(device: torch.device, batch_size: int) -> str:
    """The fastest precision of matrix products for batches of that size: bfloat16, medium or highest.

    Below 128 images, casts to bfloat16 cost more than they save, and without AMX so does rounding inside the products.
    """
    units = bfloat16_units()
    if device.type != "cpu" or not units:
        return "medium"
    if batch_size >= 128:
        return "bfloat16"
    return "medium" if "amx_bf16" in units else "highest"


def bfloat16_units() -> set[str]:
    """Which units for products of bfloat16 the CPU has, if any. Without them, such products take many times longer."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}  # older PyTorch
    return {name for name in ("amx_bf16", "avx512_bf16") if capabilities.get(name)}


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
            Distribution.set_default_validate_args(False)  # which would wait for the GPU
            try:
                with torch.cuda.graph(self.graph):
                    self.result = self.function(*self.args)
            finally:
                Distribution.set_default_validate_args(__debug__)
        self.graph.replay()
        return self.result


def seed_epoch(seed: int, epoch: int, rank: int = 0) -> None:
    """Seeds PyTorch's generators for one epoch, so that a resumed run draws what the uninterrupted one would have."""
    torch.manual_seed((seed * 2**20 + epoch + rank * 0x9E3779B97F4A7C15) % 2**63)


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


def clear_parts(folder: Path) -> None:
    """Removes the unfinished files of write_atomically in a folder that are of no other process of this machine."""
    for part in folder.glob(".*.part"):
        pid = part.name.split(".")[-2]
        if pid.isdecimal() and (int(pid) == os.getpid() or not _is_alive(int(pid))):
            part.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    if os.name != "posix":  # elsewhere, os.kill would end the process
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # it is another user's
        return True
    return True


def _sync_folder(folder: Path) -> None:
    """Puts the names in a folder on the disk, on systems where that can be asked for."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def save_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    """Saves a dict of tensors and plain Python values. Raises OSError, leaving the file that was there."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    write_atomically(path, buffer.getbuffer())


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The dict in a run folder's or a file's checkpoint, its tensors on the CPU. No code in the file is run.

    Raises UserError for a file that is damaged, or is no such dict.
    """
    path = checkpoint_path(path)
    data = path.read_bytes()
    try:
        check_archive(data)
        checkpoint = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # what torch.load raises for a damaged file is not documented
        raise UserError(f"{path} is damaged, or is not a checkpoint of plain tensors") from error
    if not isinstance(checkpoint, dict) or not {"model", "model_state_dict"} <= checkpoint.keys():
        raise UserError(f"{path} is not a checkpoint of this VAE: it has no model and model_state_dict")
    kinds = {"model": dict, "model_state_dict": dict, "class": str, "options": dict, "epoch": int, "checksum": int}
    kinds_of_options = {"dataset": str, "binarize": str, "hold_out": int}
    wrong = [name for name, kind in kinds.items() if not isinstance(checkpoint.get(name, kind()), kind)]
    if not wrong:
        options = checkpoint.get("options", {})
        wrong = [name for name, kind in kinds_of_options.items() if not isinstance(options.get(name, kind()), kind)]
    if wrong:
        raise UserError(f"{path} is not a checkpoint of this VAE: its {wrong[0]} is of another type")
    if not 0 <= checkpoint.get("epoch", 0) < 2**31:
        raise UserError(f"{path} is not a checkpoint of this VAE: its epoch is not from 0 to 2^31")
    return checkpoint


def check_archive(data: bytes) -> None:
    """Raises ValueError or another error for what torch.save does not write.

    That is what torch.load would unpack into more than the file holds, or would not find damaged.
    """
    if data[:4] == b"PK\3\4":
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = archive.infolist()
            if any(member.compress_type != zipfile.ZIP_STORED for member in members):
                raise ValueError("it is compressed")
            if sum(member.file_size for member in members) > len(data):
                raise ValueError("it holds more than its size")
            if name := archive.testzip():
                raise ValueError(f"the checksum of {name} is wrong")
            pickles = [io.BytesIO(archive.read(member)) for member in members if member.filename.endswith(".pkl")]
    else:
        pickles = [io.BytesIO(data)] * 4  # of old files, one after another: what they are, and their content
    for pickle in pickles:
        for opcode, arg, _ in pickletools.genops(pickle):
            if "GLOBAL" in opcode.name and not re.fullmatch(GLOBALS, str(arg)):
                raise ValueError(f"it has more than tensors and plain values: {arg}")


def load_checkpoint(path: str | Path, model: VAE | None = None) -> tuple[VAE, dict[str, Any]]:
    """Loads a run folder's or a file's checkpoint -> the model, in eval mode, and the checkpoint's dict.

    Without a `model`, into a new VAE on the CPU. A checkpoint of a subclass needs a model of that class: none is
    imported because a file names it. Of the dict, model and model_state_dict are needed, as the original repository
    writes them too; a training run resumes from the rest. Raises UserError for a file that is damaged or does not fit.
    """
    path = checkpoint_path(path)
    checkpoint = read_checkpoint(path)
    return load_weights(model, checkpoint, path), checkpoint


def load_weights(model: VAE | None, checkpoint: dict[str, Any], path: Path) -> VAE:
    """load_checkpoint of a dict that is already read."""
    name, config, weights = checkpoint.get("class", "VAE"), checkpoint["model"], checkpoint["model_state_dict"]
    *module, kind = name.split(".")
    *own_module, own_kind = class_name(model).split(".")
    if kind != own_kind or bool(module) != bool(own_module):  # the module's name depends on how it is run
        how = f"the program that defines it loads it, as does load_checkpoint(path, model={kind}(...))"
        raise UserError(f"{path} is of the class {name}, not {class_name(model)}: {how}")
    try:
        if model is None:
            check_config(config, weights)
            with torch.device("meta"):  # a model of absurd sizes takes no memory here
                check_tensors(weights, VAE(**config).state_dict())
            model = VAE(**config)
        elif other := [key for key in config.keys() & model.config.keys() if config[key] != model.config[key]]:
            raise ValueError(", ".join(f"{key} {config[key]}, not {model.config[key]}" for key in sorted(other)))
        check_tensors(weights, model.state_dict())
        model.load_state_dict(weights)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not a checkpoint of this {class_name(model)}: {one_line(error)}") from error
    return model.eval()


def class_name(model: VAE | None) -> str:
    """VAE, or a subclass with its module, by which a checkpoint says what it is of."""
    kind = VAE if model is None else type(model)
    return "VAE" if kind is VAE else f"{kind.__module__}.{kind.__qualname__}"


def check_config(config: dict[str, Any], weights: dict[str, Tensor]) -> None:
    """Raises ValueError for the config of a VAE of which the weights cannot be, before that is built."""
    if wrong := [name for name, value in config.items() if type(value) not in (int, str)]:
        raise ValueError(f"its {wrong[0]} is neither a number nor a name")
    if max(config.get("encoder_layers", 2), config.get("decoder_layers", 1)) > len(weights):
        raise ValueError("it has fewer weights than layers")
    held = {weight.untyped_storage().data_ptr(): weight.untyped_storage().nbytes() for weight in weights.values()}
    if sum(weight.nbytes for weight in weights.values()) > sum(held.values()):
        raise ValueError("its weights share their memory")


def check_tensors(tensors: dict[str, Any], like: dict[str, Tensor]) -> None:
    """Raises ValueError where the names, kinds or shapes are not those of `like`, or a value is not finite."""
    if missing := like.keys() ^ tensors.keys():
        raise ValueError(f"its tensors are others: {', '.join(sorted(map(str, missing)))}")
    for name, tensor in tensors.items():
        expected, kind = like[name], "floats" if like[name].is_floating_point() else str(like[name].dtype)
        if not isinstance(tensor, Tensor) or tensor.shape != expected.shape:
            raise ValueError(f"its {name} is not a tensor of shape {tuple(expected.shape)}")
        if tensor.nbytes > tensor.untyped_storage().nbytes():  # else few bytes could claim to be any number of weights
            raise ValueError(f"its {name} repeats its values")
        if tensor.dtype != expected.dtype and not (tensor.is_floating_point() and expected.is_floating_point()):
            raise ValueError(f"its {name} is not a tensor of {kind}")
        is_mask = not expected.is_meta and torch.equal(tensor, expected)  # such as -inf in a buffer that stays as it is
        if not (torch.isfinite(tensor).all() or is_mask):
            raise ValueError(f"its {name} is not finite")


def checkpoint_path(run: str | Path) -> Path:
    """A run folder, a folder of runs (the newest counts) or a checkpoint file -> the checkpoint file.

    Raises UserError where there is none.
    """
    path = Path(run)
    if path.is_dir():
        path = (path if (path / "checkpoint.pt").is_file() else newest_run(path)) / "checkpoint.pt"
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}: train one with python train.py")
    return path


def new_run_folder(out_dir: str | Path, dataset: str, latent_size: int) -> Path:
    """Makes out_dir/NNN-dataset-zLATENT, with the number after the highest there is. Raises OSError."""
    out_dir, dataset = Path(out_dir), re.sub(r'[\x00-\x1f\x7f<>:"/\\|?*]', "_", dataset)[:60]
    out_dir.mkdir(parents=True, exist_ok=True)
    while True:
        number = 1 + max(_run_numbers(out_dir), default=0)
        claim = out_dir / f"{number:03d}"
        with contextlib.suppress(FileExistsError):  # of several runs that start at once, one makes this folder
            claim.mkdir()
            if _run_numbers(out_dir)[number] == claim:  # and no other had the number, and renamed its folder, before
                return claim.rename(f"{claim}-{dataset}-z{latent_size}")
            claim.rmdir()


def discard_run(run: Path) -> None:
    """Removes the checkpoint of a run and, if nothing else is there, its folder. Acts in the first process alone."""
    if rank_and_ranks()[0] == 0:
        (run / "checkpoint.pt").unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            run.rmdir()


def newest_run(out_dir: str | Path) -> Path:
    """The run folder of the highest number that has a checkpoint. Raises UserError where there is none."""
    runs = {number: run for number, run in _run_numbers(Path(out_dir)).items() if (run / "checkpoint.pt").is_file()}
    if not runs:
        raise UserError(f"no checkpoint at {out_dir}, nor in a run there: train one with python train.py")
    return runs[max(runs)]


def _run_numbers(out_dir: Path) -> dict[int, Path]:
    runs = sorted(out_dir.iterdir()) if out_dir.is_dir() else ()
    return {int(match[1]): run for run in runs if (match := re.match(r"(\d+)(-|$)", run.name))}
