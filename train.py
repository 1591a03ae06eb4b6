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
import inspect
import io
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

try:
    import torch
    from torch import Tensor, nn
    from torch.nn.parallel import DistributedDataParallel
    from tqdm import tqdm

    import evaluate
    import utils
    from model import ACTIVATIONS, VAE, log_importance_weights, loss_terms, nll_from_log_weights
    from utils import Dataset, UserError
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    print(f"train.py: error: the package {error.name} is missing: pip install -r requirements.txt", file=sys.stderr)
    sys.exit(2)
except KeyboardInterrupt:
    sys.exit(130)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LR_SCHEDULES = ("constant", "cosine", "burda2016")
OBJECTIVES = ("elbo", "iwae")
INITS = ("pytorch", "burda2016")
OnEpoch = Callable[[VAE, list[dict[str, Any]]], None]
COLUMNS = ("epoch", "train_loss", "test_loss", "test_bce", "test_kl", "images_per_second", "seconds")  # of metrics.csv
AVERAGES_PER_EPOCH = 50  # as good as one after every step, and nine times cheaper at 469 steps an epoch


def train(
    dataset: str | Dataset = "auto",
    data_dir: str = "data",
    epochs: int | None = None,
    batch_size: int = 128,
    lr: float = 1.5e-3,
    lr_schedule: str = "constant",
    beta: float = 1.0,
    kl_warmup: float = 0.0,
    hidden_size: int = 512,
    latent_size: int = 20,
    encoder_layers: int = 2,
    decoder_layers: int = 1,
    activation: str = "relu",
    init: str = "pytorch",
    binarize: str = "dynamic",
    objective: str = "elbo",
    importance_samples: int = 1,
    adam_eps: float = 1e-8,
    average: bool = True,
    device: str = "auto",
    seed: int = 0,
    out_dir: str = "runs",
    on_epoch: OnEpoch | None = None,
) -> tuple[VAE, list[dict[str, Any]], Path]:
    """Trains a new model; the arguments are the command's options, and their defaults the command's.

    dataset may also be a Dataset of your own: its images may have any size, and are drawn where they are square.
    After each epoch on_epoch is called with the model and the history so far, for a notebook to show them. Returns the
    model, the rows of metrics.csv (losses in nats per image) and the run folder. Raises UserError for a bad value, and
    OSError where the run folder can't be written. Seeds PyTorch's generators and flushes denormals.
    """
    options = {name: value for name, value in locals().items() if name not in ("data_dir", "out_dir", "on_epoch")}
    check_options(options)
    flush_denormals()
    data = dataset if isinstance(dataset, Dataset) else utils.load_dataset_once(dataset, data_dir)
    options["dataset"] = data.name
    if epochs is None:
        options["epochs"] = 150 if data.name == "mnist-5k" else 20
    utils.seed_epoch(seed, 0)
    model = VAE(data.train_images.shape[1], hidden_size, latent_size, encoder_layers, decoder_layers, activation)
    if init == "burda2016":
        initialize(model, data.train_images)
    checkpoint = {"options": options, "epoch": 0, "history": [], "training_weights": model.state_dict()}
    run = utils.on_rank_0(lambda: utils.new_run_folder(out_dir, data.name, latent_size))
    return _fit(model, checkpoint, data, run, on_epoch)


