"""Trains a VAE with Adam on summed binary cross-entropy + KL.

    python train.py                                   # MNIST, 20 epochs
    python train.py --latent-size 2 --epochs 50
    python train.py @recipes/pytorch-example.txt      # options from a file
    python train.py --resume runs/001-mnist-z20 --epochs 40

Each run writes a folder of its own, runs/NNN-DATASET-zLATENT: checkpoint.pt, metrics.csv, curves.png, and pictures of
reconstructions and samples. python evaluate.py then measures and shows what the newest run learned.
"""

import argparse
import copy
import csv
import io
import math
import numbers
import os
import reprlib
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

try:
    import torch
    from torch import Tensor, nn
    from torch.func import functional_call, grad_and_value
    from torch.nn.parallel import DistributedDataParallel
    from tqdm import tqdm

    import evaluate
    import utils
    from data import BINARIZE, DATASETS, ImageData, binarize, binarize_test_set, draw_bits, load_dataset
    from model import ACTIVATIONS, VAE, Decoder, nll_from_log_weights
    from utils import UserError
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    print(f"train.py: error: the package {error.name} is missing: pip install -r requirements.txt", file=sys.stderr)
    sys.exit(2)
except KeyboardInterrupt:
    sys.exit(130)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = ("epoch", "train_loss", "test_loss", "test_bce", "test_kl", "images_per_second", "seconds")  # of metrics.csv
STEPS_WORTH_COMPILING = 8000  # save about the time that compiling takes
AVERAGES_PER_EPOCH = 50  # as good as one after every step, and nine times cheaper at 469 steps per epoch

# ---------------------------------------------------------------------------------------------------------------------
# The options

Requirement = tuple[str, Callable[[Any], bool]]  # what a good value is, and whether one is good
COUNT: Requirement = ("a whole number from 1 to 2^31", lambda n: 1 <= n < 2**31)
LAYERS: Requirement = ("a whole number from 1 to 1,000", lambda n: 1 <= n <= 1000)
POSITIVE: Requirement = ("a number from 1e-37 to 1e37", lambda x: 1e-37 <= x <= 1e37)
WEIGHT: Requirement = ("a number from 0 to 1e6", lambda x: 0 <= x <= 1e6)  # whose gradients float32 can square
NOT_NEGATIVE: Requirement = ("a number, 0 or above", lambda x: 0 <= x < math.inf)
WHOLE: Requirement = ("a whole number from 0 to 2^31", lambda n: 0 <= n < 2**31)
TEXT: Requirement = ("a name or a path", lambda text: str(text) != "" and "\0" not in str(text))
SWITCH: Requirement = ("True or False", lambda _: True)
KINDS = {int: numbers.Integral, float: numbers.Real, str: (str, os.PathLike), bool: bool}

PLACES = {"data_dir", "out_dir"}  # of this machine: not kept in a checkpoint
RESUMABLE = ("epochs", "dataset", "data_dir", "device")  # what --resume takes
SIZES = ("hidden_size", "latent_size", "encoder_layers", "decoder_layers", "activation")  # a model's arguments


def option(default: Any, help: str, requirement: Requirement) -> Any:
    """A field of Options."""
    return field(default=default, metadata={"help": help, "requirement": requirement, "choices": None})


def choice(default: str | None, help: str, choices: tuple[str, ...]) -> Any:
    """A field of Options with one of a few values."""
    requirement = (f"one of {', '.join(choices)}", lambda value: value in choices)
    return field(default=default, metadata={"help": help, "requirement": requirement, "choices": choices})


