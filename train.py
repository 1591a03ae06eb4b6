"""Trains a VAE with Adam on the negative ELBO: -log p(x|z), summed over the pixels, + KL.

    python train.py                                   # MNIST, 20 epochs
    python train.py --latent-size 2 --epochs 50
    python train.py @recipes/pytorch-example.txt      # options from a file
    python train.py --resume runs/001-mnist-z20 --epochs 40

Each run writes a folder of its own, runs/NNN-DATASET-zLATENT: checkpoint.pt, metrics.csv, curves.png, and pictures of
reconstructions and samples. python evaluate.py then measures and shows what the newest run learned.
"""

import contextlib
import copy
import inspect
import math
import sys
import time
from argparse import BooleanOptionalAction, Namespace
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from tqdm import tqdm

import evaluate
import measure
import pictures
import utils
from data import BINARIZE, BINARIZED_DATASETS, DATASETS, ImageData, binarize, load_dataset
from model import ACTIVATIONS, LIKELIHOODS, VAE, Decoder, LatentZ
from step import (
    PRECISIONS,
    STEPS_WORTH_COMPILING,
    Recorded,
    Step,
    Steps,
    choose_precision,
    is_worth_compiling,
    matmul_precision,
)
from utils import UserError, count, flag, number, rank_and_ranks, sum_gradients, text

COLUMNS = ("epoch", "train_loss", "test_loss", "test_reconstruction", "test_kl", "images_per_second", "seconds")
STEPS_AT_ONCE = 8  # binarized together, recorded together on a GPU, and followed by an update of the averaged weights
PLACES = ("data_dir", "out_dir")  # paths on this machine, which a checkpoint does not keep
RESUMABLE = ("epochs", "dataset", "data_dir", "device", "compile", "precision")  # what --resume takes
SIZES = (
    "hidden_size",
    "latent_size",
    "encoder_layers",
    "decoder_layers",
    "activation",
    "likelihood",
)  # VAE's arguments
Model = VAE | type[VAE] | Callable[[ImageData, Namespace], VAE]  # a model, its class, or a function that makes it
History = list[dict[str, float]]  # the rows of metrics.csv; losses in nats per image
OnEpoch = Callable[[VAE, History], None]


# ---------------------------------------------------------------------------------------------------------------------
# The options


def make_parser(description: str | None = __doc__, **defaults: Any) -> utils.ArgumentParser:
    """The command line, with other defaults for some of the options."""
    parser = utils.ArgumentParser(description=description)
    resumable = ", ".join(map(flag, RESUMABLE))
    parser.add_argument("--resume", metavar="RUN", help=f"continue this run folder; only {resumable} can be changed")
    _add_data_and_model_options(parser)
    _add_training_options(parser)
    parser.set_defaults(**defaults)
    return parser


def _add_data_and_model_options(parser: utils.ArgumentParser) -> None:
    add = parser.add_argument_group("data").add_argument
    names = f"{', '.join(DATASETS[1:])}, or the path of a folder of images or of an .npz file"
    auto = "auto is mnist, or mnist-5k where mnist is unavailable"
    modes = "dynamic: sampled pixels; threshold: gray input, black and white target; none: unchanged"
    by_data = "dynamic with the Bernoulli, none with the logistic"
    add("--dataset", type=text, default="auto", help=f"{names}; {auto}")
    add("--image-size", type=count, help="width and height of a folder's pictures (default: 28)")
    add("--grayscale", action=BooleanOptionalAction, default=False, help="convert images to gray")
    add("--mirror", action=BooleanOptionalAction, default=False, help="train on each image and its mirror image")
    add("--binarize", choices=BINARIZE, help=f"{modes} (default: {by_data})")
    add(
        "--hold-out",
        type=number(int, 0, 2**31),
        default=0,
        help="test on the last N training images, to choose settings",
    )
    add("--data-dir", type=text, default="data", help="where data sets are read from and downloaded to")

    add = parser.add_argument_group("model").add_argument
    by_data = "(default: logistic for images of your own, cifar10 and svhn unless binarized)"
    glorot = "burda2016: Glorot-uniform weights, and the mean image as the output's bias"
    add("--hidden-size", type=count, default=512, help="width of the hidden layers")
    add("--latent-size", type=count, default=20, help="dimensions of z")
    add("--encoder-layers", type=number(int, 1, 1000), default=2, help="hidden layers of the encoder")
    add("--decoder-layers", type=number(int, 1, 1000), default=1, help="hidden layers of the decoder")
    add("--activation", choices=ACTIVATIONS, default="relu", help="after each hidden layer")
    add("--likelihood", choices=LIKELIHOODS, help=f"of pixels that are black or white, or of 256 levels {by_data}")
    add("--init", choices=("pytorch", "burda2016"), default="pytorch", help=glorot)