def resume(
    run: str | Path,
    epochs: int | None = None,
    data_dir: str = "data",
    device: str | None = None,
    dataset: Dataset | None = None,
) -> tuple[VAE, list[dict[str, Any]], Path]:
    """Goes on with a run, in its folder, from its last whole epoch to `epochs` or to what it was started for.

    A run on a Dataset of your own needs that again.
    On one CPU the weights end bit-identical to those of a run that was never interrupted and, the learning rate being
    constant, to those of a run started with the larger `epochs`: the cosine schedule is stretched to the new length.
    Returns and raises as train does.
    """
    flush_denormals()
    path = utils.on_rank_0(lambda: utils.checkpoint_path(run))
    if path.name != "checkpoint.pt":
        raise UserError(f"--resume goes on in a run folder, whose checkpoint.pt it replaces: {path} is not one")
    model, checkpoint = utils.on_rank_0(lambda: utils.load_checkpoint(path))
    changes = {"epochs": epochs, "device": device}
    try:
        options = checkpoint["options"] | {name: value for name, value in changes.items() if value is not None}
        check_options(options)
        check_training_state(checkpoint, model)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = "its training state is damaged or missing"
        raise UserError(f"{path} cannot be resumed, only evaluated: {reason}") from error
    if options["epochs"] <= checkpoint["epoch"]:
        raise UserError(f"{path} is trained for {checkpoint['epoch']} epochs: give a larger --epochs to go on")
    data = dataset or utils.load_dataset_once(options["dataset"], data_dir)
    if data.train_images.shape[1] != model.config["input_size"]:
        raise UserError(f"{path} is a model of other images than those of {data.name}")
    for kind in ("pt", "csv"):
        for left in path.parent.glob(f".*.{kind}.*.part"):  # by a run that was killed while it wrote
            left.unlink(missing_ok=True)
    return _fit(model, checkpoint | {"options": options}, data, path.parent)


def check_training_state(checkpoint: dict[str, Any], model: VAE) -> None:
    """Raises ValueError or another error where training could not go on from a checkpoint's state."""
    history, rows = checkpoint["history"], range(1, checkpoint["epoch"] + 1)
    if [row["epoch"] for row in history] != list(rows):
        raise ValueError("its history is not that of its epochs")
    if not all(type(row[name]) is float and math.isfinite(row[name]) for row in history for name in COLUMNS[1:]):
        raise ValueError("its history holds what is no number")
    utils.check_tensors(checkpoint["training_weights"], model.state_dict())
    adam = checkpoint["optimizer_state_dict"]
    if history:
        for i, weight in enumerate(model.parameters()):
            like = {"step": torch.zeros(()), "exp_avg": weight, "exp_avg_sq": weight}
            utils.check_tensors(adam["state"][i], like)
    torch.optim.Adam(model.parameters()).load_state_dict(adam)


def check_options(options: dict[str, Any]) -> None:
    """Raises UserError, in the command line's words, for the first option with a bad value."""

    def check(name: str, requirement: str, is_good: bool) -> None:
        if not is_good:
            raise UserError(f"--{name.replace('_', '-')} must be {requirement}, not {options[name]}")

    counts = ("epochs", "batch_size", "hidden_size", "latent_size", "encoder_layers", "decoder_layers")
    for name in (*counts, "importance_samples"):
        is_default = name == "epochs" and options[name] is None
        check(name, "a whole number above 0", is_default or (type(options[name]) is int and 0 < options[name] < 2**31))
    for name in ("lr", "beta", "kl_warmup", "adam_eps"):
        check(name, "a number, 0 or above", type(options[name]) in (int, float) and 0 <= options[name] < math.inf)
    check("lr", "above 0", options["lr"] > 0)
    check("seed", "a whole number from 0 to 2^40", type(options["seed"]) is int and 0 <= options["seed"] <= 2**40)
    choices = {
        "lr_schedule": LR_SCHEDULES,
        "activation": ACTIVATIONS,
        "init": INITS,
        "binarize": utils.BINARIZE,
        "objective": OBJECTIVES,
        "device": utils.DEVICES,
    }
    for name, values in choices.items():
        check(name, f"one of {', '.join(values)}", options[name] in values)
    check("average", "True or False", type(options["average"]) is bool)
    if options["objective"] == "elbo" and options["importance_samples"] > 1:
        raise UserError("--importance-samples is for --objective iwae")
    if options["objective"] == "iwae" and (options["beta"] != 1 or options["kl_warmup"] > 0):
        raise UserError("--beta and --kl-warmup are for --objective elbo: iwae has no KL to weigh")
    utils.choose_device(options["device"])
    _, ranks = utils.rank_and_ranks()
    check("batch_size", f"{ranks} or more, for as many processes", options["batch_size"] >= ranks)