@dataclass(frozen=True)
class Options:
    """What a run is trained with: the arguments of the command and of train, with their defaults, help and good values.

    Raises UserError, in the command line's words, for the first that has a bad value.
    """

    dataset: str = option(
        "auto",
        f"{', '.join(DATASETS[1:])}, or the path of a folder of images or of an .npz file; auto is mnist, or mnist-5k "
        "where mnist is unavailable",
        TEXT,
    )
    data_dir: str = option("data", "where data sets are read and downloaded", TEXT)
    image_size: int | None = option(
        None, "width and height that the pictures in a folder are given (default: 28)", COUNT
    )
    hold_out: int = option(
        0, "for choosing settings: the last N training images stand in for the test set, which is not read", WHOLE
    )
    epochs: int | None = option(None, "passes over the training set (default: 20, and 150 on mnist-5k)", COUNT)
    batch_size: int = option(128, "images per step", COUNT)
    lr: float = option(1.5e-3, "Adam's step size", POSITIVE)
    lr_schedule: str = choice("constant", "cosine falls to 0 at the last epoch", ("constant", "cosine", "burda2016"))
    beta: float = option(1.0, "weight of the KL in training; the losses printed have it at 1", WEIGHT)
    kl_warmup: float = option(0.0, "epochs over which the weight of the KL rises from 0", NOT_NEGATIVE)
    hidden_size: int = option(512, "width of the hidden layers", COUNT)
    latent_size: int = option(20, "dimensions of z", COUNT)
    encoder_layers: int = option(2, "hidden layers of the encoder", LAYERS)
    decoder_layers: int = option(1, "hidden layers of the decoder", LAYERS)
    activation: str = choice("relu", "of the hidden layers", tuple(ACTIVATIONS))
    init: str = choice(
        "pytorch",
        "burda2016: Glorot-uniform weights, and the mean image as the output's bias",
        ("pytorch", "burda2016"),
    )
    binarize: str = choice(
        "dynamic", "dynamic: sampled pixels; threshold: gray input, black and white target; none: gray", BINARIZE
    )
    objective: str = choice(
        "elbo", "the bound that is trained on: the ELBO, or Burda et al.'s (2016)", ("elbo", "iwae")
    )
    importance_samples: int = option(1, "draws of z per image for --objective iwae (1: the ELBO)", COUNT)
    elbo_epochs: int = option(0, "epochs on the ELBO before --objective iwae takes over", WHOLE)
    adam_eps: float = option(1e-8, "Adam's epsilon, to be compared with gradients summed over the batch", POSITIVE)
    clip_grad_norm: float | None = option(
        None, "scale a step's gradient, summed over the batch, down to this norm if it is larger", POSITIVE
    )
    average: bool = option(True, "evaluate and keep a running average of the weights", SWITCH)
    compile: bool | None = option(
        None,
        f"compile the whole step (default: for {STEPS_WORTH_COMPILING:,} steps or more, on a CPU with a C++ compiler)",
        SWITCH,
    )
    precision: str | None = choice(
        None,
        "of matrix products: float32's highest or medium, in PyTorch's words, or bfloat16 (default: the fastest here)",
        utils.PRECISIONS,
    )
    device: str = choice("auto", "auto is the first of cuda, mps and cpu that is there", utils.DEVICES)
    seed: int = option(0, "of all that is random", ("a whole number from 0 to 2^40", lambda seed: 0 <= seed <= 2**40))
    out_dir: str = option("runs", "where run folders are made", TEXT)

    def __post_init__(self) -> None:
        for option in fields(self):
            value, kind = getattr(self, option.name), kind_of(option)
            if value is None and option.default is None:
                continue
            if getattr(value, "ndim", None) == 0:  # NumPy's and PyTorch's numbers become Python's
                value = value.item()
            text, is_good = option.metadata["requirement"]
            is_kind = isinstance(value, KINDS[kind]) and (kind is bool or not isinstance(value, bool))
            if not (is_kind and is_good(value)):
                raise UserError(f"{flag(option.name)} must be {text}, not {reprlib.repr(value)}")
            object.__setattr__(self, option.name, kind(value))  # whole numbers become floats, and paths text
        if self.objective == "elbo" and (self.importance_samples > 1 or self.elbo_epochs > 0):
            raise UserError("--importance-samples and --elbo-epochs are for --objective iwae")
        if self.objective == "iwae" and (self.beta != 1 or self.kl_warmup > self.elbo_epochs):
            raise UserError("--beta, and --kl-warmup beyond --elbo-epochs, are for the ELBO: iwae has no KL to weigh")

    def at(self, epoch: int) -> "Options":
        """The options with the objective that they have in an epoch: the ELBO in the first elbo_epochs."""
        on_elbo = epoch <= self.elbo_epochs
        return replace(self, objective="elbo", importance_samples=1, elbo_epochs=0) if on_elbo else self

    def to_save(self) -> dict[str, Any]:
        """The options as a checkpoint holds them."""
        return {name: value for name, value in asdict(self).items() if name not in PLACES}

    @classmethod
    def saved_in(cls, checkpoint: dict[str, Any]) -> "Options":
        """Those of a checkpoint, and the defaults of options that are newer. Raises KeyError where it has none."""
        saved, names = checkpoint["options"], {option.name for option in fields(cls)} - PLACES
        if not saved.get("dataset") or not saved.get("epochs"):
            raise KeyError("dataset or epochs")
        if unknown := sorted(map(str, saved.keys() - names - PLACES)):
            print(f"warning: no longer options, and left out: {utils.printable(', '.join(unknown))}", file=sys.stderr)
        return cls(**{name: saved[name] for name in saved.keys() & names})


def kind_of(option: Any) -> type:
    """The type of an option's values: int for `int | None`."""
    return (get_args(option.type) or (option.type,))[0]


def flag(name: str) -> str:
    """batch_size -> --batch-size."""
    return f"--{name.replace('_', '-')}"


# ---------------------------------------------------------------------------------------------------------------------
# A run

Model = VAE | type[VAE] | Callable[[ImageData, Options], VAE]  # a model, its class, or what makes it
OnEpoch = Callable[[VAE, list[dict[str, Any]]], None]
Trained = tuple[VAE, list[dict[str, Any]], Path]