def _add_training_options(parser: utils.ArgumentParser) -> None:
    positive, nonnegative, whole = number(float, 1e-30, 1e30), number(float, 0, 1e6), number(int, 0, 2**31)
    add = parser.add_argument_group("training").add_argument
    schedules = ("constant", "cosine", "burda2016")
    add("--epochs", type=count, help="passes over the training set (default: 20, and 150 on mnist-5k)")
    add("--batch-size", type=count, default=128, help="images per step")
    add("--lr", type=positive, default=1.5e-3, help="Adam's step size")
    add("--lr-schedule", choices=schedules, default="constant", help="cosine falls to 0 at the last epoch")
    add("--adam-eps", type=positive, default=1e-8, help="Adam's epsilon (gradients are sums over the batch, not means)")
    add("--clip-grad-norm", type=positive, help="scale a step's gradient down to this norm if it is larger")
    add("--average", action=BooleanOptionalAction, default=True, help="keep a running average of the weights")
    add("--seed", type=number(int, 0, 2**40), default=0, help="random seed")

    add = parser.add_argument_group("objective").add_argument
    add("--objective", choices=("elbo", "iwae"), default="elbo", help="the bound to train on (Burda et al. 2016)")
    add("--importance-samples", type=count, default=1, help="draws of z per image for --objective iwae")
    add("--elbo-epochs", type=whole, default=0, help="epochs on the ELBO before the IWAE takes over")
    add("--beta", type=nonnegative, default=1.0, help="weight of the KL in training, not in printed losses")
    add("--kl-warmup", type=nonnegative, default=0.0, help="epochs over which the KL's weight rises to beta")

    add = parser.add_argument_group("computation").add_argument
    cpu, gpu = (f"{STEPS_WORTH_COMPILING[device]:,}" for device in ("cpu", "cuda"))
    how = f"compile the step (default: for {cpu} steps or more on a CPU with a C++ compiler, {gpu} on a GPU)"
    add("--device", choices=utils.DEVICES, default="auto", help="auto is the first of cuda, mps and cpu available")
    add("--compile", action=BooleanOptionalAction, help=how)
    add("--precision", choices=PRECISIONS, help="of matrix products (default: the fastest on this machine)")
    add("--out-dir", type=text, default="runs", help="where run folders are created")


def make_options(**given: Any) -> Namespace:
    """The options given by name, checked as on the command line, and the defaults of the others.

    Raises UserError for an unknown option or a bad value.
    """
    if "resume" in given:
        raise UserError("a run is resumed by train.resume(run), not by an option of train.train")
    words = []
    for name, value in given.items():
        if str(value) in ("True", "False"):  # or NumPy's
            words.append(flag(name if value else f"no_{name}"))
        elif value is not None:
            words.append(f"{flag(name)}={value}")
    options = make_parser().parse_args(words)
    del options.resume
    if options.objective == "elbo" and (options.importance_samples > 1 or options.elbo_epochs > 0):
        raise UserError("--importance-samples and --elbo-epochs are for --objective iwae")
    if options.objective == "iwae" and (options.beta != 1 or options.kl_warmup > options.elbo_epochs):
        raise UserError("--beta, and --kl-warmup beyond --elbo-epochs, are for the ELBO: iwae has no KL to weigh")
    return options


def parse_given(parser: utils.ArgumentParser, words: list[str] | None = None) -> dict[str, Any]:
    """The arguments of a command line that were given, by name."""
    unset = Namespace(**dict.fromkeys(vars(parser.parse_args(words))))
    given = parser.parse_args(words, unset)  # argparse sets no default where there is an attribute
    return {name: value for name, value in vars(given).items() if value is not None}


# ---------------------------------------------------------------------------------------------------------------------
# Training


class Adam:
    """Kingma & Ba 2015 (arXiv 1412.6980), algorithm 1, with one count of steps for all weights."""

    def __init__(
        self, weights: Iterable[Tensor], lr: float, eps: float = 1e-8, betas: tuple[float, float] = (0.9, 0.999)
    ):
        self.weights = [weight for weight in weights if weight.requires_grad]
        self.lr = lr
        self.eps = eps
        self.betas = betas
        self.steps = 0
        self.first = [torch.zeros_like(weight) for weight in self.weights]  # moving averages of the gradient
        self.second = [torch.zeros_like(weight) for weight in self.weights]  # and of its square

    def corrected(self, lr: float, ahead: int) -> tuple[float, float]:
        """The step size and epsilon of the step after `ahead` others, corrected for the moments' bias (section 2)."""
        t = self.steps + ahead + 1
        beta1, beta2 = self.betas
        root = math.sqrt(1 - beta2**t)
        return lr * root / (1 - beta1**t), self.eps * root

    @torch.no_grad()
    def update(self, gradients: Sequence[Tensor], step_size: Tensor, eps: Tensor) -> None:
        """Changes the weights by one step. The caller counts steps."""
        beta1, beta2 = self.betas
        for weight, gradient, first, second in zip(self.weights, gradients, self.first, self.second, strict=True):
            first.lerp_(gradient, 1 - beta1)
            second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            weight.sub_((step_size * first).div_(second.sqrt().add_(eps)))

    def state_dict(self) -> dict[str, Any]:
        """The state as torch.optim.Adam has it."""
        group = {"lr": self.lr, "betas": self.betas, "eps": self.eps, "weight_decay": 0, "amsgrad": False}
        group["params"] = list(range(len(self.weights)))
        state = {}
        for i, (first, second) in enumerate(zip(self.first, self.second, strict=True)):
            state[i] = {"step": torch.tensor(float(self.steps)), "exp_avg": first, "exp_avg_sq": second}
        return {"state": state, "param_groups": [group]}

    @torch.no_grad()
    def load_state_dict(self, saved: dict[str, Any]) -> None:
        for i, (first, second) in enumerate(zip(self.first, self.second, strict=True)):
            state = saved["state"][i]
            self.steps = int(state["step"])
            first.copy_(state["exp_avg"])
            second.copy_(state["exp_avg_sq"])


