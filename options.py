"""The options of `python train.py`. Each is stated once, with its group, its values, its default and its help."""

import dataclasses
import difflib
import math
from argparse import ArgumentTypeError, BooleanOptionalAction
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from data import BINARIZE, BINARIZED_DATASETS, DATASETS, ImageData
from measure import usual_binarize
from model import ACTIVATIONS, LIKELIHOODS, VAE
from step import PRECISIONS, STEPS_WORTH_COMPILING, choose_precision, is_worth_compiling
from utils import DEVICES, ArgumentParser, UserError, choose_device, count, flag, number, rank_and_ranks, text

SIZES = (
    "hidden_size",
    "latent_size",
    "encoder_layers",
    "decoder_layers",
    "activation",
    "likelihood",
)  # VAE's arguments
PLACES = ("data_dir", "out_dir")  # paths on this machine, which a checkpoint does not keep
RESUMABLE = ("epochs", "dataset", "data_dir", "device", "compile", "precision")  # what --resume takes

whole = number(int, 0, 2**31)
layers = number(int, 1, 1000)
positive = number(float, 1e-30, 1e30)
nonnegative = number(float, 0, 1e6)


def option(group: str, values: Callable | tuple[str, ...] | type[bool], default: Any, help: str) -> Any:
    """A field of Options. values is a tuple of choices, bool, or a function that checks a value or parses its text."""
    return dataclasses.field(default=default, metadata={"group": group, "values": values, "help": help})


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of a run, checked as on the command line. None means that resolve chooses. Raises UserError."""

    dataset: str = option(
        "data",
        text,
        "auto",
        f"{', '.join(DATASETS[1:])}, or the path of a folder of images or of an .npz file; auto is mnist, or mnist-5k "
        "where mnist is unavailable",
    )
    image_size: int | None = option("data", count, None, "width and height of a folder's pictures (default: 28)")
    grayscale: bool = option("data", bool, False, "convert images to gray")
    mirror: bool = option("data", bool, False, "train on each image and its mirror image")
    binarize: str | None = option(
        "data",
        BINARIZE,
        None,
        "dynamic: sampled pixels; threshold: gray input, black and white target; none: unchanged (default: dynamic "
        "with the Bernoulli, none with the logistic)",
    )
    hold_out: int = option("data", whole, 0, "test on the last N training images, to choose settings")
    data_dir: str = option("data", text, "data", "where data sets are read from and downloaded to")

    hidden_size: int = option("model", count, 512, "width of the hidden layers")
    latent_size: int = option("model", count, 20, "dimensions of z")
    encoder_layers: int = option("model", layers, 2, "hidden layers of the encoder")
    decoder_layers: int = option("model", layers, 1, "hidden layers of the decoder")
    activation: str = option("model", tuple(ACTIVATIONS), "relu", "after each hidden layer")
    likelihood: str | None = option(
        "model",
        LIKELIHOODS,
        None,
        "of pixels that are black or white, or of 256 levels (default: logistic for images of your own, cifar10 and "
        "svhn unless binarized)",
    )

    epochs: int | None = option("training", count, None, "passes over the training set (default: 20, 150 on mnist-5k)")
    batch_size: int = option("training", count, 128, "images per step")
    lr: float = option("training", positive, 1.5e-3, "Adam's step size")
    lr_schedule: str = option("training", ("constant", "cosine"), "constant", "cosine falls to 0 at the last epoch")
    adam_eps: float = option(
        "training", positive, 1e-8, "Adam's epsilon (gradients are sums over the batch, not means)"
    )
    clip_grad_norm: float | None = option(
        "training", positive, None, "scale a step's gradient down to this norm if it is larger"
    )
    average: bool = option("training", bool, True, "keep a running average of the weights")
    seed: int = option("training", number(int, 0, 2**40), 0, "random seed")

    objective: str = option("objective", ("elbo", "iwae"), "elbo", "the bound to train on (Burda et al. 2016)")
    importance_samples: int = option("objective", count, 1, "draws of z per image for --objective iwae")
    elbo_epochs: int = option("objective", whole, 0, "epochs on the ELBO before the IWAE takes over")
    beta: float = option("objective", nonnegative, 1.0, "weight of the KL in training, not in printed losses")
    kl_warmup: float = option("objective", nonnegative, 0.0, "epochs over which the KL's weight rises to beta")

    device: str = option("computation", DEVICES, "auto", "auto is the first of cuda, mps and cpu available")
    compile: bool | None = option(
        "computation",
        bool,
        None,
        f"compile the step (default: for {STEPS_WORTH_COMPILING['cpu']:,} steps or more on a CPU with a C++ compiler, "
        f"{STEPS_WORTH_COMPILING['cuda']:,} on a GPU)",
    )
    precision: str | None = option(
        "computation", PRECISIONS, None, "of matrix products (default: the fastest on this machine)"
    )
    out_dir: str = option("computation", text, "runs", "where run folders are created")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None:
                object.__setattr__(self, field.name, check(field, value))
        if self.objective == "elbo" and (self.importance_samples > 1 or self.elbo_epochs > 0):
            raise UserError("--importance-samples and --elbo-epochs are for --objective iwae")
        if self.objective == "iwae" and (self.beta != 1 or self.kl_warmup > self.elbo_epochs):
            raise UserError("--beta, and --kl-warmup beyond --elbo-epochs, are for the ELBO: iwae has no KL to weigh")

    @property
    def sizes(self) -> dict[str, Any]:
        """The model's arguments that are options."""
        return {name: getattr(self, name) for name in SIZES if getattr(self, name) is not None}

    def resolve(self, dataset: ImageData) -> "Options":
        """Chooses what was left open and depends on the data set."""
        is_binarized = dataset.name in BINARIZED_DATASETS or self.binarize in ("dynamic", "threshold")
        return dataclasses.replace(
            self,
            epochs=self.epochs or (150 if dataset.name == "mnist-5k" else 20),
            likelihood=self.likelihood or ("bernoulli" if is_binarized else "logistic"),
            hold_out=dataset.num_held_out,
        )

    def resolve_for(self, model: VAE, dataset: ImageData) -> "Options":
        """Chooses what is left open then, which depends on the model and on this machine."""
        device = choose_device(self.device)
        compile = self.compile
        if compile is None:
            num_images = len(dataset.train_images) * (2 if self.mirror else 1)
            steps = self.epochs * math.ceil(num_images / self.batch_size)
            compile = is_worth_compiling(device, rank_and_ranks()[1], steps)
        return dataclasses.replace(
            self,
            **{name: model.config[name] for name in SIZES if name in model.config},
            binarize=self.binarize or usual_binarize(model),
            compile=compile,
            precision=self.precision or choose_precision(device, self.batch_size, compile),
        )