def train(
    dataset: str | Path | ImageData = "auto",
    model: Model | None = None,
    on_epoch: OnEpoch | None = None,
    **options: Any,
) -> Trained:
    """Trains a model; `options` are those of Options, and so are their defaults.

    dataset may also be ImageData of your own. model may be a VAE, with any weights, or an instance of a subclass, a
    subclass that takes VAE's arguments, or a function of the data and the Options that makes a model; by default it is
    VAE. After each epoch on_epoch is called with the model and the history so far, for a notebook to show them. Returns
    the model, in eval mode, the rows of metrics.csv (losses in nats per image) and the run folder. Raises UserError for
    a bad value, and OSError where the run folder can't be written. Seeds PyTorch's generators and flushes denormals.
    """
    name = dataset.name if isinstance(dataset, ImageData) else str(dataset)
    options = Options(dataset=name, **options)
    check_machine(options)
    flush_denormals()
    if isinstance(dataset, ImageData):
        dataset = dataset.hold_out(options.hold_out or dataset.num_held_out)
    else:
        dataset = load_dataset(name, options.data_dir, options.image_size, options.hold_out)
        name = dataset.name if name in DATASETS else str(Path(name).resolve())  # found from other folders too
    epochs = options.epochs or (150 if dataset.name == "mnist-5k" else 20)
    model = build(model or VAE, dataset, options)
    options = replace(options, dataset=name, hold_out=dataset.num_held_out, epochs=epochs, **sizes_of(model))
    options = choose_how(options, len(dataset.train_images))
    checkpoint = {"epoch": 0, "history": [], "training_weights": model.state_dict()}
    run = utils.on_rank_0(lambda: utils.new_run_folder(options.out_dir, dataset.name, model.config["latent_size"]))
    try:
        return _fit(model, checkpoint, options, dataset, run, on_epoch)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) and (run / "checkpoint.pt").exists():
            error.run = run  # for main to say how it goes on
        elif not checkpoint["history"]:  # no epoch came to its end: nobody is to take it for a run
            utils.discard_run(run)
        raise


def resume(
    run: str | Path,
    model: Model | None = None,
    dataset: str | Path | ImageData | None = None,
    on_epoch: OnEpoch | None = None,
    **changes: Any,
) -> Trained:
    """Goes on with a run, in its folder, from its last whole epoch to `epochs` or to what it was started for.

    A run of a model of your own, or on ImageData, needs it again; dataset may also be the path to which its images have
    moved, which must be the same still. `changes` are the options epochs, data_dir and device.
    On one CPU the weights end bit-identical to those of a run that was never interrupted and, the learning rate being
    constant, to those of a run started with the larger `epochs`, if that is compiled or not like this one: the cosine
    schedule is stretched to the new length.
    A run that has reached them gets its table and pictures written again. Returns and raises as train does.
    """
    path = utils.on_rank_0(lambda: utils.checkpoint_path(run))
    if path.name != "checkpoint.pt":
        raise UserError(f"--resume goes on in a run folder, whose checkpoint.pt it replaces: {path} is not one")
    if fixed := sorted(changes.keys() - {*RESUMABLE}):
        names = ", ".join(map(flag, fixed))
        raise UserError(f"a resumed run keeps its own {names}: --resume takes {', '.join(map(flag, RESUMABLE))}")
    checkpoint = utils.on_rank_0(lambda: utils.read_checkpoint(path))
    damaged = f"{path} cannot be resumed, only evaluated: its training state is damaged or missing"
    try:
        options = Options.saved_in(checkpoint)
    except KeyError as error:
        raise UserError(damaged) from error
    options = replace(options, **{name: value for name, value in changes.items() if value is not None})
    check_machine(options)
    options = keep_how(options)
    flush_denormals()
    if options.epochs < checkpoint.get("epoch", 0):
        raise UserError(f"{path} is trained for {checkpoint['epoch']} epochs: give a larger --epochs to go on")
    if isinstance(dataset, ImageData):
        dataset = dataset.hold_out(options.hold_out)
    else:
        if dataset and str(dataset) not in DATASETS:
            options = replace(options, dataset=str(Path(dataset).resolve()))
        dataset = load_dataset(str(dataset or options.dataset), options.data_dir, options.image_size, options.hold_out)
    model = utils.load_weights(model and build(model, dataset, options), checkpoint, path)
    evaluate.check_images(model, dataset)
    evaluate.check_same_images(checkpoint, dataset, path)
    try:
        check_training_state(checkpoint, model)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(damaged) from error
    utils.clear_parts(path.parent)
    return _fit(model, checkpoint, options, dataset, path.parent, on_epoch)


def build(model: Model, dataset: ImageData, options: Options) -> VAE:
    """What train takes for a model -> the model. Raises UserError where it does not fit the data or the options."""
    if isinstance(model, VAE) and options.init != Options.init:
        raise UserError("--init is for a new model: the one given has its weights")
    if not isinstance(model, VAE):
        utils.seed_epoch(options.seed, 0)
        model = make_vae(dataset, options, model) if isinstance(model, type) else model(dataset, options)
        if options.init == "burda2016":
            initialize(model, dataset.train_images.flatten(1))
    evaluate.check_images(model, dataset)
    for name, size in sizes_of(model).items():
        if getattr(options, name) not in (size, getattr(Options, name)):
            raise UserError(f"{flag(name)} is {getattr(options, name)}, but the {name} of the model given is {size}")
    return model


def make_vae(dataset: ImageData, options: Options, kind: type[VAE] = VAE) -> VAE:
    """A VAE, or a subclass with its arguments, of the options' sizes."""
    return kind(dataset.input_size, **{name: getattr(options, name) for name in SIZES})


def sizes_of(model: VAE) -> dict[str, Any]:
    """The sizes in a model's config that are options too."""
    return {name: model.config[name] for name in SIZES if name in model.config}