def make_step(model: VAE, adam: Adam, options: Namespace, num_samples: int | None = None) -> Step:
    """Returns step(inputs, targets, y, rates), which takes one step of Adam on a batch.

    inputs and targets are (B, ...), labels y are (B,), and rates (3,) holds Adam's step size and epsilon and the weight
    of the KL. num_samples is None for the ELBO, or K for the IWAE's bound with K draws of z. The step returns the
    negative ELBO that it found, in nats for the whole batch. With several processes, the batch is this one's share, and
    the gradients are those of all shares together.
    """

    def step(inputs: Tensor, targets: Tensor, y: Tensor, rates: Tensor) -> Tensor:
        step_size, eps, kl_weight = rates.unbind()
        if num_samples is None:
            loss, neg_elbo = model.loss(inputs, targets, y, kl_weight)
        else:
            loss, neg_elbo = model.iwae_loss(inputs, targets, y, num_samples)
        gradients = torch.autograd.grad(loss.sum(), adam.weights, materialize_grads=True)
        gradients = sum_gradients(gradients)
        if options.clip_grad_norm:
            scale = (options.clip_grad_norm / nn.utils.get_total_norm(gradients)).clamp(max=1)
            gradients = [scale * gradient for gradient in gradients]
        adam.update(gradients, step_size, eps)
        return neg_elbo.detach().sum()

    return step


def make_steps(
    model: VAE, adam: Adam, images: Tensor, labels: Tensor, options: Namespace, num_samples: int | None = None
) -> Steps | Recorded:
    """The step, made fast: compiled if the options say so, and recorded on a GPU. Other arguments are make_step's."""
    model.train()
    state = [adam.weights, list(model.buffers()), adam.first, adam.second]
    steps = Steps(make_step(model, adam, options, num_samples), state)
    with matmul_precision(options.precision, images.device):
        if options.compile:
            inputs, targets = binarize(images[: options.batch_size], options.binarize)
            rates = torch.tensor([*adam.corrected(1e-3, 0), 1.0], device=images.device)
            steps.compile(inputs, targets, labels[: options.batch_size], rates)
    is_alone = rank_and_ranks()[1] == 1
    return Recorded(steps) if images.is_cuda and is_alone else steps


def train_epoch(
    steps: Steps | Recorded,
    model: VAE,
    average: VAE,
    adam: Adam,
    images: Tensor,
    labels: Tensor,
    epoch: int,
    options: Namespace,
) -> Tensor:
    """One pass over the images (N, ...) uint8 and labels (N,) in a new order.

    Returns the negative ELBO of each step, one per batch, in nats: (steps,).
    """
    rank, ranks = rank_and_ranks()
    device = images.device
    utils.seed_epoch(options.seed, epoch)
    batches = list(torch.randperm(len(images), device=device).split(options.batch_size))  # the same on every rank
    if len(batches) > 1 and len(batches[-1]) < min(2 * ranks, options.batch_size):
        batches[-2:] = [torch.cat(batches[-2:])]  # too few for two on every rank, which normalizations need
    if rank > 0:
        utils.seed_epoch(options.seed, epoch, rank)  # different noise on each rank
    neg_elbos = torch.empty(len(batches), device=device)  # read when the epoch ends, so the CPU never waits for a GPU
    averages = math.ceil(len(batches) / STEPS_AT_ONCE)  # in an epoch
    model.train()
    bar = tqdm(
        total=len(batches), desc=f"epoch {epoch}", unit=" steps", leave=False, disable=None if rank == 0 else True
    )
    with bar, matmul_precision(options.precision, device):
        for i in range(averages):
            now = slice(i * STEPS_AT_ONCE, (i + 1) * STEPS_AT_ONCE)
            shares = [batch[rank::ranks] for batch in batches[now]]
            chosen = torch.cat(shares)
            inputs, targets = binarize(images.index_select(0, chosen), options.binarize)
            y = labels.index_select(0, chosen)
            rates = []
            for step in range(len(batches))[now]:
                done = epoch - 1 + step / len(batches)  # in epochs
                rates.append((*adam.corrected(learning_rate(done, options), step), kl_weight(done, options)))
            rates = torch.tensor(rates, device=device)
            neg_elbos[now] = steps(inputs, targets, y, rates, sizes=list(map(len, shares)))
            if options.average:
                update_average(average, model, count=(epoch - 1) * averages + i)
            bar.update(len(shares))
    adam.steps += len(batches)
    return utils.sum_over_ranks(neg_elbos).cpu()


