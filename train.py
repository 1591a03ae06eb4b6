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
import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import evaluate
import measure
import pictures
import runs
import utils
from data import DATASETS, ImageData, inputs_and_targets, load_dataset
from model import VAE
from options import PLACES, RESUMABLE, SIZES, Options, make_options, make_parser, parse_given
from step import Recorded, Step, Steps, matmul_precision, no_validation
from utils import UserError, flag, rank_and_ranks

COLUMNS = ("epoch", "train_loss", "test_loss", "test_reconstruction", "test_kl", "images_per_second", "seconds")
STEPS_AT_ONCE = 8  # binarized together, recorded together on a GPU, and followed by an update of the averaged weights
History = list[dict[str, float]]  # the rows of metrics.csv; losses in nats per image
OnEpoch = Callable[[VAE, History], None]
Schedule = Callable[[float, Options], float]  # the epochs that are done, the options -> a rate


# ---------------------------------------------------------------------------------------------------------------------
# The step


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


def make_step(model: VAE, adam: Adam, options: Options, num_samples: int | None = None) -> Step:
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
        gradients = utils.sum_gradients(gradients)
        if options.clip_grad_norm:
            # foreach's norm has no C++ entry, and a compiled step would warn
            scale = (options.clip_grad_norm / nn.utils.get_total_norm(gradients, foreach=False)).clamp(max=1)
            gradients = [scale * gradient for gradient in gradients]
        adam.update(gradients, step_size, eps)
        return neg_elbo.detach().sum()

    return step


def make_steps(
    model: VAE, adam: Adam, images: Tensor, labels: Tensor, options: Options, num_samples: int | None = None
) -> Steps | Recorded:
    """The step, made fast: compiled if the options say so, and recorded on a GPU. Other arguments are make_step's."""
    model.train()
    state = [adam.weights, list(model.buffers()), adam.first, adam.second]
    steps = Steps(make_step(model, adam, options, num_samples), state)
    if options.compile:
        with matmul_precision(options.precision, images.device):
            first = torch.arange(min(options.batch_size, len(images)), device=images.device)
            inputs, targets = inputs_and_targets(images.index_select(0, first), options.binarize)
            rates = torch.tensor([*adam.corrected(1e-3, 0), 1.0], device=images.device)
            steps.compile(inputs, targets, labels.index_select(0, first), rates)
    is_alone = rank_and_ranks()[1] == 1
    return Recorded(steps) if images.is_cuda and is_alone else steps


# ---------------------------------------------------------------------------------------------------------------------
# The epoch


def learning_rate(done: float, options: Options) -> float:
    """Adam's step size after `done` epochs."""
    if options.lr_schedule == "cosine":
        return options.lr * 0.5 * (1 + math.cos(math.pi * done / options.epochs))
    return options.lr


def kl_weight(done: float, options: Options) -> float:
    """The KL's weight after `done` epochs: beta, reached linearly over the first kl_warmup epochs."""
    return options.beta * min(1.0, done / options.kl_warmup) if options.kl_warmup else options.beta


def train_epoch(
    steps: Steps | Recorded,
    model: VAE,
    average: VAE,
    adam: Adam,
    images: Tensor,
    labels: Tensor,
    epoch: int,
    options: Options,
    learning_rate: Schedule = learning_rate,
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
    starts = range(0, len(batches), STEPS_AT_ONCE)
    model.train()
    bar = tqdm(starts, f"epoch {epoch}", unit_scale=STEPS_AT_ONCE, unit=" steps", leave=False, disable=rank > 0 or None)
    with matmul_precision(options.precision, device):
        for count, start in enumerate(bar, (epoch - 1) * len(starts)):
            now = range(len(batches))[start : start + STEPS_AT_ONCE]
            shares = [batches[i][rank::ranks] for i in now]
            chosen = torch.cat(shares)
            inputs, targets = inputs_and_targets(images.index_select(0, chosen), options.binarize)
            y = labels.index_select(0, chosen)
            rates = []
            for i in now:
                done = epoch - 1 + i / len(batches)  # epochs
                rates.append((*adam.corrected(learning_rate(done, options), i), kl_weight(done, options)))
            rates = torch.tensor(rates, device=device)
            neg_elbos[now.start : now.stop] = steps(inputs, targets, y, rates, sizes=[len(share) for share in shares])
            if options.average:
                update_average(average, model, count)
    adam.steps += len(batches)
    return utils.sum_over_ranks(neg_elbos).cpu()


@torch.no_grad()
def update_average(average: VAE, model: VAE, count: int, eta: float = 9) -> None:
    """Polynomial-decay averaging of the weights (Shamir & Zhang 2013, arXiv 1212.1824), after `count` updates.

    It does what a falling learning rate does without knowing when training ends, because the average leans on the last
    tenth or so of all steps, however many there were. Buffers are copied, because a mean of unit vectors, say, is none.
    """
    share = (eta + 1) / (count + 1 + eta)
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), share)
    for kept, buffer in zip(average.buffers(), model.buffers(), strict=True):
        kept.copy_(buffer)