def check_machine(options: Options) -> None:
    """Raises UserError where the machine lacks the device, or there are more processes than images per step."""
    utils.choose_device(options.device)
    _, ranks = utils.rank_and_ranks()
    if options.batch_size < ranks:
        raise UserError(f"--batch-size must be {ranks} or more, for as many processes, not {options.batch_size}")


def choose_how(options: Options, num_images: int) -> Options:
    """The options with compile and precision, where they are not given, set for this machine and these sizes."""
    device, (_, ranks) = utils.choose_device(options.device), utils.rank_and_ranks()
    compile, precision = options.compile, options.precision
    if compile is None:
        has_compiler = any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++", "cl")))
        steps = options.epochs * math.ceil(num_images / options.batch_size)
        compile = device.type == "cpu" and ranks == 1 and has_compiler and steps >= STEPS_WORTH_COMPILING
    return replace(options, compile=compile, precision=precision or utils.choose_precision(device, options.batch_size))


def keep_how(options: Options) -> Options:
    """choose_how for a run that is resumed: as before, except on a CPU without units for bfloat16."""
    precision = options.precision or "medium"  # as it was before there was a choice
    if precision == "bfloat16" and utils.choose_device(options.device).type == "cpu" and not utils.bfloat16_units():
        precision = "medium"
        print(
            "warning: this CPU has no units for the bfloat16 that the run was trained in: --precision medium",
            file=sys.stderr,
        )
    return replace(options, compile=bool(options.compile), precision=precision)


def check_training_state(checkpoint: dict[str, Any], model: VAE) -> None:
    """Raises ValueError or another error where training could not go on from a checkpoint's state."""
    history = checkpoint["history"]
    is_row = [row.keys() == {*COLUMNS} and row["epoch"] == i + 1 for i, row in enumerate(history)]
    if len(history) != checkpoint["epoch"] or not all(is_row):
        raise ValueError("its history is not that of its epochs")
    if not all(type(row[name]) is float and math.isfinite(row[name]) for row in history for name in COLUMNS[1:]):
        raise ValueError("its history holds what is no number")
    utils.check_tensors(checkpoint["training_weights"], model.state_dict())
    adam = checkpoint["optimizer_state_dict"]
    for i, weight in enumerate(model.parameters()):
        if history and weight.requires_grad:
            like = {"step": torch.zeros(()), "exp_avg": weight, "exp_avg_sq": weight}
            utils.check_tensors(adam["state"][i], like)
    torch.optim.Adam(model.parameters()).load_state_dict(adam)


@torch.no_grad()
def initialize(model: VAE, images: Tensor) -> None:
    """Glorot-uniform weights, and for bias the log-odds of the mean of the images (N, D) (Burda et al. 2016).

    Raises UserError for a decoder that is not of fully connected layers, whose last bias is the image's.
    """
    if not isinstance(model.decoder, Decoder):
        raise UserError(f"--init burda2016 is for fully connected layers, which {type(model).__name__} has not")
    for layer in (layer for layer in model.modules() if isinstance(layer, nn.Linear)):
        nn.init.xavier_uniform_(layer.weight)
        layer.bias.zero_()
    *_, output_layer = model.decoder.children()
    output_layer.bias.copy_(torch.logit(images.double().mean(0) / 255, eps=1e-3))


def flush_denormals() -> None:
    """Lets the CPU take numbers below 1e-38 for 0, since it multiplies them many times slower than others.

    Adam's moments for pixels that are hardly ever on decay to such numbers, and from the third epoch on the default run
    would be a third slower. To be called before PyTorch starts its threads, which inherit it.
    """
    torch.set_flush_denormal(True)


# ---------------------------------------------------------------------------------------------------------------------
# The training loop