@torch.no_grad()
def initialize(model: VAE, images: Tensor) -> None:
    """Glorot-uniform weights, and for bias the log-odds of the mean of the images (N, 784) (Burda et al. 2016)."""
    for name, weight in model.named_parameters():
        if name.endswith("weight"):
            torch.nn.init.xavier_uniform_(weight)
        else:
            weight.zero_()
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


def _fit(
    average: VAE, checkpoint: dict[str, Any], data: Dataset, run: Path, on_epoch: OnEpoch | None = None
) -> tuple[VAE, list[dict[str, Any]], Path]:
    """Trains from a checkpoint's state to its options' number of epochs, and saves all after each epoch."""
    options, history, first = checkpoint["options"], checkpoint["history"], checkpoint["epoch"] + 1

    rank, ranks = utils.rank_and_ranks()

    # Set up: the weights that Adam changes, and their running average, which is what is evaluated and kept
    device = utils.choose_device(options["device"])
    data = data.to(device)
    average = average.to(device)
    model = copy.deepcopy(average) if options["average"] else average
    model.load_state_dict(checkpoint["training_weights"])
    optimizer = torch.optim.Adam(model.parameters(), lr=options["lr"], eps=options["adam_eps"], fused=True)
    if "optimizer_state_dict" in checkpoint:
        optimizer.load_state_dict(checkpoint["optimizer_state_dict"])
    elif rank == 0:
        try:
            save(run, average, model, optimizer, options, history)
        except BaseException:
            run.rmdir()
            raise
    optimizer.param_groups[0]["capturable"] = device.type == "cuda" and ranks == 1  # on a CUDA graph: see make_step
    test_set = utils.binarize_test_set(data.test_images, options["binarize"])
    step = make_step(model, optimizer, data.train_images, options)
    num_weights = sum(weight.numel() for weight in model.parameters())
    num_images = len(data.train_images)
    if rank == 0:
        where = f"{device}, {ranks} processes" if ranks > 1 else device
        print(f"{data.name}: {num_images:,} training images; {num_weights:,} weights on {where}; writing to {run}")

    # Train
    total, done = options["epochs"] * num_images, (first - 1) * num_images
    try:
        bar = tqdm(total=total, initial=done, unit=" images", unit_scale=True, disable=None if rank == 0 else True)
        with utils.fast_matmul(), bar as progress:
            for epoch in range(first, options["epochs"] + 1):
                started = time.perf_counter()
                neg_elbos = train_epoch(step, model, average, data.train_images, epoch, options, progress).cpu()
                seconds = time.perf_counter() - started
                losses = (neg_elbos.double().sum().item() / num_images, *compute_test_losses(average, *test_set))
                check_finite(neg_elbos, losses, epoch, run)
                history.append(dict(zip(COLUMNS, (epoch, *losses, num_images / seconds, seconds), strict=True)))
                if rank > 0:
                    continue
                save(run, average, model, optimizer, options, history)
                tqdm.write(epoch_line(history[-1], options))
                if epoch == options["epochs"] or epoch & (epoch - 1) == 0:  # drawing takes a while: at 1, 2, 4, 8, ...
                    draw(run, average, data, options, history)
                if on_epoch:
                    on_epoch(average, history)
    except KeyboardInterrupt as error:
        what = str(error) or "interrupted"
        raise type(error)(f"{what}: python train.py --resume {run} goes on") from None
    return average, history, run