@torch.no_grad()
def settle_buffers(
    average: VAE, model: VAE, images: Tensor, labels: Tensor, options: Options, batches: int = 20
) -> None:
    """Recomputes buffers of floats, such as batch statistics, with the averaged weights.

    Other buffers, such as a count of steps, stay the model's.
    """
    if not any(buffer.is_floating_point() for buffer in average.buffers()):
        return
    average.train()
    for _ in range(batches):
        chosen = torch.randint(len(images), (options.batch_size,), device=images.device)
        inputs, targets = inputs_and_targets(images[chosen], options.binarize)
        average.elbo_terms(inputs, targets, labels[chosen])
    for kept, buffer in zip(average.buffers(), model.buffers(), strict=True):
        if not buffer.is_floating_point():
            kept.copy_(buffer)


def compute_test_losses(model: VAE, test_set: measure.TestSet) -> tuple[float, float, float]:
    """The negative ELBO on the test set and its two terms, in nats per image."""
    rank, ranks = rank_and_ranks()
    utils.broadcast(model.buffers())  # batch-norm statistics, say, differ between ranks
    found = measure.encode(model, test_set.take(slice(rank, None, ranks)))
    sums = utils.sum_over_ranks(torch.stack([found.reconstruction.sum(), found.kl.sum()]))
    reconstruction, kl = (sums / len(test_set.labels)).tolist()
    return reconstruction + kl, reconstruction, kl