def fit(
    average: VAE,
    checkpoint: dict[str, Any],
    options: Namespace,
    dataset: ImageData,
    run: Path,
    on_epoch: OnEpoch | None = None,
) -> None:
    """Trains from a checkpoint's state until options.epochs, and saves everything after each epoch.

    average is the model that is tested, drawn and kept: the running average of the weights of a copy that Adam changes.
    With --no-average they are one and the same.
    """
    rank, _ = rank_and_ranks()
    history, device, checksum = checkpoint["history"], utils.choose_device(options.device), dataset.checksum()
    if rank == 0:
        print(start_line(dataset, average, options, run, len(history)))
    images, labels = training_images(dataset, options, device)
    test_set = measure.make_test_set(dataset, options.binarize, device)
    average = average.to(device).eval()
    model = copy.deepcopy(average) if options.average else average
    adam = restore(model, checkpoint, options)
    is_likelihood, steps = measure.is_likelihood(average, test_set), None
    with utils.hold_signals() as check_signals:
        for epoch in range(len(history) + 1, options.epochs + 1):
            if steps is None or epoch == options.elbo_epochs + 1:
                is_iwae = options.objective == "iwae" and epoch > options.elbo_epochs
                num_samples = options.importance_samples if is_iwae else None
                steps = make_steps(model, adam, images, labels, options, num_samples)
            started = time.perf_counter()
            neg_elbos = train_epoch(steps, model, average, adam, images, labels, epoch, options)
            check_signals()
            seconds = time.perf_counter() - started
            with matmul_precision(options.precision, device):
                test_losses = compute_test_losses(average.eval(), test_set)
            losses = neg_elbos.double().sum().item() / len(images), *test_losses
            check_finite(neg_elbos, losses, epoch, run)
            history.append(dict(zip(COLUMNS, (epoch, *losses, len(images) / seconds, seconds), strict=True)))
            if rank > 0:
                continue
            # A resumed run then makes the same choice
            options.compile = steps.is_compiled
            save(run, average, model, adam, options, checksum, history)
            print(epoch_line(history[-1], options, dataset, is_likelihood), flush=True)
            if epoch == options.epochs or epoch & (epoch - 1) == 0:  # drawing takes a while: at 1, 2, 4, 8, ...
                draw(run, average, dataset, test_set, options, history)
            if on_epoch:
                on_epoch(average, history)


def training_images(dataset: ImageData, options: Namespace, device: torch.device) -> tuple[Tensor, Tensor]:
    """The images that an epoch passes over, (N, C, H, W) uint8, and their labels (N,)."""
    images, labels = dataset.train_images.to(device), dataset.train_labels.to(device)
    return (torch.cat([images, images.flip(-1)]), labels.repeat(2)) if options.mirror else (images, labels)


def restore(model: VAE, checkpoint: dict[str, Any], options: Namespace) -> Adam:
    """Loads the checkpoint's training weights into the model and returns Adam in the checkpoint's state."""
    model.load_state_dict(checkpoint["training_weights"])
    utils.broadcast(model.state_dict().values())
    adam = Adam(model.parameters(), options.lr, options.adam_eps)
    if "optimizer_state_dict" in checkpoint:
        adam.load_state_dict(checkpoint["optimizer_state_dict"])
    return adam


def compute_test_losses(model: VAE, test_set: measure.Examples) -> tuple[float, float, float]:
    """The negative ELBO on the test set and its two terms, in nats per image."""
    rank, ranks = rank_and_ranks()
    if ranks > 1:
        for buffer in model.buffers():  # batch-norm statistics, say, differ between ranks
            torch.distributed.broadcast(buffer, 0)
    terms = measure.elbo_terms(model, measure.Examples(*(part[rank::ranks] for part in test_set)))
    sums = utils.sum_over_ranks(torch.stack([term.sum() for term in terms]))
    reconstruction, kl = (sums / len(test_set.labels)).tolist()
    return reconstruction + kl, reconstruction, kl


def learning_rate(done: float, options: Namespace) -> float:
    """Adam's step size after `done` epochs."""
    if options.lr_schedule == "cosine":
        return options.lr * 0.5 * (1 + math.cos(math.pi * done / options.epochs))
    if options.lr_schedule == "burda2016":  # a factor of 10^(-1/7) after 1, 1 + 3, 1 + 3 + 9, ... epochs
        i = next(i for i in range(99) if done < (3 ** (i + 1) - 1) / 2)
        return options.lr * 10 ** (-i / 7)
    return options.lr