class Objective(nn.Module):
    """What Adam minimizes, as a module, since that is what DistributedDataParallel wraps."""

    def __init__(self, model: VAE, options: dict[str, Any]):
        super().__init__()
        self.model, self.options = model, options

    def forward(self, inputs: Tensor, targets: Tensor, kl_weight: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 784) twice -> the loss, and the negative ELBO, both in nats for the whole batch."""
        z, logvar, mu = self.model.encode(inputs)
        if self.options["objective"] == "iwae":
            eps = torch.randn(self.options["importance_samples"], *mu.shape, device=mu.device)
            log_weights = log_importance_weights(self.model.decoder, targets, logvar, mu, eps)
            return nll_from_log_weights(log_weights).sum(), -log_weights.mean(0).sum()
        bce, kl = loss_terms(self.model.decoder.logits(z), targets, logvar, mu)
        return bce + kl_weight * kl, bce + kl


def make_step(
    model: VAE, optimizer: torch.optim.Optimizer, images: Tensor, options: dict[str, Any]
) -> Callable[[Tensor, Tensor], Tensor]:
    """-> step(batch, rates), which takes one step of Adam on the images (N, 784) uint8 at the indices batch (B,).

    rates (2,) holds the learning rate and the weight of the KL. The step returns the negative ELBO that it found, in
    nats for the whole batch. Nothing in it makes the CPU wait for a GPU. With several processes, batch is the share
    of this one, and the gradients are those of all shares together.
    """
    _, ranks = utils.rank_and_ranks()
    objective = Objective(model, options)
    if ranks > 1:
        objective = DistributedDataParallel(objective)
    scale = torch.tensor(float(ranks), device=images.device)  # undoes DDP's mean over ranks: the loss is a sum

    def step(batch: Tensor, rates: Tensor) -> Tensor:
        lr, kl_weight = rates.unbind()
        inputs, targets = utils.binarize(images.index_select(0, batch), options["binarize"])
        loss, neg_elbo = objective(inputs, targets, kl_weight)
        optimizer.zero_grad()
        loss.backward(scale.to(loss.dtype))
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        return neg_elbo.detach()

    return utils.CudaGraph(step) if images.is_cuda and ranks == 1 else step


def train_epoch(
    step: Callable[[Tensor, Tensor], Tensor],
    model: VAE,
    average: VAE,
    images: Tensor,
    epoch: int,
    options: dict[str, Any],
    progress: tqdm,
) -> Tensor:
    """One pass over the images (N, 784) in a new order -> each step's negative ELBO, in nats: (steps,)."""
    rank, ranks = utils.rank_and_ranks()
    utils.seed_epoch(options["seed"], epoch)
    batches = torch.randperm(len(images), device=images.device).split(options["batch_size"])  # the same on every rank
    if rank > 0:
        utils.seed_epoch(options["seed"], epoch, rank)  # other noise
    starts = [epoch - 1 + i / len(batches) for i in range(len(batches))]  # in epochs
    rates = [(learning_rate(start, options), kl_weight(start, options)) for start in starts]
    rates = torch.tensor(rates, device=images.device)
    neg_elbos = torch.empty(len(batches), device=images.device)  # stay there until the epoch ends
    stride = max(1, len(batches) // AVERAGES_PER_EPOCH)
    for i, batch in enumerate(batches):
        neg_elbos[i] = step(batch[rank::ranks], rates[i])
        if options["average"] and i % stride == 0:
            update_average(average, model, count=(epoch - 1) * math.ceil(len(batches) / stride) + i // stride)
        progress.update(len(batch))
    return utils.sum_over_ranks(neg_elbos)


def compute_test_losses(model: VAE, inputs: Tensor, targets: Tensor) -> tuple[float, float, float]:
    """The negative ELBO on the test set and its terms, BCE and KL, in nats per image."""
    rank, ranks = utils.rank_and_ranks()
    bce, kl = evaluate.elbo_terms(model, inputs[rank::ranks], targets[rank::ranks])
    sums = utils.sum_over_ranks(torch.stack([bce.sum(), kl.sum()]))
    bce, kl = (sums / len(inputs)).tolist()
    return bce + kl, bce, kl


def check_finite(neg_elbos: Tensor, losses: tuple[float, ...], epoch: int, run: Path) -> None:
    """Raises UserError where a loss of an epoch's steps (steps,), or one after them, is not finite."""
    if not all(map(math.isfinite, losses)):  # the first is the mean of neg_elbos
        bad = (~torch.isfinite(neg_elbos)).nonzero().flatten().tolist()
        step = f"step {bad[0] + 1}" if bad else "the test after its last step"
        cause = "the steps are likely too large: try a smaller --lr"
        raise UserError(f"the loss is not finite in epoch {epoch}, {step}; {cause}. {run} holds epoch {epoch - 1}")


def learning_rate(done: float, options: dict[str, Any]) -> float:
    """Adam's step size after `done` epochs."""
    if options["lr_schedule"] == "cosine":
        return options["lr"] * 0.5 * (1 + math.cos(math.pi * done / options["epochs"]))
    if options["lr_schedule"] == "burda2016":  # a factor of 10^(-1/7) after 1, 1 + 3, 1 + 3 + 9, ... epochs
        i = next(i for i in range(99) if done < (3 ** (i + 1) - 1) / 2)
        return options["lr"] * 10 ** (-i / 7)
    return options["lr"]


def kl_weight(done: float, options: dict[str, Any]) -> float:
    """The KL's weight after `done` epochs: beta, reached linearly over the first kl_warmup epochs."""
    return options["beta"] * min(1.0, done / options["kl_warmup"]) if options["kl_warmup"] else options["beta"]


@torch.no_grad()
def update_average(average: VAE, model: VAE, count: int, eta: float = 9) -> None:
    """Polynomial-decay averaging of the weights (Shamir & Zhang 2013, arXiv 1212.1824), after `count` updates.

    Does what a falling learning rate does, without having to know when training ends: the average leans on the last
    tenth or so of all steps, however many there were.
    """
    for mean, weight in zip(average.parameters(), model.parameters(), strict=True):
        mean.lerp_(weight, (eta + 1) / (count + 1 + eta))


# ---------------------------------------------------------------------------------------------------------------------
# What a run leaves


def save(run: Path, average: VAE, model: VAE, optimizer: Any, options: dict[str, Any], history: list) -> None:
    """Writes checkpoint.pt, from which everything else in the run folder can be made again, and metrics.csv."""
    optimizer.param_groups[0]["lr"] = options["lr"]  # the plain number: the next step sets what its schedule says
    checkpoint = {
        "model_state_dict": average.state_dict(),
        "optimizer_state_dict": optimizer.state_dict(),
        "model": average.config,
        "training_weights": model.state_dict(),
        "options": options,
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


def epoch_line(row: dict[str, float], options: dict[str, Any]) -> str:
    label = "  (gray targets: no likelihood)" if options["binarize"] == "none" else ""
    return (
        f"epoch {row['epoch']:{len(str(options['epochs']))}d}/{options['epochs']}  train {row['train_loss']:7.2f}  "
        f"test {row['test_loss']:7.2f} = BCE {row['test_bce']:6.2f} + KL {row['test_kl']:5.2f}  "
        f"{row['images_per_second']:9,.0f} images/s{label}"
    )


def draw(run: Path, model: VAE, data: Dataset, options: dict[str, Any], history: list) -> None:
    """Writes the pictures that show how far the run has come."""
    caption = evaluate.describe(data.name, options["binarize"], model, len(history))
    evaluate.save_figure(draw_curves(history, caption), run / "curves.png")
    if math.isqrt(data.train_images.shape[1]) ** 2 != data.train_images.shape[1]:
        return  # no square images to show
    evaluate.save_figure(
        evaluate.draw_reconstructions(model, data, options["binarize"], caption), run / "reconstructions.png"
    )
    evaluate.save_figure(evaluate.draw_prior_samples(model, caption), run / "prior_samples.png")


def draw_curves(history: list[dict[str, Any]], caption: str) -> "Figure":
    """Training and test loss over the epochs, and the test loss's two terms."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator

    figure = Figure(figsize=(9, 3), layout="constrained")
    figure.suptitle(f"Training curves: {caption}", fontsize=10)
    panels = {
        "loss": {"train_loss": "training set, as it was learned", "test_loss": "test set, after the epoch"},
        "BCE": {"test_bce": "test set"},
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


def parse_args(args: list[str] | None = None) -> argparse.Namespace:
    """The options that were given, by default on the command line; what was not is absent."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(train).parameters.items()}
    parser = utils.ArgumentParser(description=__doc__, argument_default=argparse.SUPPRESS, fromfile_prefix_chars="@")

    def option(name: str, help: str, **kwargs: Any) -> None:
        if (default := defaults[name]) is not None:
            help += f" (default: {default})"
        parser.add_argument(f"--{name.replace('_', '-')}", help=help, **kwargs)

    option("dataset", "auto is mnist, or mnist-5k where mnist can't be had", choices=utils.DATASETS)
    option("data_dir", "where data sets are read and downloaded", metavar="DIR")
    option("epochs", "passes over the training set (default: 20, and 150 on mnist-5k)", type=int, metavar="N")
    option("batch_size", "images a step", type=int, metavar="N")
    option("lr", "Adam's step size", type=float, metavar="X")
    option("lr_schedule", "cosine falls to 0 at the last epoch", choices=LR_SCHEDULES)
    option("beta", "weight of the KL in training; the losses printed have it at 1", type=float, metavar="X")
    option("kl_warmup", "epochs over which the weight of the KL rises from 0", type=float, metavar="X")
    option("hidden_size", "width of the hidden layers", type=int, metavar="N")
    option("latent_size", "dimensions of z", type=int, metavar="N")
    option("encoder_layers", "hidden layers of the encoder", type=int, metavar="N")
    option("decoder_layers", "hidden layers of the decoder", type=int, metavar="N")
    option("activation", "of the hidden layers", choices=ACTIVATIONS)
    option("init", "burda2016: Glorot-uniform weights, and the mean image as the output's bias", choices=INITS)
    option(
        "binarize",
        "dynamic: sampled pixels; threshold: gray input, black and white target; none: gray",
        choices=utils.BINARIZE,
    )
    option("objective", "the bound that is trained on: the ELBO, or Burda et al.'s (2016)", choices=OBJECTIVES)
    option("importance_samples", "draws of z an image for --objective iwae (1: the ELBO)", type=int, metavar="K")
    option("adam_eps", "Adam's epsilon, to be compared with gradients summed over the batch", type=float, metavar="X")
    option("average", "evaluate and keep a running average of the weights", action=argparse.BooleanOptionalAction)
    option("device", "auto is the first of cuda, mps and cpu that is there", choices=utils.DEVICES)
    option("seed", "of all that is random", type=int, metavar="N")
    option("out_dir", "where run folders are made", metavar="DIR")
    parser.add_argument(
        "--resume", metavar="RUN", help="go on with this run folder: takes --epochs, --data-dir and --device"
    )
    return parser.parse_args(args)


@utils.command
def main() -> None:
    given = vars(parse_args())
    with utils.process_group():
        if "resume" not in given:
            _, _, run = train(**given)
        else:
            if fixed := given.keys() - {"resume", "epochs", "data_dir", "device"}:
                names = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(fixed))
                raise UserError(f"a resumed run keeps its own {names}: --resume takes --epochs, --data-dir, --device")
            _, _, run = resume(given.pop("resume"), **given)
        if utils.rank_and_ranks()[0] == 0:
            print(f"done: now try python evaluate.py {run}")


if __name__ == "__main__":
    main()