def test_epoch(
    run: "Run", model: VAE, test_set: measure.TestSet, epoch: int, neg_elbos: Tensor, num_images: int, seconds: float
) -> dict[str, float]:
    """A row of metrics.csv: the negative ELBO of the epoch's steps (steps,) and of the test set, in nats per image.

    Raises UserError if one of them is not finite.
    """
    with matmul_precision(run.options.precision, test_set.inputs.device):
        test_losses = compute_test_losses(model.eval(), test_set)
    losses = neg_elbos.double().sum().item() / num_images, *test_losses
    if not all(map(math.isfinite, losses)):
        bad = (~torch.isfinite(neg_elbos)).nonzero().flatten().tolist()
        step = f"step {bad[0] + 1}" if bad else "the test after its last step"
        cause = "the steps are probably too large: try a smaller --lr, or --clip-grad-norm"
        kept = f". {run.folder} holds epoch {epoch - 1}" if epoch > 1 else ""
        raise UserError(f"the loss is not finite in epoch {epoch}, {step}; {cause}{kept}")
    return dict(zip(COLUMNS, (epoch, *losses, num_images / seconds, seconds), strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# The run


@no_validation()
def train(
    dataset: str | Path | ImageData | None = None,
    model: VAE | type[VAE] | None = None,
    on_epoch: OnEpoch | None = None,
    resume: str | Path | None = None,
    learning_rate: Schedule = learning_rate,
    **options: Any,
) -> tuple[VAE, History, Path]:
    """Trains a model, or continues a run. `options` are those of the command line, with the same defaults.

    dataset is a name, a path, or ImageData of your own. model is a VAE, an instance of a subclass, or a subclass, whose
    for_data makes the model. After each epoch, on_epoch is called with the model and the history so far. Returns the
    model in eval mode, the rows of metrics.csv (losses in nats per image) and the run folder. Raises UserError for a
    bad value, and OSError if the run folder cannot be written. Two changes outlast the call: PyTorch's generators are
    seeded, and denormals count as 0.

    If resume is the folder of a run, that run continues, as the function resume describes.
    """
    # Adam's moments of pixels that are almost never on decay to numbers below 1e-38, which a CPU multiplies many times
    # slower than others. This must happen before PyTorch starts its threads, which inherit it.
    torch.set_flush_denormal(True)
    run = reopen_run(resume, dataset, model, options) if resume else start_run(dataset, model, options)
    options = run.options
    history = run.checkpoint["history"]
    rank, _ = rank_and_ranks()
    device = utils.choose_device(options.device)
    images, labels = training_images(run.dataset, options.mirror, device)
    test_set = measure.make_test_set(run.dataset, options.binarize, device)
    average, model, adam = restore(run, device)
    checksums = run.dataset.checksums()
    is_likelihood = measure.is_likelihood(average, test_set)
    if rank == 0:
        print(start_line(run, average, device))
    first = len(history) + 1
    drawn = -math.inf
    try:
        for epoch in range(first, options.epochs + 1):
            if epoch in (first, options.elbo_epochs + 1):
                is_iwae = options.objective == "iwae" and epoch > options.elbo_epochs
                num_samples = options.importance_samples if is_iwae else None
                steps = make_steps(model, adam, images, labels, options, num_samples)
            started = time.perf_counter()
            neg_elbos = train_epoch(steps, model, average, adam, images, labels, epoch, options, learning_rate)
            seconds = time.perf_counter() - started
            if options.average:
                settle_buffers(average, model, images, labels, options)
            history.append(test_epoch(run, average, test_set, epoch, neg_elbos, len(images), seconds))
            if rank > 0:
                continue
            save(run, average, model, adam, steps.is_compiled, is_likelihood, checksums)
            print(epoch_line(history[-1], options, run.dataset, is_likelihood), flush=True)
            is_power_of_two = epoch.bit_count() == 1
            is_due = is_power_of_two and started > drawn + 10  # drawing takes a second, so seldom
            if is_due and epoch < options.epochs:
                draw(run, test_set)
                drawn = time.perf_counter()
            if on_epoch:
                on_epoch(average, history)
    except BaseException as error:
        leave(run.folder, error)
        raise
    if rank == 0:
        if first > options.epochs:
            print(f"{run.folder}: already trained for {options.epochs} epochs. Pass a larger --epochs to continue.")
            save(run, average, model, adam, options.compile, is_likelihood, checksums)  # its images may have moved
        draw(run, test_set)
    return average, history, run.folder


def resume(
    run: str | Path,
    model: VAE | type[VAE] | None = None,
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
    return train(dataset, model, on_epoch, resume=run, **changes)


@dataclass(frozen=True)
class Run:
    """What is trained, on what, and where its results are kept."""

    options: Options
    dataset: ImageData
    model: VAE
    folder: Path
    checkpoint: dict[str, Any]  # its history, the weights to go on from, and Adam's state if an epoch is finished


def start_run(dataset: str | Path | ImageData | None, model: VAE | type[VAE] | None, given: dict[str, Any]) -> Run:
    """A new run, in a folder of its own. Arguments and errors are train's."""
    if isinstance(model, VAE) and (fixed := sorted(given.keys() & {*SIZES})):
        raise UserError(f"{', '.join(map(flag, fixed))}: only for a new model; the one given has its own")
    if dataset is not None:
        given = given | {"dataset": dataset.name if isinstance(dataset, ImageData) else str(dataset)}
    options = make_options(**given)
    utils.choose_device(options.device)  # before the data set is loaded, which may take a while
    data, options = load(dataset, options)
    options = options.resolve(data)
    model = make_model(VAE if model is None else model, data, options)
    options = check_and_resolve(options, data, model)
    latent_size = model.config["latent_size"]
    folder = utils.on_rank_0(lambda: runs.new_run_folder(options.out_dir, data.name, latent_size))
    return Run(options, data, model, folder, {"history": [], "training_weights": model.state_dict()})


def reopen_run(
    path: str | Path, dataset: str | Path | ImageData | None, model: VAE | type[VAE] | None, changes: dict[str, Any]
) -> Run:
    """The run in a folder, after its last finished epoch. Arguments and errors are train's."""
    path = utils.on_rank_0(lambda: runs.checkpoint_path(path))
    if path.name != "checkpoint.pt":
        raise UserError(f"--resume continues a run folder and replaces its checkpoint.pt: {path} is not one")
    if fixed := sorted(changes.keys() - {*RESUMABLE}):
        names = ", ".join(map(flag, fixed))
        raise UserError(f"a resumed run keeps its own {names}: --resume takes {', '.join(map(flag, RESUMABLE))}")
    checkpoint = utils.on_rank_0(lambda: runs.read_checkpoint(path))
    if missing := {"options", "epoch", "history", "training_weights", "optimizer_state_dict"} - checkpoint.keys():
        raise UserError(f"{path} cannot be resumed, only evaluated: it has no {', '.join(sorted(missing))}")
    saved = {name: value for name, value in checkpoint["options"].items() if name not in PLACES}
    options = make_options(**saved | changes)
    if options.epochs < checkpoint["epoch"]:
        epochs = checkpoint["epoch"]
        raise UserError(f"{path} is already trained for {epochs} epochs: pass a larger --epochs to continue")
    if dataset is None:
        runs.check_place(options.dataset, path)
    data, options = load(dataset, options)
    runs.check_same_images(checkpoint, data, path)
    model = runs.load_weights(checkpoint, path, model)
    options = check_and_resolve(options.resolve(data), data, model)
    for unfinished in path.parent.glob(".*.part"):  # left by a killed process
        unfinished.unlink(missing_ok=True)
    return Run(options, data, model, path.parent, checkpoint)


def load(dataset: str | Path | ImageData | None, options: Options) -> tuple[ImageData, Options]:
    """The data set given, or the options' own, with its held-out images, and the options with its name or full path."""
    if isinstance(dataset, ImageData):
        if options.grayscale or options.image_size:
            raise UserError("--grayscale and --image-size are for a data set that is read, not for ImageData")
        return dataset.hold_out(options.hold_out or dataset.num_held_out), options
    name = options.dataset if dataset is None else dataset
    channels = 1 if options.grayscale else None
    data = load_dataset(name, options.data_dir, options.image_size, options.hold_out, channels)
    place = data.name if name in DATASETS else str(Path(name).resolve())
    return data, dataclasses.replace(options, dataset=place)


def check_and_resolve(options: Options, dataset: ImageData, model: VAE) -> Options:
    """The options with what they left open for a model. Raises UserError if the model cannot be trained."""
    options = options.resolve_for(model, dataset)
    measure.check_model(model, dataset, options.binarize)
    runs.plain(model.config, f"the config of {type(model).__name__}")
    precision = measure.possible_precision(model, measure.example(dataset, options.binarize), options.precision)
    return dataclasses.replace(options, precision=precision)


def restore(run: Run, device: torch.device) -> tuple[VAE, VAE, Adam]:
    """Returns the model that is tested, drawn and kept, the one that is trained, and Adam, as the run has left them.

    The first holds the running average of the second's weights. With --no-average they are one and the same.
    """
    average = run.model.to(device).eval()
    model = copy.deepcopy(average) if run.options.average else average
    model.load_state_dict(run.checkpoint["training_weights"])
    utils.broadcast(model.state_dict().values())
    adam = Adam(model.parameters(), run.options.lr, run.options.adam_eps)
    if run.checkpoint["history"]:
        adam.load_state_dict(run.checkpoint["optimizer_state_dict"])
    return average, model, adam


def make_model(model: VAE | type[VAE], dataset: ImageData, options: Options) -> VAE:
    """The model given, or a new one of the class given, whose initial weights follow from the seed."""
    runs.check_is_vae(model)
    if isinstance(model, VAE):
        return model
    utils.seed_epoch(options.seed, 0)
    return model.for_data(dataset, options)


def training_images(dataset: ImageData, mirror: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """The images that an epoch passes over, (N, C, H, W) uint8, and their labels (N,)."""
    images = dataset.train_images.to(device)
    labels = dataset.train_labels.to(device)
    return (torch.cat([images, images.flip(-1)]), labels.repeat(2)) if mirror else (images, labels)


# ---------------------------------------------------------------------------------------------------------------------
# What a run says and leaves


def start_line(run: Run, model: VAE, device: torch.device) -> str:
    """What a run says first."""
    dataset = run.dataset
    sizes = " x ".join(map(str, dataset.shape))
    images = f"{len(dataset.train_images):,} training images of {sizes}"
    if dataset.num_held_out:
        images += f", {dataset.num_held_out:,} others held out to test on"
    weights = f"{sum(weight.numel() for weight in model.parameters()):,} weights on {device}"
    if (ranks := rank_and_ranks()[1]) > 1:
        weights += f", {ranks} processes"
    epochs = len(run.checkpoint["history"])
    place = f"continuing {run.folder} after epoch {epochs}"
    if epochs == 0:
        place = f"writing to {run.folder}, which --resume continues"
    return f"{dataset.name}: {images}; {weights}; {place}"


def epoch_line(row: dict[str, float], options: Options, dataset: ImageData, is_likelihood: bool) -> str:
    """What a run says after an epoch."""
    label = "" if is_likelihood else "  (no likelihood)"
    if is_likelihood and options.binarize == "none":
        label = f"  ({measure.bits_per_dim(row['test_loss'], dataset.input_size):.3f} bits per dimension)"
    width = 8 if options.binarize == "none" else 6  # sums over pixels of 256 levels are larger
    return (
        f"epoch {row['epoch']:{len(str(options.epochs))}d}/{options.epochs}  train {row['train_loss']:{width + 1}.2f}  "
        f"test {row['test_loss']:{width + 1}.2f} = reconstruction {row['test_reconstruction']:{width}.2f} + "
        f"KL {row['test_kl']:{width - 1}.2f}  {row['images_per_second']:9,.0f} images/s{label}"
    )


def save(
    run: Run,
    average: VAE,
    model: VAE,
    adam: Adam,
    is_compiled: bool,
    is_likelihood: bool,
    checksums: dict[str, int],
) -> None:
    """Writes checkpoint.pt, from which everything else in the run folder can be made again, and metrics.csv."""
    options = dataclasses.asdict(run.options) | {"compile": is_compiled}  # so that a resumed run makes the same choice
    history = run.checkpoint["history"]
    checkpoint = {
        "model_state_dict": average.state_dict(),
        "optimizer_state_dict": adam.state_dict(),
        "model": average.config,
        "shape": run.dataset.shape,
        "classes": list(run.dataset.classes),
        "class": runs.class_name(type(average)),
        "training_weights": model.state_dict(),
        "options": {name: value for name, value in options.items() if name not in PLACES},
        "epoch": len(history),
        "history": history,
        "is_likelihood": is_likelihood,
        **checksums,
    }
    runs.save_checkpoint(run.folder / "checkpoint.pt", checkpoint)
    rows = [COLUMNS, *([row[name] for name in COLUMNS] for row in history)]
    table = "".join(",".join(map(str, row)) + "\n" for row in rows)
    runs.write_atomically(run.folder / "metrics.csv", table.encode())


def draw(run: Run, test_set: measure.TestSet) -> None:
    """Writes the pictures that show how far the run has come."""
    model = run.model
    history = run.checkpoint["history"]
    dataset = run.dataset
    caption = pictures.describe(model, dataset.name, run.options.binarize, len(history), dataset.num_held_out)
    figures = {
        "curves.png": pictures.draw_curves(history, caption),
        "reconstructions.png": pictures.draw_reconstructions(model, test_set, caption),
        "prior_samples.png": pictures.draw_prior_samples(model, test_set, caption),
    }
    for name, figure in figures.items():
        pictures.save_figure(figure, run.folder / name)


def leave(folder: Path, error: BaseException) -> None:
    """Says how to continue a run that was interrupted. Removes a run folder without a finished epoch."""
    if rank_and_ranks()[0] > 0:
        return
    if (folder / "checkpoint.pt").exists():
        if isinstance(error, KeyboardInterrupt):
            print(f"--resume {folder} continues this run", file=sys.stderr)
    else:
        with contextlib.suppress(OSError):
            folder.rmdir()  # nothing is in it


# ---------------------------------------------------------------------------------------------------------------------
# The command


@utils.command
def main(
    model: type[VAE] | None = None,
    description: str | None = __doc__,
    report: Callable[[Any, ImageData], None] | None = None,
    learning_rate: Schedule = learning_rate,
    **defaults: Any,
) -> None:
    """The command `python train.py`. Experiments pass a class; then the run is also evaluated.

    After that, report(model, dataset) is called, if given, to print more than the metrics.
    """
    parser = make_parser(description, **defaults)
    if model is not None:
        evaluate.add_nll_samples(parser)
    given = parse_given(parser)
    nll_samples = given.pop("nll_samples", measure.NLL_SAMPLES)
    if "resume" not in given:
        given = defaults | given
    with utils.process_group():
        trained, _, folder = train(model=model, learning_rate=learning_rate, **given)
        rank, _ = rank_and_ranks()
    data_dir = given.get("data_dir", "data")
    if rank == 0 and model is not None:
        device = next(trained.parameters()).device.type
        evaluate.evaluate_run(folder, trained, nll_samples=nll_samples, data_dir=data_dir, device=device)
        if report:
            report(trained, evaluate.open_run(folder, trained, device=device).test_data(data_dir=data_dir))
    elif rank == 0:
        place = ["--data-dir", data_dir] if "data_dir" in given else []
        print(f"done: now try {utils.shell_line('python', Path(sys.argv[0]).with_name('evaluate.py'), folder, *place)}")


if __name__ == "__main__":
    main()