@utils.interrupts_held()
def _fit(
    average: VAE,
    checkpoint: dict[str, Any],
    options: Options,
    dataset: ImageData,
    run: Path,
    on_epoch: OnEpoch | None = None,
) -> Trained:
    """Trains from a checkpoint's state to the options' number of epochs, and saves all after each epoch."""
    history, first = checkpoint["history"], checkpoint["epoch"] + 1
    rank, ranks = utils.rank_and_ranks()

    # Set up: the weights that Adam changes, and their running average, which is what is evaluated and kept
    device = utils.choose_device(options.device)
    train_images, checksum = dataset.train_images.flatten(1).to(device), dataset.checksum()
    test_set = binarize_test_set(dataset.test_images.to(device), options.binarize)
    average = average.to(device).eval()
    model = copy.deepcopy(average) if options.average else average
    model.load_state_dict(checkpoint["training_weights"])
    optimizer = torch.optim.Adam(model.parameters(), lr=options.lr, eps=options.adam_eps, fused=True)
    if "optimizer_state_dict" in checkpoint:
        state = checkpoint["optimizer_state_dict"]["state"]  # the rest is the options'
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    optimizer.param_groups[0]["capturable"] = device.type == "cuda" and ranks == 1  # on a CUDA graph: see make_step
    is_finished = first > options.epochs
    if rank == 0:
        if is_finished or first == 1:
            save(run, average, model, optimizer, options, history, checksum)
        print(start_line(dataset, model, f"{device}, {ranks} processes" if ranks > 1 else str(device), run))
        if is_finished:
            print(f"trained for {options.epochs} epochs, of which all is written again: a larger --epochs goes on")
            draw(run, average, dataset, test_set[0], options, history)

    # Train
    num_images, is_likelihood = len(train_images), average.is_likelihood(test_set[1])
    total, done = options.epochs * num_images, (first - 1) * num_images
    bar = tqdm(total=total, initial=done, unit=" images", unit_scale=True, disable=None if rank == 0 else True)
    with utils.matmul_precision("medium", device), bar as progress:
        for epoch in range(first, options.epochs + 1):
            if epoch in (first, options.elbo_epochs + 1):  # where an objective is taken up
                step, is_compiled = prepare_step(model, optimizer, train_images, options.at(epoch))
                options = replace(options, compile=is_compiled)
            started = time.perf_counter()
            neg_elbos = train_epoch(step, model, average, train_images, epoch, options, progress).cpu()
            seconds = time.perf_counter() - started
            average.eval()
            losses = (neg_elbos.double().sum().item() / num_images, *compute_test_losses(average, *test_set))
            check_finite(neg_elbos, losses, epoch, run)
            history.append(dict(zip(COLUMNS, (epoch, *losses, num_images / seconds, seconds), strict=True)))
            if rank > 0:
                continue
            save(run, average, model, optimizer, options, history, checksum)
            tqdm.write(epoch_line(history[-1], options, average, is_likelihood))
            if epoch == options.epochs or epoch & (epoch - 1) == 0:  # drawing takes a while: at 1, 2, 4, 8, ...
                draw(run, average, dataset, test_set[0], options, history)
            if on_epoch:
                on_epoch(average, history)
    return average, history, run


class Objective(nn.Module):
    """What Adam minimizes, as a module, since that is what DistributedDataParallel wraps."""

    def __init__(self, model: VAE, options: Options):
        super().__init__()
        self.model, self.options = model, options

    def forward(self, inputs: Tensor, targets: Tensor, kl_weight: Tensor) -> tuple[Tensor, Tensor]:
        """(B, D) twice -> the loss, and the negative ELBO, both in nats for the whole batch."""
        if self.options.objective == "iwae":
            _, logvar, mu = self.model.encode(inputs)
            eps = torch.randn(self.options.importance_samples, *mu.shape, device=mu.device)
            log_weights = self.model.log_importance_weights(targets, logvar, mu, eps)
            return nll_from_log_weights(log_weights).sum(), -log_weights.mean(0).sum()
        bce, kl = (term.sum() for term in self.model.elbo_terms(inputs, targets))
        return bce + kl_weight * kl, bce + kl


Step = Callable[[Tensor, Tensor], Tensor]