def kl_weight(done: float, options: Namespace) -> float:
    """The KL's weight after `done` epochs: beta, reached linearly over the first kl_warmup epochs."""
    return options.beta * min(1.0, done / options.kl_warmup) if options.kl_warmup else options.beta


@torch.no_grad()
def update_average(average: VAE, model: VAE, count: int, eta: float = 9) -> None:
    """Polynomial-decay averaging of the weights (Shamir & Zhang 2013, arXiv 1212.1824), after `count` updates.

    It does what a falling learning rate does without knowing when training ends, because the average leans on the last
    tenth or so of all steps, however many there were. Buffers of floats, such as the statistics of a normalization, are
    averaged like the weights; other buffers are copied.
    """
    share = (eta + 1) / (count + 1 + eta)
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), share)
    for mean, buffer in zip(average.buffers(), model.buffers(), strict=True):
        if buffer.is_floating_point():
            mean.copy_(torch.where(buffer.isinf(), buffer, mean.lerp(buffer, share)))  # a lerp of inf would be nan
        else:
            mean.copy_(buffer)


# ---------------------------------------------------------------------------------------------------------------------
# A run


def train(
    dataset: str | Path | ImageData = "auto",
    model: Model | None = None,
    on_epoch: OnEpoch | None = None,
    **options: Any,
) -> tuple[VAE, History, Path]:
    """Trains a model. `options` are those of the command line, with the same defaults.

    dataset may also be ImageData of your own. model may be a VAE or an instance of a subclass, a subclass that takes
    VAE's arguments, or a function of the data and the options that makes a model. After each epoch, on_epoch is called
    with the model and the history so far. Returns the model in eval mode, the rows of metrics.csv (losses in nats per
    image) and the run folder. Raises UserError for a bad value, and OSError if the run folder cannot be written. Seeds
    PyTorch's generators and flushes denormals.
    """
    if isinstance(model, VAE) and (fixed := sorted(options.keys() & {*SIZES, "init"})):
        raise UserError(f"{', '.join(map(flag, fixed))}: only for a new model; the one given has its own")
    options = make_options(dataset=dataset.name if isinstance(dataset, ImageData) else dataset, **options)
    dataset, model = set_up(dataset, VAE if model is None else model, options, on_epoch)
    complete(options, dataset, model)
    check_model(model, dataset, options)
    checkpoint = {"history": [], "training_weights": model.state_dict()}
    run = utils.on_rank_0(lambda: utils.new_run_folder(options.out_dir, dataset.name, model.config["latent_size"]))
    try:
        fit(model, checkpoint, options, dataset, run, on_epoch)
    except BaseException as error:
        if (run / "checkpoint.pt").exists():
            error.run = run  # so that main can say how to continue
        elif rank_and_ranks()[0] == 0:
            with contextlib.suppress(OSError):
                run.rmdir()  # no epoch was finished, so nothing is there
        raise
    return model, checkpoint["history"], run


def resume(
    run: str | Path,
    model: Model | None = None,
    dataset: str | Path | ImageData | None = None,
    on_epoch: OnEpoch | None = None,
    **changes: Any,
) -> tuple[VAE, History, Path]:
    """Continues a run in its folder, from its last finished epoch up to `epochs` (default: the run's own).

    Pass custom models and ImageData again when resuming. dataset may also be the path to which the images have moved.
    `changes` are the options in RESUMABLE. On one CPU the weights end bit-identical to those of a run that was never
    interrupted. They also equal those of a run started with the larger `epochs`, if the learning rate is constant and
    both were compiled or neither was. Returns and raises as train does.
    """
    path, checkpoint, options = read_run(run, changes)
    epoch, history = checkpoint["epoch"], checkpoint["history"]
    if dataset is None:
        evaluate.check_place(options.dataset, path)
    dataset, model = set_up(options.dataset if dataset is None else dataset, model, options, on_epoch)
    model = utils.load_weights(checkpoint, path, model)
    check_model(model, dataset, options)
    evaluate.check_same_images(checkpoint, dataset, path)
    check_training_state(checkpoint, path, model)
    if epoch == options.epochs and rank_and_ranks()[0] == 0:
        print(f"{path}: already trained for {epoch} epochs; outputs rewritten. Pass a larger --epochs to continue.")
        write_table(path.parent, history)
        draw(path.parent, model, dataset, measure.make_test_set(dataset, options.binarize), options, history)
    elif epoch < options.epochs:
        for unfinished in path.parent.glob(".*.part"):  # left by a killed process
            unfinished.unlink(missing_ok=True)
        fit(model, checkpoint, options, dataset, path.parent, on_epoch)
    return model, history, path.parent