def check(field: dataclasses.Field, value: Any) -> Any:
    """Returns a value in the field's type. Raises UserError if the field cannot take it."""
    values = field.metadata["values"]
    if isinstance(values, tuple):
        if not (isinstance(value, str) and value in values):
            raise UserError(f"{flag(field.name)} must be one of {', '.join(values)}, not {value}")
        return value
    if values is bool:
        if str(value) not in ("True", "False"):  # NumPy's booleans are fine
            raise UserError(f"{flag(field.name)} must be True or False, not {value}")
        return bool(value)
    try:
        return values(value)
    except ArgumentTypeError as error:
        raise UserError(f"{flag(field.name)} {error}") from error


def make_options(**given: Any) -> Options:
    """The options given by name, and defaults for the others. Raises UserError for an unknown option or a bad value."""
    names = [field.name for field in dataclasses.fields(Options)]
    for name in given.keys() - names:
        near = difflib.get_close_matches(name, names, 1)
        raise UserError(f"there is no option {flag(name)}" + (f": did you mean {flag(near[0])}?" if near else ""))
    return Options(**given)


def make_parser(description: str | None, **defaults: Any) -> ArgumentParser:
    """The command line, with other defaults for some of the options. It parses only what is given."""
    parser = ArgumentParser(description=description)
    resumable = ", ".join(map(flag, RESUMABLE))
    parser.add_argument("--resume", metavar="RUN", help=f"continue this run folder; only {resumable} can be changed")
    groups = {}
    for field in dataclasses.fields(Options):
        name = field.metadata["group"]
        if name not in groups:
            groups[name] = parser.add_argument_group(name)
        default = defaults.get(field.name, field.default)
        help = field.metadata["help"] + ("" if default is None else f" (default: {default})")
        values = field.metadata["values"]
        if isinstance(values, tuple):
            kind = {"choices": values}
        elif values is bool:
            kind = {"action": BooleanOptionalAction}
        else:
            kind = {"type": values}
        groups[name].add_argument(flag(field.name), help=help, **kind)
    return parser


def parse_given(parser: ArgumentParser, words: list[str] | None = None) -> dict[str, Any]:
    """The options that a command line gives, by name."""
    return {name: value for name, value in vars(parser.parse_args(words)).items() if value is not None}
