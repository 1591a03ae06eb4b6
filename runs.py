"""Run folders and checkpoints: where a run's results are, and how they are written and read again."""

import contextlib
import importlib.util
import io
import os
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data import DATASETS, ImageData
from model import VAE
from utils import UserError, one_line, raise_unless_damaged

# ---------------------------------------------------------------------------------------------------------------------
# Files


def write_atomically(path: Path, data: bytes | memoryview) -> None:
    """Replaces a file atomically, so a crash leaves either the old or the new one. Raises OSError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")  # another process may write the same file
    try:
        with open(temporary, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        error.filename = str(path)  # a full disk does not say so itself
        raise


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def save_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    """Saves a dict of tensors and plain values atomically. Raises OSError, and UserError as plain does."""
    buffer = io.BytesIO()
    torch.save(plain(checkpoint), buffer)
    write_atomically(path, buffer.getbuffer())


def plain(value: Any, name: str = "checkpoint") -> Any:
    """The value without NumPy's and other libraries' types, because read_checkpoint runs no code to rebuild them.

    Raises UserError for a value that is not made of tensors, numbers, text, lists, tuples and dicts.
    """
    if isinstance(value, Tensor):
        return value
    if isinstance(value, dict):
        return {plain(key, name): plain(each, f"{name}[{key!r}]") for key, each in value.items()}
    if isinstance(value, list | tuple):
        kind = list if isinstance(value, list) else tuple
        return kind(plain(each, f"{name}[{i}]") for i, each in enumerate(value))
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist(), name)
    for kind in (bool, int, float, str, bytes):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Path):
        return str(value)
    if value is None:
        return None
    raise UserError(f"{name} is a {type(value).__name__}, which a checkpoint cannot hold: use tensors and plain values")


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
        raise_unless_damaged(error)
        raise UserError(f"{path} is damaged, or is not a checkpoint of plain tensors") from error
    if not isinstance(checkpoint, dict) or not {"model", "model_state_dict"} <= checkpoint.keys():
        raise UserError(f"{path} is not a checkpoint of this VAE: it has no model and model_state_dict")
    return checkpoint


def load_checkpoint(path: str | Path, model: VAE | type[VAE] | None = None) -> tuple[VAE, dict[str, Any]]:
    """Loads the checkpoint of a run folder or a file. Returns the model, in eval mode, and the checkpoint's dict.

    The checkpoint of a subclass of your own needs `model`, that class or an instance. A file needs only model and
    model_state_dict, as the repository that this one grew from wrote them. Raises UserError if the file is damaged or
    does not fit the model.
    """
    path = checkpoint_path(path)
    checkpoint = read_checkpoint(path)
    return load_weights(checkpoint, path, model), checkpoint


def load_weights(checkpoint: dict[str, Any], path: Path, model: VAE | type[VAE] | None = None) -> VAE:
    """Does what load_checkpoint does, for a checkpoint that has been read."""
    name = checkpoint.get("class", "VAE")
    config = checkpoint["model"]
    weights = checkpoint["model_state_dict"]
    if model is not None:
        check_is_vae(model)
    is_new = not isinstance(model, VAE)
    try:
        kind = (model or find_class(name)) if is_new else type(model)
        name_in_file = name.rpartition(".")[2]  # without its module, which may be run as __main__ or imported
        is_subclass_in_file = "." in name
        if name_in_file != kind.__name__ or is_subclass_in_file != (kind is not VAE):
            raise UserError(
                f"{path} is of the class {name}, not {class_name(kind)}: pass {name_in_file} to load_checkpoint or "
                f"train.resume, or evaluate it with --model FILE.py:{name_in_file}"
            )
        if any(weight.is_meta or weight.nbytes > weight.untyped_storage().nbytes() for weight in weights.values()):
            raise ValueError("a tensor claims more values than the file holds")
        if is_new:
            if max(config.get("encoder_layers", 1), config.get("decoder_layers", 1)) > len(weights):
                raise ValueError("it has fewer weights than layers")
            with torch.device("meta"):  # takes no memory, however large the file says the model is
                kind(**config).load_state_dict(weights, assign=True)
            model = kind(**config)
        for key in sorted(config.keys() & model.config.keys()):
            if config[key] != plain(model.config[key]):
                raise ValueError(f"its {key} is {config[key]}, not {model.config[key]}")
        model.load_state_dict(weights)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not a checkpoint of this VAE: {one_line(error)[:200]}") from error
    return model.eval()


def check_is_vae(model: Any) -> None:
    """Raises UserError unless the model is a VAE or a subclass."""
    if not (isinstance(model, VAE) or (isinstance(model, type) and issubclass(model, VAE))):
        kind = type(model).__name__
        raise UserError(f"model must be a VAE or a subclass, not {kind}: pass the model itself, unwrapped")


def import_class(place: str) -> type[VAE]:
    """The class that FILE.py:CLASS names. Runs the file's code. Raises UserError if there is no such class."""
    file, _, name = place.rpartition(":")
    path = Path(file)
    if path.suffix != ".py" or not path.is_file():
        raise UserError(f"--model must be FILE.py:CLASS, with the file of a class of yours, not {place}")
    spec = importlib.util.spec_from_file_location(f"given_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.append(str(path.resolve().parent))  # for what it imports
    spec.loader.exec_module(module)
    kind = getattr(module, name, None)
    if not (isinstance(kind, type) and issubclass(kind, VAE)):
        raise UserError(f"{file} has no subclass of VAE called {name}")
    return kind


def find_class(name: str) -> type[VAE]:
    """The class in experiments/ that a checkpoint names, or else VAE. Imports no other class that a file names."""
    name = name.rpartition(".")[2]
    for path in sorted((Path(__file__).parent / "experiments").glob("*.py")):
        if re.search(rf"^class {re.escape(name)}\([\w, ]*VAE\):", path.read_text(encoding="utf-8"), re.MULTILINE):
            return getattr(importlib.import_module(f"experiments.{path.stem}"), name)
    return VAE


def class_name(kind: type[VAE]) -> str:
    """How a checkpoint names its class: VAE, or a subclass with its module."""
    return "VAE" if kind is VAE else f"{kind.__module__}.{kind.__qualname__}"


# ---------------------------------------------------------------------------------------------------------------------
# Run folders


def checkpoint_path(run: str | Path) -> Path:
    """The checkpoint of a run folder, of the newest run in a folder of runs, or the file itself.

    The newest run has the highest number of those that have finished an epoch. Raises UserError if there is none.
    """
    path = Path(run)
    folders = [path, *(folder for _, folder in sorted(numbered_runs(path), reverse=True))]
    for candidate in (path, *(folder / "checkpoint.pt" for folder in folders)):
        if candidate.is_file():
            return candidate
    raise UserError(f"no checkpoint at {path}: a run writes its first after an epoch; train one with python train.py")


def new_run_folder(out_dir: str | Path, dataset: str, latent_size: int) -> Path:
    """Makes out_dir/NNN-dataset-zLATENT, numbered after the highest there is. Raises OSError."""
    out_dir = Path(out_dir)
    dataset = re.sub(r'[\x00-\x1f\x7f<>:"/\\|?*]', "_", dataset)[:60]
    out_dir.mkdir(parents=True, exist_ok=True)
    while True:
        number = 1 + max((number for number, _ in numbered_runs(out_dir)), default=0)
        folder = out_dir / f"{number:03d}-{dataset}-z{latent_size}"
        with contextlib.suppress(FileExistsError):  # another run that starts now may have made it
            folder.mkdir()
            return folder


def numbered_runs(out_dir: Path) -> list[tuple[int, Path]]:
    """The folders in out_dir whose names begin with a number, and these numbers."""
    runs = out_dir.iterdir() if out_dir.is_dir() else ()
    return [(int(match[1]), run) for run in runs if (match := re.match(r"(\d+)-", run.name))]


# ---------------------------------------------------------------------------------------------------------------------
# A run's images


def check_place(name: str, path: Path) -> None:
    """Raises UserError if the images that a checkpoint was trained on are no longer where they were."""
    if name not in DATASETS and not Path(name).exists():
        raise UserError(f"{path} was trained on {name}, which does not exist now: name its new place with --dataset")


def check_same_images(checkpoint: dict[str, Any], dataset: ImageData, path: Path) -> None:
    """Raises UserError if a run was trained on other images or labels, perhaps on those it would be tested on now."""
    for name, checksum in dataset.checksums().items():
        if checkpoint.get(name, checksum) != checksum:
            kind = "images" if name == "checksum" else "labels"
            raise UserError(
                f"{path} was trained on other {kind} than those in {dataset.name}, which only evaluate.py takes, if "
                "--dataset names them"
            )