def read_run(run: str | Path, changes: dict[str, Any]) -> tuple[Path, dict[str, Any], Namespace]:
    """Reads a run to resume -> its checkpoint's path, the checkpoint, and its options with the changes."""
    path = utils.on_rank_0(lambda: utils.checkpoint_path(run))
    if path.name != "checkpoint.pt":
        raise UserError(f"--resume continues a run folder and replaces its checkpoint.pt: {path} is not one")
    if fixed := sorted(changes.keys() - {*RESUMABLE}):
        names = ", ".join(map(flag, fixed))
        raise UserError(f"a resumed run keeps its own {names}: --resume takes {', '.join(map(flag, RESUMABLE))}")
    checkpoint = utils.on_rank_0(lambda: utils.read_checkpoint(path))
    if missing := {"options", "epoch", "history", "training_weights", "optimizer_state_dict"} - checkpoint.keys():
        raise UserError(f"{path} cannot be resumed, only evaluated: it has no {', '.join(sorted(missing))}")
    changes = {name: value for name, value in changes.items() if value is not None}
    saved = {name: value for name, value in checkpoint["options"].items() if name not in PLACES}
    saved.setdefault("likelihood", "bernoulli")  # older runs had no other
    options = make_options(**saved | changes)
    if (options.epochs or 0) < checkpoint["epoch"]:
        epochs = checkpoint["epoch"]
        raise UserError(f"{path} is already trained for {epochs} epochs: pass a larger --epochs to continue")
    return path, checkpoint, options


def set_up(
    dataset: str | Path | ImageData, model: Model | None, options: Namespace, on_epoch: OnEpoch | None = None
) -> tuple[ImageData, VAE | None]:
    """Sets up PyTorch, and turns train's arguments into a data set and a model, which the options then name.

    Raises UserError if the machine lacks what the options ask for.
    """
    utils.choose_device(options.device)
    evaluate.check_kind(dataset)
    if on_epoch:  # the wrong arguments would otherwise be noticed only after an epoch
        inspect.signature(on_epoch).bind(model, [])
    _, ranks = rank_and_ranks()
    if options.batch_size < ranks:
        raise UserError(f"--batch-size must be {ranks} or more, for as many processes, not {options.batch_size}")
    # Adam's moments of pixels that are almost never on decay to numbers below 1e-38, which a CPU multiplies many times
    # slower than others. This must happen before PyTorch starts its threads, which inherit it.
    torch.set_flush_denormal(True)
    Distribution.set_default_validate_args(False)  # validation waits for a GPU and stops compilation
    if isinstance(dataset, ImageData):
        dataset = dataset.hold_out(options.hold_out or dataset.num_held_out)
        options.dataset = dataset.name
    else:
        name = str(dataset)
        channels = 1 if options.grayscale else None
        dataset = load_dataset(name, options.data_dir, options.image_size, options.hold_out, channels)
        options.dataset = dataset.name if name in DATASETS else str(Path(name).resolve())
    options.hold_out = dataset.num_held_out
    options.likelihood = options.likelihood or usual_likelihood(dataset, options)
    if model is not None and not isinstance(model, VAE):
        utils.seed_epoch(options.seed, 0)
        if isinstance(model, type) and issubclass(model, VAE):
            model = make_vae(dataset, options, model)
        elif callable(model):
            model = model(dataset, options)
        if not isinstance(model, VAE):
            kinds = "a VAE, a subclass, or a function of the data and the options that makes one"
            raise UserError(f"model must be {kinds}, not {type(model).__name__}")
        if options.init == "burda2016":
            initialize(model, dataset.train_images.flatten(1))
    return dataset, model


def usual_likelihood(dataset: ImageData, options: Namespace) -> str:
    """Binarized images, such as digits by default, have the Bernoulli likelihood; others have the logistic."""
    is_binarized = dataset.name in BINARIZED_DATASETS or options.binarize in ("dynamic", "threshold")
    return "bernoulli" if is_binarized else "logistic"


def complete(options: Namespace, dataset: ImageData, model: VAE) -> None:
    """Fills in the options that depend on the data, the model and the machine."""
    device, (_, ranks) = utils.choose_device(options.device), rank_and_ranks()
    options.epochs = options.epochs or (150 if dataset.name == "mnist-5k" else 20)
    if options.compile is None:
        num_images = len(dataset.train_images) * (2 if options.mirror else 1)
        steps = options.epochs * math.ceil(num_images / options.batch_size)
        options.compile = is_worth_compiling(device, ranks, steps)
    options.precision = options.precision or choose_precision(device, options.batch_size, options.compile)
    vars(options).update({name: model.config[name] for name in SIZES if name in model.config})
    options.binarize = options.binarize or measure.usual_binarization(model)


def make_vae(dataset: ImageData, options: Namespace, kind: type[VAE] = VAE, **more: Any) -> VAE:
    """A VAE, or a subclass with the same arguments, of the sizes in the options. `more` are further arguments."""
    sizes = {name: getattr(options, name) for name in SIZES if getattr(options, name) is not None}
    return kind(dataset.input_size, channels=dataset.shape[0], **sizes, **more)