def prepare_step(model: VAE, optimizer: torch.optim.Optimizer, images: Tensor, options: Options) -> tuple[Step, bool]:
    """make_step of what is checked, and compiled if the options say so and it can be -> the step, and whether it is.

    Raises UserError where a weight takes no part in the loss.
    """
    _, ranks = utils.rank_and_ranks()
    objective, compiled = Objective(model, options), None
    model.train()
    with utils.matmul_precision(options.precision, images.device):
        check_gradients(objective, images[: options.batch_size // ranks], options)
        if options.compile:
            compiled = compile_step(objective, optimizer, images, options)
    return make_step(model, optimizer, images, options, compiled), compiled is not None


def make_step(
    model: VAE, optimizer: torch.optim.Optimizer, images: Tensor, options: Options, compiled: Step | None = None
) -> Step:
    """-> step(batch, rates), which takes one step of Adam on the images (N, D) uint8 at the indices batch (B,).

    rates (2,) holds the learning rate and the weight of the KL. The step returns the negative ELBO that it found, in
    nats for the whole batch. Nothing in it makes the CPU wait for a GPU. With several processes, batch is the share
    of this one, and the gradients are those of all shares together. Full batches go to compiled, if there is one.
    """
    _, ranks = utils.rank_and_ranks()
    objective = Objective(model, options)
    if ranks > 1:
        objective = DistributedDataParallel(objective)
    scale = torch.tensor(float(ranks), device=images.device)  # undoes DDP's mean over ranks: the loss is a sum

    def step(batch: Tensor, rates: Tensor) -> Tensor:
        if compiled and len(batch) == min(options.batch_size, len(images)):
            return compiled(batch, rates)
        lr, kl_weight = rates.unbind()
        inputs, targets = binarize(images.index_select(0, batch), options.binarize)
        loss, neg_elbo = objective(inputs, targets, kl_weight)
        optimizer.zero_grad()
        loss.backward(scale.to(loss.dtype))
        if options.clip_grad_norm:
            nn.utils.clip_grad_norm_(model.parameters(), options.clip_grad_norm)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        return neg_elbo.detach()

    return utils.CudaGraph(step) if images.is_cuda and ranks == 1 else step


def compile_step(
    objective: Objective, optimizer: torch.optim.Optimizer, images: Tensor, options: Options
) -> Step | None:
    """A step for full batches, from the binarization to Adam, as one function that torch.compile makes one program of.

    It changes the same weights and the same state of Adam in place as the step of single operations, and draws the same
    random numbers. None, after a line that says why, where it can't be compiled.
    """
    rank, ranks = utils.rank_and_ranks()
    if ranks > 1 or images.device.type == "mps":
        if rank == 0:
            tqdm.write("note: with several processes, and on mps, the step is not compiled", file=sys.stderr)
        return None
    weights = {name: weight for name, weight in objective.named_parameters() if weight.requires_grad}
    buffers = dict(objective.named_buffers())
    for weight in weights.values():
        zeros = {"exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}
        optimizer.state[weight] = optimizer.state[weight] or zeros | {"step": torch.zeros((), device=weight.device)}
    adam = [optimizer.state[weight] for weight in weights.values()]
    (group,) = optimizer.param_groups
    betas = torch.tensor(group["betas"], device=images.device, dtype=torch.float64)

    def loss(weights: dict[str, Tensor], buffers: dict[str, Tensor], *args: Tensor) -> tuple[Tensor, Tensor]:
        return functional_call(objective, weights | buffers, args)

    def whole_step(weights, buffers, adam, images, bits, rates, corrections):  # type: ignore[no-untyped-def]
        lr, kl_weight = rates.unbind()
        inputs, targets = binarize(images, options.binarize, bits=bits)
        gradients, (_, neg_elbo) = grad_and_value(loss, has_aux=True)(weights, buffers, inputs, targets, kl_weight)
        if options.clip_grad_norm:
            scale = (options.clip_grad_norm / nn.utils.get_total_norm(gradients.values())).clamp(max=1)
            gradients = {name: scale * gradient for name, gradient in gradients.items()}
        for name, state in zip(weights, adam, strict=True):
            adam_step(weights[name], gradients[name], state, lr, corrections, group["betas"], group["eps"])
        return neg_elbo

    whole_step.__code__ = whole_step.__code__.replace()  # of its own: PyTorch compiles one 8 times at most
    compiled = torch.compile(whole_step, fullgraph=True, dynamic=False, options={"fallback_random": True})

    def step(batch: Tensor, rates: Tensor, copy: Callable[[Any], Any] = lambda state: state) -> Tensor:
        chosen = images.index_select(0, batch)
        bits = draw_bits(chosen.shape, chosen.device) if options.binarize == "dynamic" else None
        corrections = (1 - betas ** (adam[0]["step"] + 1)).float()
        with torch.no_grad():
            return compiled(copy(detached), copy(buffers), copy(adam), chosen, bits, rates, corrections)

    detached = {name: weight.detach() for name, weight in weights.items()}  # the same memory
    tqdm.write("compiling the training step, which takes up to half a minute (--no-compile leaves it out)")
    sys.stdout.flush()
    try:
        step(
            torch.arange(min(options.batch_size, len(images)), device=images.device),
            torch.ones(2, device=images.device),
            copy.deepcopy,
        )
    except Exception as error:  # of many kinds, from PyTorch and from the compiler
        reason = f"{type(error).__name__}: {utils.one_line(error)[:200]}"
        tqdm.write(f"warning: the step can't be compiled and is not, which is only slower ({reason})", file=sys.stderr)
        return None
    return step


def adam_step(
    weight: Tensor,
    gradient: Tensor,
    state: dict[str, Tensor],
    lr: Tensor,
    corrections: Tensor,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """Adam (Kingma & Ba 2015, arXiv 1412.6980, algorithm 1), in place, with the state of torch.optim.Adam.

    corrections (2,) are 1 - beta^t at this step, t, which the moments are divided by.
    """
    for moment, value, beta in zip(("exp_avg", "exp_avg_sq"), (gradient, gradient**2), betas, strict=True):
        state[moment].lerp_(value, 1 - beta)
    first, second = corrections.unbind()
    weight.sub_(lr / first * state["exp_avg"] / ((state["exp_avg_sq"] / second).sqrt() + eps))
    state["step"].add_(1)


def train_epoch(
    step: Step,
    model: VAE,
    average: VAE,
    images: Tensor,
    epoch: int,
    options: Options,
    progress: tqdm,
) -> Tensor:
    """One pass over the images (N, D) in a new order -> each step's negative ELBO, in nats: (steps,)."""
    rank, ranks = utils.rank_and_ranks()
    utils.seed_epoch(options.seed, epoch)
    batches = torch.randperm(len(images), device=images.device).split(options.batch_size)  # the same on every rank
    if rank > 0:
        utils.seed_epoch(options.seed, epoch, rank)  # other noise
    starts = [epoch - 1 + i / len(batches) for i in range(len(batches))]  # in epochs
    rates = [(learning_rate(start, options), kl_weight(start, options)) for start in starts]
    rates = torch.tensor(rates, device=images.device)
    neg_elbos = torch.empty(len(batches), device=images.device)  # stay there until the epoch ends
    stride = max(1, len(batches) // AVERAGES_PER_EPOCH)
    model.train()
    with utils.matmul_precision(options.precision, images.device):
        for i, batch in enumerate(batches):
            utils.let_interrupts_through()
            neg_elbos[i] = step(batch[rank::ranks], rates[i])
            if options.average and i % stride == 0:
                update_average(average, model, count=(epoch - 1) * math.ceil(len(batches) / stride) + i // stride)
            progress.update(len(batch))
    return utils.sum_over_ranks(neg_elbos)


def compute_test_losses(model: VAE, inputs: Tensor, targets: Tensor) -> tuple[float, float, float]:
    """The negative ELBO on the test set and its terms, BCE and KL, in nats per image."""
    rank, ranks = utils.rank_and_ranks()
    utils.copy_from_rank_0(model)
    bce, kl = evaluate.elbo_terms(model, inputs[rank::ranks], targets[rank::ranks])
    sums = utils.sum_over_ranks(torch.stack([bce.sum(), kl.sum()]))
    bce, kl = (sums / len(inputs)).tolist()
    return bce + kl, bce, kl


def check_gradients(objective: Objective, images: Tensor, options: Options) -> None:
    """Raises UserError where a weight takes no part in the loss: a mistake, and nothing to resume Adam with."""
    objective = copy.deepcopy(objective)  # whose buffers stay as they are
    loss, _ = objective(*binarize(images, options.binarize), torch.ones((), device=images.device))
    loss.backward()
    weights = objective.model.named_parameters()
    if idle := [name for name, weight in weights if weight.requires_grad and weight.grad is None]:
        raise UserError(f"no gradient reaches {', '.join(idle)}: leave it out of the model, or freeze it")


def check_finite(neg_elbos: Tensor, losses: tuple[float, ...], epoch: int, run: Path) -> None:
    """Raises UserError where a loss of an epoch's steps (steps,), or one after them, is not finite."""
    if not all(map(math.isfinite, losses)):  # the first is the mean of neg_elbos
        bad = (~torch.isfinite(neg_elbos)).nonzero().flatten().tolist()
        step = f"step {bad[0] + 1}" if bad else "the test after its last step"
        cause = "the steps are likely too large: try a smaller --lr, or --clip-grad-norm"
        kept = f". {run} holds epoch {epoch - 1}" if epoch > 1 else ""
        raise UserError(f"the loss is not finite in epoch {epoch}, {step}; {cause}{kept}")


def learning_rate(done: float, options: Options) -> float:
    """Adam's step size after `done` epochs."""
    if options.lr_schedule == "cosine":
        return options.lr * 0.5 * (1 + math.cos(math.pi * done / options.epochs))
    if options.lr_schedule == "burda2016":  # a factor of 10^(-1/7) after 1, 1 + 3, 1 + 3 + 9, ... epochs
        i = next(i for i in range(99) if done < (3 ** (i + 1) - 1) / 2)
        return options.lr * 10 ** (-i / 7)
    return options.lr


def kl_weight(done: float, options: Options) -> float:
    """The KL's weight after `done` epochs: beta, reached linearly over the first kl_warmup epochs."""
    return options.beta * min(1.0, done / options.kl_warmup) if options.kl_warmup else options.beta


@torch.no_grad()
def update_average(average: VAE, model: VAE, count: int, eta: float = 9) -> None:
    """Polynomial-decay averaging of the weights (Shamir & Zhang 2013, arXiv 1212.1824), after `count` updates.

    Does what a falling learning rate does, without having to know when training ends: the average leans on the last
    tenth or so of all steps, however many there were. Buffers of floats, such as the statistics of a normalization,
    are averaged like the weights, and others are copied.
    """
    for mean, weight in zip(average.parameters(), model.parameters(), strict=True):
        mean.lerp_(weight, (eta + 1) / (count + 1 + eta))
    for mean, buffer in zip(average.buffers(), model.buffers(), strict=True):
        if buffer.is_floating_point():  # but for what is infinite, such as a mask
            mean.copy_(torch.where(buffer.isinf(), buffer, mean.lerp(buffer, (eta + 1) / (count + 1 + eta))))
        else:
            mean.copy_(buffer)


# ---------------------------------------------------------------------------------------------------------------------
# What a run leaves


def save(run: Path, average: VAE, model: VAE, optimizer: Any, options: Options, history: list, checksum: int) -> None:
    """Writes checkpoint.pt, from which everything else in the run folder can be made again, and metrics.csv."""
    optimizer.param_groups[0]["lr"] = options.lr  # the plain number: the next step sets what its schedule says
    checkpoint = {
        "model_state_dict": average.state_dict(),
        "optimizer_state_dict": optimizer.state_dict(),
        "model": average.config,
        "class": utils.class_name(average),
        "training_weights": model.state_dict(),
        "options": options.to_save(),
        "checksum": checksum,
        "epoch": len(history),
        "history": history,
    }
    utils.save_checkpoint(run / "checkpoint.pt", checkpoint)
    if history:
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS)
        writer.writeheader()
        writer.writerows(history)
        utils.write_atomically(run / "metrics.csv", text.getvalue().encode())


def start_line(dataset: ImageData, model: VAE, where: str, run: Path) -> str:
    held_out = f", {dataset.num_held_out:,} others held out to test on" if dataset.num_held_out else ""
    images = f"{len(dataset.train_images):,} training images{held_out}"
    weights = sum(weight.numel() for weight in model.parameters())
    return f"{dataset.name}: {images}; {weights:,} weights on {where}; writing to {run}"


def epoch_line(row: dict[str, float], options: Options, model: VAE, is_likelihood: bool) -> str:
    label = "" if is_likelihood else "  (gray targets: no likelihood)"
    return (
        f"epoch {row['epoch']:{len(str(options.epochs))}d}/{options.epochs}  train {row['train_loss']:7.2f}  "
        f"test {row['test_loss']:7.2f} = {evaluate.bce_label(model)} {row['test_bce']:6.2f} + "
        f"KL {row['test_kl']:5.2f}  {row['images_per_second']:9,.0f} images/s{label}"
    )


def draw(run: Path, model: VAE, dataset: ImageData, inputs: Tensor, options: Options, history: list) -> None:
    """Writes the pictures that show how far the run has come, of test images whose binarization is `inputs`."""
    caption = evaluate.describe(dataset.name, options.binarize, model, len(history), dataset.num_held_out)
    figures = {
        "curves.png": draw_curves(history, caption, evaluate.bce_label(model)),
        "reconstructions.png": evaluate.draw_reconstructions(model, dataset, inputs, caption),
        "prior_samples.png": evaluate.draw_prior_samples(model, caption, dataset.shape),
    }
    for name, figure in figures.items():
        evaluate.save_figure(figure, run / name)


def draw_curves(history: list[dict[str, Any]], caption: str, bce: str = "BCE") -> "Figure":
    """Training and test loss over the epochs, and the test loss's two terms."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator

    figure = Figure(figsize=(9, 3), layout="constrained")
    figure.suptitle(evaluate.verbatim(f"Training curves: {caption}"), fontsize=10)
    panels = {
        "loss": {"train_loss": "training set, as it was learned", "test_loss": "test set, after the epoch"},
        bce: {"test_bce": "test set"},
        "KL": {"test_kl": "test set"},
    }
    epochs = [row["epoch"] for row in history]
    for axes, (title, columns) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for (column, label), color in zip(columns.items(), ("#ffa90e", "#3f90da")[-len(columns) :], strict=True):
            axes.plot(epochs, [row[column] for row in history], marker=".", color=color, label=label)
        axes.set(title=title, xlabel="epoch", ylabel="nats per image")
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
        if len(history) > 10:  # most happens in the first epochs
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter("{x:.0f}")
            axes.xaxis.set_minor_formatter("")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, frameon=False)
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# The command


def make_parser(description: str, defaults: dict[str, Any], left_out: tuple[str, ...] = ()) -> utils.ArgumentParser:
    """The command line of Options, and --resume. What is not given is absent from what it parses."""
    parser = utils.ArgumentParser(
        description=description, argument_default=argparse.SUPPRESS, fromfile_prefix_chars="@"
    )
    for option in (option for option in fields(Options) if option.name not in left_out):
        default, help, kind = defaults.get(option.name, option.default), option.metadata["help"], kind_of(option)
        details = {"help": help if default is None else f"{help} (default: {default})"}
        if kind is bool:
            details["action"] = argparse.BooleanOptionalAction
        elif option.metadata["choices"]:
            details["choices"] = option.metadata["choices"]
        else:
            details |= {"type": kind, "metavar": {int: "N", float: "X"}.get(kind, option.name.split("_")[-1].upper())}
        parser.add_argument(flag(option.name), **details)
    if "resume" not in left_out:
        takes = f"go on with this run folder: takes {', '.join(map(flag, RESUMABLE))}"
        parser.add_argument("--resume", metavar="RUN", help=takes)
    return parser


def parse_args(args: list[str] | None = None) -> argparse.Namespace:
    """The options that were given, by default on the command line; what was not is absent."""
    return make_parser(__doc__, {}).parse_args(args)


@utils.command
def main(model: Model | None = None, description: str | None = __doc__, **defaults: Any) -> None:
    """The command `python train.py`, and that of an experiment, which gives another model, and evaluates it too."""
    is_experiment = model is not None
    parser = make_parser(description, defaults)
    if is_experiment:
        evaluate.add_nll_samples(parser)
    given = vars(parser.parse_args())
    nll_samples, resumed = given.pop("nll_samples", None), given.pop("resume", None)
    script, place = sys.argv[0], ["--data-dir", given["data_dir"]] if "data_dir" in given else []
    try:
        with utils.process_group():
            if resumed is None:
                model, _, run = train(model=model, **(defaults | given))
            else:
                model, _, run = resume(resumed, model, **given)
            rank, _ = utils.rank_and_ranks()
    except KeyboardInterrupt as error:
        if resumed or hasattr(error, "run"):
            again = sys.argv if resumed else [script, "--resume", error.run, *place]
            error.args = (f"{str(error) or 'interrupted'}: {utils.shell_line('python', *again)} goes on",)
        raise
    if rank == 0 and is_experiment:
        places = {"data_dir": given.get("data_dir", Options.data_dir), "device": next(model.parameters()).device.type}
        evaluate.evaluate_run(run, model, nll_samples=nll_samples, **places)
    elif rank == 0:
        print(f"done: now try {utils.shell_line('python', Path(script).with_name('evaluate.py'), run, *place)}")


if __name__ == "__main__":
    main()