@torch.no_grad()
def initialize(model: VAE, images: Tensor) -> None:
    """Glorot-uniform weights, and the last bias such that the decoder returns the images' mean (Burda et al. 2016).

    images: (N, D) uint8.
    Raises UserError unless the decoder is of fully connected layers.
    """
    if not isinstance(model.decoder, Decoder):
        raise UserError(f"--init burda2016 is for fully connected layers, which {type(model).__name__} lacks")
    for layer in (layer for layer in model.modules() if isinstance(layer, nn.Linear)):
        nn.init.xavier_uniform_(layer.weight)
        layer.bias.zero_()
    *_, output_layer = model.decoder.children()
    mean = images.double().mean(0) / 255
    is_linear = model.config["likelihood"] == "logistic"
    output_layer.bias.copy_(4 * (mean - 0.5) if is_linear else torch.logit(mean, eps=1e-3))


# ---------------------------------------------------------------------------------------------------------------------
# Checks


@measure.in_eval_mode
def check_model(model: VAE, dataset: ImageData, options: Namespace) -> None:
    """Raises UserError if the model is for other images, or one of its distributions has a wrong shape."""
    evaluate.check_images(model, dataset)
    name, device, k = type(model).__name__, next(model.parameters()).device, 3
    if type(model).posterior is VAE.posterior and type(model.latent_z).forward is not LatentZ.forward:
        raise UserError(f"{name}: the KL would ignore what latent_z.forward does; override {name}.posterior instead")
    inputs, targets = (images.to(device) for images in binarize(dataset.train_images[:2], options.binarize))
    y, targets = dataset.train_labels[:2].to(device), targets.flatten(1)
    try:
        q, p = model.posterior(inputs, y), model.prior(y)
        z = q.rsample((k,))
        likelihood = model.likelihood(z, y)
        found = {
            "posterior(x).log_prob(z)": (q.log_prob(z), (k, 2)),
            "posterior(x).mean": (q.mean, (2, z.shape[-1])),
            "prior().log_prob(z)": (p.log_prob(z), (k, 2)),
            "likelihood(z).log_prob(targets)": (likelihood.log_prob(targets), (k, 2)),
            "likelihood(z).mean": (likelihood.mean, (k, *targets.shape)),
            "sample(2)": (model.sample(2, y), targets.shape),
            "likelihood(z).support": (likelihood.support.check(targets), (2,)),
        }
    except (NotImplementedError, AttributeError) as error:
        raise UserError(f"{name}: a distribution lacks something: {utils.one_line(error)}") from error
    for what, (value, shape) in found.items():
        if value.shape != shape:
            sizes = f"z of shape {tuple(z.shape)} and images of shape {tuple(targets.shape)}"
            raise UserError(f"{name}.{what} has shape {tuple(value.shape)}, not {shape}, for {sizes}")
    share = min(options.batch_size, len(dataset.train_images)) // rank_and_ranks()[1]
    try:
        copy.deepcopy(model).train().elbo_terms(inputs[:share], targets[:share], y[:share])
    except ValueError as error:  # a normalization's
        why = utils.one_line(error)
        raise UserError(f"{name} cannot train on batches of {share}: {why}. Try a larger --batch-size") from error


def check_training_state(checkpoint: dict[str, Any], path: Path, model: VAE) -> None:
    """Raises UserError if training cannot continue from a checkpoint."""
    try:
        if [row["epoch"] for row in checkpoint["history"]] != list(range(1, checkpoint["epoch"] + 1)):
            raise ValueError("its history does not match its epoch")
        utils.check_tensors(checkpoint["training_weights"], model.state_dict())
        state = checkpoint["optimizer_state_dict"]["state"]
        for i, weight in enumerate(model.parameters()):
            if i in state:
                utils.check_tensors(state[i], {"step": torch.zeros(()), "exp_avg": weight, "exp_avg_sq": weight})
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"{path} cannot be resumed, only evaluated: {utils.one_line(error)}") from error


def check_finite(neg_elbos: Tensor, losses: tuple[float, ...], epoch: int, run: Path) -> None:
    """Raises UserError if a loss of an epoch's steps (steps,), or of the test after them, is not finite."""
    if not all(map(math.isfinite, losses)):  # the first is the mean of neg_elbos
        bad = (~torch.isfinite(neg_elbos)).nonzero().flatten().tolist()
        step = f"step {bad[0] + 1}" if bad else "the test after its last step"
        cause = "the steps are probably too large: try a smaller --lr, or --clip-grad-norm"
        kept = f". {run} holds epoch {epoch - 1}" if epoch > 1 else ""
        raise UserError(f"the loss is not finite in epoch {epoch}, {step}; {cause}{kept}")


# ---------------------------------------------------------------------------------------------------------------------
# What a run leaves


def save(run: Path, average: VAE, model: VAE, adam: Adam, options: Namespace, checksum: int, history: History) -> None:
    """Writes checkpoint.pt, from which everything else in the run folder can be made again, and metrics.csv."""
    checkpoint = {
        "model_state_dict": average.state_dict(),
        "optimizer_state_dict": adam.state_dict(),
        "model": average.config,
        "class": utils.class_name(type(average)),
        "training_weights": model.state_dict(),
        "options": {name: value for name, value in vars(options).items() if name not in PLACES},
        "checksum": checksum,
        "epoch": len(history),
        "history": history,
    }
    utils.save_checkpoint(run / "checkpoint.pt", checkpoint)
    write_table(run, history)


def write_table(run: Path, history: History) -> None:
    """Writes metrics.csv."""
    rows = [COLUMNS, *([row[name] for name in COLUMNS] for row in history)]
    table = "".join(",".join(map(str, row)) + "\n" for row in rows)
    utils.write_atomically(run / "metrics.csv", table.encode())


def draw(
    run: Path, model: VAE, dataset: ImageData, test_set: measure.Examples, options: Namespace, history: History
) -> None:
    """Writes the pictures that show how far the run has come."""
    caption = pictures.describe(dataset, options.binarize, model, len(history))
    figures = {
        "curves.png": pictures.draw_curves(history, caption),
        "reconstructions.png": pictures.draw_reconstructions(model, dataset, test_set, caption),
        "prior_samples.png": pictures.draw_prior_samples(model, dataset, caption),
    }
    for name, figure in figures.items():
        pictures.save_figure(figure, run / name)


def start_line(dataset: ImageData, model: VAE, options: Namespace, run: Path, epoch: int) -> str:
    """What a run says first."""
    held_out = f", {dataset.num_held_out:,} others held out to test on" if dataset.num_held_out else ""
    sizes = " x ".join(map(str, dataset.shape))
    images = f"{len(dataset.train_images):,} training images of {sizes}{held_out}"
    device, (_, ranks) = utils.choose_device(options.device), rank_and_ranks()
    where = f"{device}, {ranks} processes" if ranks > 1 else device
    weights = sum(weight.numel() for weight in model.parameters())
    after = f"; continues after epoch {epoch}" if epoch else ""
    return f"{dataset.name}: {images}; {weights:,} weights on {where}; writing to {run}{after}"


def epoch_line(row: dict[str, float], options: Namespace, dataset: ImageData, is_likelihood: bool) -> str:
    """What a run says after an epoch."""
    label = "" if is_likelihood else "  (gray targets: no likelihood)"
    if is_likelihood and options.binarize == "none":
        label = f"  ({measure.bits_per_dim(row['test_loss'], dataset.input_size):.3f} bits per dimension)"
    width = 8 if options.binarize == "none" else 6  # sums over pixels of 256 levels are larger
    return (
        f"epoch {row['epoch']:{len(str(options.epochs))}d}/{options.epochs}  train {row['train_loss']:{width + 1}.2f}  "
        f"test {row['test_loss']:{width + 1}.2f} = reconstruction {row['test_reconstruction']:{width}.2f} + "
        f"KL {row['test_kl']:{width - 1}.2f}  {row['images_per_second']:9,.0f} images/s{label}"
    )


# ---------------------------------------------------------------------------------------------------------------------
# The command


@utils.command
def main(
    model: Model | None = None,
    description: str | None = __doc__,
    report: Callable[[Any, ImageData], None] | None = None,
    **defaults: Any,
) -> None:
    """The command `python train.py`. Experiments pass a model; then the run is also evaluated.

    After that, report(model, dataset) is called, if given, to print more than the metrics.
    """
    parser = make_parser(description, **defaults)
    if model is not None:
        evaluate.add_nll_samples(parser)
    given = parse_given(parser)
    nll_samples, resumed = given.pop("nll_samples", measure.NLL_SAMPLES), given.pop("resume", None)
    script, place = sys.argv[0], ["--data-dir", given["data_dir"]] if "data_dir" in given else []
    try:
        with utils.process_group():
            if resumed is None:
                trained, _, run = train(model=model, **(defaults | given))
            else:
                trained, _, run = resume(resumed, model, **given)
            rank, _ = rank_and_ranks()
    except KeyboardInterrupt as error:
        if resumed or hasattr(error, "run"):
            again = sys.argv if resumed else [script, "--resume", error.run, *place]
            error.args = (f"{utils.one_line(error)}; to continue: {utils.shell_line('python', *again)}",)
        raise
    if rank == 0 and model is not None:
        places = {"data_dir": given.get("data_dir", "data"), "device": next(trained.parameters()).device.type}
        evaluate.evaluate_run(run, trained, nll_samples=nll_samples, **places)
        if report:
            report(trained, evaluate.open_test_data(trained, utils.read_checkpoint(run), run, places["data_dir"]))
    elif rank == 0:
        print(f"done: now try {utils.shell_line('python', Path(script).with_name('evaluate.py'), run, *place)}")


if __name__ == "__main__":
    main()
