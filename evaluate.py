"""Measures a trained VAE and draws what it learned.

    python evaluate.py                                # the newest run in runs/
    python evaluate.py runs/001-mnist-z20
    python evaluate.py somewhere/checkpoint.pt --dataset mnist --binarize threshold

Writes metrics.json and the pictures into the run folder, or for FILE.pt into a folder FILE. All losses are in nats per
image.
"""

import functools
import io
import itertools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution
from tqdm import tqdm

import utils
from data import BINARIZE, DATASETS, ImageData, binarize, binarize_test_set, check_bytes, load_dataset, read_pictures
from model import VAE, DiagonalNormal, kl_by_latent
from step import choose_precision, matmul_precision
from utils import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # imported where it is used: it takes a third of a second

NLL_SAMPLES = 100
BLUE, ORANGE, GRAY = "#3f90da", "#ffa90e", "#94a4a2"
TERMS = ("test_reconstruction", "test_kl")  # of test_loss, in metrics.csv


class Examples(NamedTuple):
    """Binarized images to test a model on, and their labels."""

    inputs: Tensor  # (N, C, H, W) in [0, 1], for the encoder
    targets: Tensor  # of the same shape, for the likelihood
    labels: Tensor  # (N,) int64


def make_test_set(dataset: ImageData, binarization: str, device: torch.device | str = "cpu") -> Examples:
    """The test images of a data set in their one fixed binarization."""
    images, labels = dataset.test_images.to(device), dataset.test_labels.to(device)
    return Examples(*binarize_test_set(images, binarization), labels)


def usual_binarization(model: VAE) -> str:
    """How images become targets for the model's likelihood: dynamic for Bernoulli pixels, else none."""
    return "dynamic" if model.config["likelihood"] == "bernoulli" else "none"


def in_eval_mode(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a function of a model: runs it in eval mode without gradients, and restores every module's mode."""

    @functools.wraps(function)
    def wrapped(model: VAE, *args: Any, **kwargs: Any) -> Any:
        modes = {module: module.training for module in model.modules()}
        model.eval()
        try:
            with torch.no_grad():
                return function(model, *args, **kwargs)
        finally:
            for module, mode in modes.items():
                module.training = mode

    return wrapped


# ---------------------------------------------------------------------------------------------------------------------
# Metrics


@in_eval_mode
def elbo_terms(model: VAE, test_set: Examples, batch_size: int = 1000) -> tuple[Tensor, Tensor]:
    """The negative ELBO's terms, with one z for each image: reconstruction and KL, each (N,)."""
    batches = zip(*(part.split(batch_size) for part in test_set), strict=True)
    reconstructions, kls = zip(*(model.elbo_terms(*batch) for batch in batches), strict=True)
    return torch.cat(reconstructions), torch.cat(kls)


@in_eval_mode
def posterior_means(model: VAE, test_set: Examples, batch_size: int = 1000) -> tuple[Tensor, Tensor | None]:
    """The means of q(z|x) and the KL by latent, each (N, latent_size). The KL is None where it has no closed form."""
    means, kls = [], []
    for x, y in zip(test_set.inputs.split(batch_size), test_set.labels.split(batch_size), strict=True):
        q = model.posterior(x, y)
        means.append(q.mean)
        kls.append(kl_by_latent(q, model.prior(y)))
    return torch.cat(means), None if kls[0] is None else torch.cat(kls)


@in_eval_mode
def estimate_nll(
    model: VAE, test_set: Examples, num_samples: int = NLL_SAMPLES, seed: int = 0, batch_size: int = 50
) -> Tensor:
    """-log p(target) by importance sampling from q(z|input) (Burda et al. 2016, eq. 8): (N,) nats. Reseeds PyTorch."""
    torch.manual_seed(seed)
    device, nll = test_set.inputs.device, []
    batches = list(zip(*(part.split(batch_size) for part in test_set), strict=True))
    with matmul_precision(choose_precision(device, 10 * batch_size), device):
        for inputs, targets, y in tqdm(batches, desc="nll", unit=" batches", leave=False, disable=None):
            q, p = model.posterior(inputs, y), model.prior(y)
            total = torch.tensor(-math.inf, device=device)
            for start in range(0, num_samples, 10):  # so few that a batch's logits stay in a CPU's cache
                log_weights = model.log_importance_weights(q, p, targets, min(10, num_samples - start), y)
                total = torch.logaddexp(total, log_weights.logsumexp(0))  # the log of the sum of all weights so far
            nll.append(math.log(num_samples) - total)
    return torch.cat(nll)


@in_eval_mode
def is_likelihood(model: VAE, test_set: Examples) -> bool:
    """Whether all targets are in the support of p(x|z). A Bernoulli's holds 0 and 1 but no gray."""
    likelihood = model.likelihood(model.posterior(test_set.inputs[:1], test_set.labels[:1]).mean, test_set.labels[:1])
    return bool(likelihood.support.check(test_set.targets.flatten(1)).all())


def is_active(means: Tensor, threshold: float = 0.01) -> Tensor:
    """(N, latent_size) posterior means -> (latent_size,): whether each varies over the images (Burda et al. 2016)."""
    return means.var(0) > threshold


def bits_per_dim(nats: float, num_values: int) -> float:
    """Nats per image -> bits per value (pixel and channel) of an image, which compares across sizes."""
    return nats / num_values / math.log(2)


def evaluate(
    model: VAE,
    images: Tensor,
    binarize: str | None = None,
    nll_samples: int = NLL_SAMPLES,
    seed: int = 0,
    labels: Tensor | None = None,
) -> dict[str, Any]:
    """All metrics of a model on uint8 images (N, ...), with labels (N,) int64 if the model uses them. Reseeds PyTorch.

    In nats per image; a name with _se is a standard error over the images. nll and nll_per_image (N) are None where
    the targets are outside the likelihood's support, bits_per_dim (of nll) also where they are binarized, and
    kl_per_latent where a closed form is missing. binarize defaults to usual_binarization. Raises UserError for bad
    images.
    """
    check_bytes(images, "images")
    size = model.config["input_size"]
    if len(images) < 2 or images.dim() < 2 or images[0].numel() != size:
        raise UserError(f"the images must be two or more of {size} values each, not {tuple(images.shape)}")
    device = next(model.parameters()).device
    labels = torch.zeros(len(images), dtype=torch.int64) if labels is None else labels
    if not isinstance(labels, Tensor) or labels.shape != (len(images),) or labels.dtype != torch.int64:
        raise UserError(f"the labels must be a tensor ({len(images)},) of type int64, one for each image")
    binarize = binarize or usual_binarization(model)
    test_set = Examples(*binarize_test_set(images.to(device), binarize), labels.to(device))
    return _measure(model, test_set, binarize, nll_samples, seed)


def _measure(model: VAE, test_set: Examples, binarize: str, nll_samples: int, seed: int) -> dict[str, Any]:
    if not isinstance(nll_samples, int) or nll_samples < 1:
        raise UserError(f"nll_samples must be a whole number, 1 or more, not {nll_samples}")
    torch.manual_seed(seed)
    reconstruction, kl = elbo_terms(model, test_set)
    means, by_latent = posterior_means(model, test_set)
    neg_elbo, num_images = reconstruction + kl, len(kl)
    nll = estimate_nll(model, test_set, nll_samples, seed) if is_likelihood(model, test_set) else None
    is_in_bits = nll is not None and binarize == "none"
    return {
        "neg_elbo": neg_elbo.mean().item(),
        "neg_elbo_se": neg_elbo.std().item() / math.sqrt(num_images),
        "reconstruction": reconstruction.mean().item(),
        "kl": kl.mean().item(),
        "kl_per_latent": None if by_latent is None else by_latent.mean(0).tolist(),
        "nll": None if nll is None else nll.mean().item(),
        "nll_se": None if nll is None else nll.std().item() / math.sqrt(num_images),
        "nll_per_image": None if nll is None else nll.tolist(),
        "bits_per_dim": bits_per_dim(nll.mean().item(), model.config["input_size"]) if is_in_bits else None,
        "nll_samples": nll_samples,
        "active_units": int(is_active(means).sum()),
        "latent_size": means.shape[1],
        "num_images": num_images,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Pictures: every draw_ function returns a matplotlib figure, which a notebook shows and save_figure writes


@in_eval_mode
def draw_reconstructions(model: VAE, dataset: ImageData, test_set: Examples, caption: str) -> "Figure":
    """Ten test images, of as many different classes as possible, with the encoder's input and the reconstructions."""
    chosen = in_turn(dataset.test_labels.tolist(), 10)
    inputs, y = test_set.inputs[chosen], test_set.labels[chosen]
    images = dataset.test_images[chosen].to(inputs.device) / 255
    rows = {"image": images, "input": inputs, "reconstruction": model.reconstruct(inputs, y)}
    if torch.equal(inputs, images):
        del rows["input"]
    columns = [dataset.classes[label] for label in y] if len(dataset.classes) > 1 else None
    title = f"Reconstructions of test images\n{caption}"
    return draw_tiles(torch.cat(list(rows.values())), len(rows), dataset.shape, title, list(rows), columns)


@in_eval_mode
def draw_prior_samples(model: VAE, dataset: ImageData, caption: str, seed: int = 0) -> "Figure":
    """The decoded means of a hundred draws of the prior, the same for the same seed. Each row has one label."""
    device = next(model.parameters()).device
    y = torch.arange(10, device=device).repeat_interleave(10) % len(dataset.classes)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        images = model.sample(100, y)
    return draw_tiles(images, 10, dataset.shape, f"Samples from the prior\n{caption}")


@in_eval_mode
def draw_interpolations(model: VAE, dataset: ImageData, test_set: Examples, caption: str) -> "Figure":
    """Straight walks in latent space between test images' posterior means, of different classes if there are any."""
    ends = in_turn(dataset.test_labels.tolist(), 10, backwards=True)
    half, shares = len(ends) // 2, [step / 10 for step in range(11)]
    first, last = ends[:half], ends[-half:]
    y1, y2 = test_set.labels[first], test_set.labels[last]
    z1, z2 = model.posterior(test_set.inputs[first], y1).mean, model.posterior(test_set.inputs[last], y2).mean
    z = torch.stack([torch.lerp(z1, z2, share) for share in shares], 1)  # (half, 11, latent_size)
    y = torch.stack([y1 if share < 0.5 else y2 for share in shares], 1)
    images = model.decode(z.flatten(0, 1), y.flatten())
    names = [f"{dataset.classes[start]} to {dataset.classes[end]}" for start, end in zip(y1, y2, strict=True)]
    names = names if len(dataset.classes) > 1 else None
    title = f"Decoded walks between test images' posterior means\n{caption}"
    figure = draw_tiles(images, half, dataset.shape, title, names, [str(share) for share in shares])
    figure.axes[0].set_xlabel("share of the way")
    return figure


def draw_latent_space(model: VAE, dataset: ImageData, test_set: Examples, caption: str) -> "Figure":
    """The test images' posterior means, coloured by class; above two latents, their first two principal components."""
    means, labels = posterior_means(model, test_set)[0].float().cpu(), test_set.labels.cpu()
    names = ["$z_1$", "$z_2$"]
    if means.shape[1] == 1:
        means, names = torch.cat([means, labels[:, None]], 1), ["$z_1$", "class"]
    elif means.shape[1] > 2:
        means = means - means.mean(0)
        _, singular_values, directions = torch.linalg.svd(means, full_matrices=False)
        means, shares = means @ directions[:2].T, singular_values**2 / (singular_values**2).sum()
        names = [f"principal component {i + 1} ({shares[i]:.0%} of the variance)" for i in range(2)]
    figure, axes = _new_figure(8, 8, f"Posterior means of the test images\n{caption}")
    num_classes, colors = len(dataset.classes), class_colors(len(dataset.classes))
    axes.scatter(*means.T.numpy(), s=4, c=[colors[label] for label in labels], alpha=0.6, linewidths=0)
    for name, color in zip(dataset.classes[:40], colors, strict=False):  # the legend has room for as many
        axes.scatter([], [], color=color, label=f" {verbatim(name)}")  # matplotlib hides labels that begin with _
    title = f"the first 40 of {num_classes} classes" if num_classes > 40 else None
    ncols, fontsize = (1, 10) if num_classes <= 20 else (2, 7)
    axes.legend(title=title, ncols=ncols, fontsize=fontsize, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    axes.set(xlabel=names[0], ylabel=names[1])
    return figure


def draw_latent_usage(model: VAE, test_set: Examples, caption: str) -> "Figure":
    """The mean KL of each latent over the test images, sorted. Raises ValueError where it has no closed form."""
    means, kl = posterior_means(model, test_set)
    if kl is None:
        raise ValueError("the KL has no closed form for each latent")
    kl, order = kl.mean(0).cpu().sort(descending=True)
    active = is_active(means).cpu()[order]
    title = f"KL of each latent dimension, over the test images\n{caption}"
    figure, axes = _new_figure(max(8, 0.4 * len(kl)), 6, title)
    for name, color, chosen in (("active", BLUE, active), ("not active", GRAY, ~active)):
        if chosen.any():
            bars = chosen.nonzero().flatten().tolist()
            axes.bar(bars, kl[chosen].tolist(), color=color, label=f"{name}: {len(bars)}")
    axes.set_xticks(range(len(kl)), [str(i + 1) for i in order.tolist()], fontsize=7)
    axes.set(xlabel="latent dimension, by its KL", ylabel="KL, nats per image", xlim=(-0.6, len(kl) - 0.4))
    axes.legend(frameon=False)
    return figure


def draw_traversals(model: VAE, dataset: ImageData, test_set: Examples, caption: str) -> "Figure":
    """What the ten latents of largest KL do: each row moves one of them over the prior, around one test image.

    Without a KL for each latent, they are those whose posterior means vary most.
    """
    means, kl = posterior_means(model, test_set)
    order = (means.var(0) if kl is None else kl.mean(0)).argsort(descending=True)[:10].tolist()
    deviations = torch.arange(-3.0, 4.0, device=means.device)
    images = decode_traversals(model, means[:1], order, deviations, test_set.labels[:1])
    title = f"One latent at a time moved over the prior, around a test image\n{caption}"
    rows, columns = [f"latent {i + 1}" for i in order], [f"{value:.0f}" for value in deviations.tolist()]
    figure = draw_tiles(images, len(order), dataset.shape, title, rows, columns)
    figure.axes[0].set_xlabel("standard deviations of the prior")
    return figure


@in_eval_mode
def decode_traversals(model: VAE, z: Tensor, latents: list[int], deviations: Tensor, y: Tensor) -> Tensor:
    """Decodes z (1, latent_size) with each of the latents in turn at each of the prior's deviations, row by row."""
    values = _prior_quantiles(model.prior(y), torch.special.ndtr(deviations))
    z = z.repeat(len(latents), len(deviations), 1)
    for row, latent in enumerate(latents):
        z[row, :, latent] = values[:, latent]
    return model.decode(z.flatten(0, 1), y.expand(z[..., 0].numel()))


@in_eval_mode
def draw_least_likely(model: VAE, dataset: ImageData, test_set: Examples, nll: list[float], caption: str) -> "Figure":
    """The ten test images of largest nll (N), in nats, with their reconstructions."""
    chosen = sorted(range(len(nll)), key=nll.__getitem__, reverse=True)[:10]
    inputs, y = test_set.inputs[chosen], test_set.labels[chosen]
    images = torch.cat([inputs, model.reconstruct(inputs, y)])
    title = f"The least likely test images, and their nll in nats\n{caption}"
    return draw_tiles(images, 2, dataset.shape, title, ["image", "reconstruction"], [f"{nll[i]:,.0f}" for i in chosen])


def draw_manifold(model: VAE, dataset: ImageData, caption: str, steps: int = 20) -> "Figure":
    """A two-dimensional latent space decoded at equal quantiles of the prior (Kingma & Welling 2014, figure 4)."""
    images, (x, y) = decode_manifold(model, steps)
    rows, columns = ([f"{value:.1f}" for value in values] for values in (y, x))
    title = f"Images decoded at equal quantiles of the prior\n{caption}"
    figure = draw_tiles(images, steps, dataset.shape, title, rows, columns)
    figure.axes[0].set(xlabel="$z_1$", ylabel="$z_2$")
    return figure


@in_eval_mode
def decode_manifold(model: VAE, steps: int) -> tuple[Tensor, tuple[list[float], list[float]]]:
    """The tiles of draw_manifold (steps * steps, D), row by row, and the z_1 of each column and z_2 of each row."""
    label = torch.zeros(1, dtype=torch.int64, device=next(model.parameters()).device)  # the first label
    shares = (torch.arange(steps, device=label.device) + 0.5) / steps
    x, y = _prior_quantiles(model.prior(label), shares).T
    z = torch.cartesian_prod(y.flip(0), x).flip(1)
    return model.decode(z, label.expand(len(z))), (x.tolist(), y.flip(0).tolist())


def _prior_quantiles(p: Distribution, shares: Tensor) -> Tensor:
    """The quantiles of each latent: shares (steps,) in (0, 1) -> (steps, latent_size)."""
    if isinstance(p, DiagonalNormal):
        return p.mu.flatten() + torch.exp(0.5 * p.logvar.flatten()) * torch.special.ndtri(shares)[:, None]
    return torch.quantile(p.sample((10_000,)).flatten(0, -2), shares, dim=0)  # no formula, so of 10,000 draws


def draw_curves(history: list[dict[str, float]], caption: str) -> "Figure":
    """Training and test loss over the epochs, and the test loss's two terms, from the rows of metrics.csv."""
    figure, (left, *others) = _new_panels(f"Training curves: {caption}", len(history))
    _plot_column(left, history, "train_loss", ORANGE, "training set, as it was learned")
    _plot_column(left, history, "test_loss", BLUE, "test set, after the epoch")
    for axes, column in zip(others, TERMS, strict=True):
        _plot_column(axes, history, column, BLUE, "test set")
    for axes in (left, *others):
        axes.legend(fontsize=8, frameon=False)
    return figure


def draw_comparison(histories: dict[str, list[dict[str, float]]]) -> "Figure":
    """The test loss and its two terms over the epochs, of several runs by their names."""
    figure, panels = _new_panels("Test set, after each epoch", max(map(len, histories.values())))
    for (name, history), color in zip(histories.items(), class_colors(len(histories)), strict=True):
        for axes, column in zip(panels, ("test_loss", *TERMS), strict=True):
            _plot_column(axes, history, column, color, name)
    figure.set_figheight(3 + 0.2 * len(histories))
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=8, frameon=False, loc="outside lower center")
    return figure


def _plot_column(axes: Any, history: list[dict[str, float]], column: str, color: Any, label: str) -> None:
    epochs, values = zip(*((row["epoch"], row[column]) for row in history), strict=True)
    axes.plot(epochs, values, marker=".", color=color, label=verbatim(label))


def _new_panels(title: str, epochs: int) -> tuple["Figure", list[Any]]:
    """A figure with axes for the loss and its two terms."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator

    figure = Figure(figsize=(9, 3), layout="constrained")
    figure.suptitle(verbatim(title), fontsize=10)
    panels = figure.subplots(1, 3).tolist()
    for axes, name in zip(panels, ("loss", "reconstruction", "KL"), strict=True):
        axes.set(title=name, xlabel="epoch", ylabel="nats per image")
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
        if epochs > 10:  # most happens in the first epochs
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter("{x:.0f}")
            axes.xaxis.set_minor_formatter("")
        axes.grid(alpha=0.3)
    return figure, panels


def draw_tiles(
    images: Tensor,
    rows: int,
    shape: tuple[int, int, int],
    title: str,
    row_labels: list[str] | None = None,
    column_labels: list[str] | None = None,
) -> "Figure":
    """(rows * columns, ...) images in [0, 1] of shape (C, H, W) as one picture, row by row."""
    _, height, width = shape
    figure, axes = _new_figure(len(images) // rows, rows, title)
    axes.imshow(tile(images, rows, shape).numpy(), cmap="gray", vmin=0, vmax=1)
    for set_ticks, labels, size in ((axes.set_yticks, row_labels, height), (axes.set_xticks, column_labels, width)):
        labels = [verbatim(label) for label in labels or []]
        set_ticks([(i + 0.5) * size for i in range(len(labels))], labels, fontsize=8)
    axes.tick_params(length=0)
    return figure


def tile(images: Tensor, rows: int, shape: tuple[int, int, int] = (1, 28, 28)) -> Tensor:
    """(rows * columns, ...) images as one, row by row, on the CPU: (rows * H, columns * W), with (..., 3) in colour."""
    channels, height, width = shape
    tiles = images.detach().float().cpu().view(rows, -1, channels, height, width)
    picture = tiles.permute(0, 3, 1, 4, 2).reshape(rows * height, -1, channels)
    return picture[..., 0] if channels == 1 else picture


def verbatim(text: str) -> str:
    """Text that matplotlib shows as it is, without formulas."""
    return text.replace("$", r"\$")


def class_colors(num_classes: int) -> list[Any]:
    """A colour for each class; up to ten can be told apart by the colour-blind too (arXiv 2107.02270)."""
    from matplotlib import color_sequences, colormaps

    if num_classes <= 10:
        return list(color_sequences["petroff10"])[:num_classes]
    return list(colormaps["turbo"](torch.linspace(0, 1, num_classes).tolist()))


def in_turn(labels: list[int], count: int, backwards: bool = False) -> list[int]:
    """The first `count` indices in the order: first (or last) image of each class, second of each, and so on."""
    order = range(len(labels))[:: -1 if backwards else 1]
    by_class = ([i for i in order if labels[i] == label] for label in sorted(set(labels)))
    return [i for turn in itertools.zip_longest(*by_class) for i in turn if i is not None][:count]


def describe(dataset: ImageData, binarization: str, model: VAE, epoch: int | None) -> str:
    """The pictures' caption: what was trained on what, and what it was tested on if not the test set."""
    what = "" if type(model) is VAE else f"{type(model).__name__}, "
    after = "" if epoch is None else f", epoch {epoch}"
    held_out = f", tested on {dataset.num_held_out:,} held-out training images" if dataset.num_held_out else ""
    is_logistic = model.config["likelihood"] == "logistic"
    pixels = "logistic likelihood" if is_logistic else f"binarize {binarization}"
    return f"{what}{dataset.name}, {pixels}, latent size {model.config['latent_size']}{after}{held_out}"


def save_figure(figure: "Figure", path: Path) -> None:
    """Writes a figure as PNG, atomically. Raises OSError."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    utils.write_atomically(path, buffer.getvalue())


def draw_all(
    model: VAE, dataset: ImageData, test_set: Examples, caption: str, nll: list[float] | None = None
) -> Iterator[tuple[str, "Figure"]]:
    """The file name and figure of each picture that applies to this model. nll (N) is in nats."""
    means, kl = posterior_means(model, Examples(*(part[:2] for part in test_set)))
    yield "reconstructions.png", draw_reconstructions(model, dataset, test_set, caption)
    yield "prior_samples.png", draw_prior_samples(model, dataset, caption)
    yield "interpolations.png", draw_interpolations(model, dataset, test_set, caption)
    yield "latent_space.png", draw_latent_space(model, dataset, test_set, caption)
    yield "traversals.png", draw_traversals(model, dataset, test_set, caption)
    if nll is not None:
        yield "least_likely.png", draw_least_likely(model, dataset, test_set, nll, caption)
    if kl is not None:
        yield "latent_usage.png", draw_latent_usage(model, test_set, caption)
    if means.shape[1] == 2:
        yield "manifold.png", draw_manifold(model, dataset, caption)


def _new_figure(columns: float, rows: float, title: str) -> tuple["Figure", Any]:
    from matplotlib.figure import Figure  # not pyplot, which needs a backend

    width = max(5, 0.5 * columns + 1.6)  # wide enough for the title
    figure = Figure(figsize=(width, 0.5 * rows + 1), layout="constrained")
    axes = figure.subplots()
    axes.set_title(verbatim(title), fontsize=10)
    return figure, axes


# ---------------------------------------------------------------------------------------------------------------------
# The command


def evaluate_run(
    run: str | Path,
    model: VAE | None = None,
    dataset: str | ImageData | None = None,
    data_dir: str | Path = "data",
    binarize: str | None = None,
    nll_samples: int = NLL_SAMPLES,
    device: str = "auto",
    out_dir: str | Path | None = None,
    seed: int = 0,
    hold_out: int | None = None,
) -> dict[str, Any]:
    """Evaluates a run or a checkpoint file, writes metrics.json and the pictures, and prints and returns the metrics.

    A checkpoint of a subclass of your own needs a `model` of that class. dataset, binarize and hold_out (0: the test
    set) default to the run's, whose images must not have changed; hold_out to 0 if a data set is named. out_dir is the
    run folder, or a folder FILE for FILE.pt. Raises UserError for a bad value or file, and OSError.
    """
    opened = open_run(run, model, binarize, device, out_dir)
    model, binarize = opened.model, opened.binarize
    dataset = open_test_data(model, opened.checkpoint, opened.path, data_dir, dataset, hold_out)
    caption = describe(dataset, binarize, model, opened.checkpoint.get("epoch"))
    opened.out_dir.mkdir(parents=True, exist_ok=True)
    test_set = make_test_set(dataset, binarize, utils.choose_device(device))
    metrics = _measure(model, test_set, binarize, nll_samples, seed)
    metrics |= {"dataset": dataset.name, "hold_out": dataset.num_held_out, "binarize": binarize}
    print_metrics(metrics, f"{opened.path}: {caption}")
    written = {name: value for name, value in metrics.items() if name != "nll_per_image"}
    utils.write_atomically(opened.out_dir / "metrics.json", (json.dumps(written, indent=2) + "\n").encode())
    for name, figure in draw_all(model, dataset, test_set, caption, metrics["nll_per_image"]):
        save_figure(figure, opened.out_dir / name)
        print(f"wrote {opened.out_dir / name}")
    return metrics


class OpenedRun(NamedTuple):
    """A run or a checkpoint file."""

    path: Path
    checkpoint: dict[str, Any]
    model: VAE
    binarize: str
    out_dir: Path


def open_run(
    run: str | Path,
    model: VAE | None = None,
    binarize: str | None = None,
    device: str = "auto",
    out_dir: str | Path | None = None,
) -> OpenedRun:
    """Loads a run or a checkpoint file. Arguments and errors are evaluate_run's."""
    device, path = utils.choose_device(device), utils.checkpoint_path(run)
    model, checkpoint = utils.load_checkpoint(path, model)
    model = model.to(device)
    options = checkpoint.get("options", {})  # a checkpoint of the original repository has none
    binarize = binarize or options.get("binarize") or usual_binarization(model)
    if binarize not in BINARIZE:
        raise UserError(f"binarize must be one of {', '.join(BINARIZE)}, not {binarize}")
    # FILE.pt gets a folder of its own, because several may lie in one folder, such as weights/
    out_dir = Path(out_dir or (path.parent if path.name == "checkpoint.pt" else path.with_suffix("")))
    return OpenedRun(path, checkpoint, model, binarize, out_dir)


def open_test_data(
    model: VAE,
    checkpoint: dict[str, Any],
    path: Path,
    data_dir: str | Path = "data",
    dataset: str | ImageData | None = None,
    hold_out: int | None = None,
) -> ImageData:
    """The data set to evaluate a checkpoint on: by default the run's own, with the images that it held out.

    Raises UserError if the images do not fit the model, or the run's own have changed.
    """
    check_kind("auto" if dataset is None else dataset)
    options, is_the_runs = checkpoint.get("options", {}), dataset is None and hold_out is None
    if hold_out is None:
        hold_out = 0 if isinstance(dataset, str | Path) else options.get("hold_out", 0)
    if isinstance(dataset, ImageData):
        dataset = dataset.hold_out(hold_out or dataset.num_held_out)
    else:
        name = str(dataset or options.get("dataset", "auto"))
        image_size = image_size_of(model) if name not in DATASETS and Path(name).is_dir() else None
        dataset = load_dataset(name, data_dir, image_size, hold_out, model.config["channels"])
    check_images(model, dataset)
    if is_the_runs:
        check_same_images(checkpoint, dataset, path)
    return dataset


def check_kind(dataset: Any) -> None:
    """Raises UserError unless a data set is given by name, by path or as ImageData."""
    if not isinstance(dataset, str | Path | ImageData):
        raise UserError(f"dataset must be a name, a path or ImageData, not {type(dataset).__name__}")


def image_size_of(model: VAE) -> int:
    """The width and height of a model's images, if they are square."""
    return math.isqrt(model.config["input_size"] // model.config["channels"])


def check_images(model: VAE, dataset: ImageData) -> None:
    """Raises UserError if the model is for images of another size."""
    if model.config["input_size"] != dataset.input_size:
        sizes = f"{model.config['input_size']} values each, but those of {dataset.name} have {dataset.input_size}"
        raise UserError(f"the model is for other images: it expects {sizes}")


def check_same_images(checkpoint: dict[str, Any], dataset: ImageData, path: Path) -> None:
    """Raises UserError if a run was trained on other images, perhaps on those it would be tested on now."""
    if checkpoint.get("checksum", checksum := dataset.checksum()) != checksum:
        how = "pass its own data, or evaluate it on another data set by naming one (--dataset)"
        raise UserError(f"{path} was trained on other images than those now in {dataset.name}: {how}")


def print_metrics(metrics: dict[str, Any], title: str) -> None:
    """Prints what evaluate returns."""
    print(f"{title}; {metrics['num_images']:,} {'held-out' if metrics.get('hold_out') else 'test'} images")
    if metrics["nll"] is None:
        print("These figures are not likelihoods: some targets are outside the likelihood's support (gray pixels, say)")
    print(f"  neg_elbo        {metrics['neg_elbo']:8.2f} nats per image, standard error {metrics['neg_elbo_se']:.2f}")
    print(f"    reconstruction{metrics['reconstruction']:8.2f}")
    kls = sorted(metrics["kl_per_latent"] or [], reverse=True)
    how = "by latent, sorted:" if kls else "estimated from one draw per image (no closed form available)"
    print(f"    kl            {metrics['kl']:8.2f}, {how}")
    for start in range(0, len(kls), 10):
        print(" " * 18 + " ".join(f"{kl:5.2f}" for kl in kls[start : start + 10]))
    if metrics["nll"] is not None:
        how = f"standard error {metrics['nll_se']:.2f}, {metrics['nll_samples']:,} importance samples"
        print(f"  nll             {metrics['nll']:8.2f} nats per image, {how}")
    if metrics["bits_per_dim"] is not None:
        print(f"  bits_per_dim    {metrics['bits_per_dim']:8.3f}, of nll")
    print(f"  active_units    {metrics['active_units']:8d} of {metrics['latent_size']} latents")


@in_eval_mode
def encode_images(
    model: VAE, images: Tensor, labels: Tensor, mode: str, nll_samples: int, seed: int = 0, batch_size: int = 1000
) -> dict[str, Tensor]:
    """mu and logvar (N, latent_size), and neg_elbo and nll (N,) in nats, of uint8 images (N, ...) binarized by mode.

    Leaves out logvar where the posterior has none, and nll where targets are outside the likelihood's support. Takes
    memory for the floats of one batch. Reseeds PyTorch.
    """
    device, generator, parts = next(model.parameters()).device, torch.Generator().manual_seed(0), []
    for i, (batch, y) in enumerate(zip(images.split(batch_size), labels.split(batch_size), strict=True)):
        inputs, targets = binarize(batch.cpu(), mode, generator)
        examples = Examples(inputs.to(device), targets.to(device), y.to(device))
        nll = estimate_nll(model, examples, nll_samples, seed + i) if is_likelihood(model, examples) else None
        q, (reconstruction, kl) = model.posterior(examples.inputs, examples.labels), elbo_terms(model, examples)
        part = {"mu": q.mean, "logvar": getattr(q, "logvar", None), "neg_elbo": reconstruction + kl, "nll": nll}
        parts.append({name: value.cpu() for name, value in part.items() if value is not None})
    names = [name for name in parts[0] if all(name in part for part in parts)]
    return {name: torch.cat([part[name] for part in parts]) for name in names}


def save_encoded(
    path: Path,
    opened: OpenedRun,
    dataset: str | None = None,
    data_dir: str = "data",
    hold_out: int | None = None,
    nll_samples: int = NLL_SAMPLES,
    seed: int = 0,
) -> int:
    """Writes an .npz file of encode_images of the test images, or of all images at a path -> their number.

    The file also has the label of each image, and the names of images from a path. Raises UserError if it exists, or
    for bad images, and OSError.
    """
    if path.exists() or path.suffix != ".npz":
        raise UserError(f"--save {path} {'exists' if path.exists() else 'must end in .npz'}: name another file")
    model, arrays = opened.model, {}
    if dataset is None or dataset in DATASETS:
        data = open_test_data(model, opened.checkpoint, opened.path, data_dir, dataset, hold_out)
        images, y, classes = data.test_images, data.test_labels, data.classes
    else:
        pictures = read_pictures(Path(dataset), image_size_of(model), model.config["channels"])
        classes, y = np.unique(pictures.labels, return_inverse=True)
        images, y, arrays["name"] = pictures.images, torch.from_numpy(y).long(), np.array(pictures.names)
        if images[0].numel() != model.config["input_size"]:
            raise UserError(f"the model is for images of {model.config['input_size']} values, not {images[0].numel()}")
    arrays["label"] = np.array([str(classes[i]) for i in y.tolist()])
    encoded = encode_images(model, images, y, opened.binarize, nll_samples, seed)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays, **{name: values.float().numpy() for name, values in encoded.items()})
    path.parent.mkdir(parents=True, exist_ok=True)
    utils.write_atomically(path, buffer.getbuffer())
    return len(images)


@in_eval_mode
def sample_images(model: VAE, y: Tensor, temperature: float = 1.0, draw_pixels: bool = False, seed: int = 0) -> Tensor:
    """One image for each label y (n,), of a draw of the prior: the pixels' means, or drawn pixels, (n, D) in [0, 1].

    temperature scales the standard deviation of a normal prior; below 1, samples are plainer and vary less. Raises
    UserError for another prior. Reseeds PyTorch.
    """
    torch.manual_seed(seed)
    p = model.prior(y)
    if temperature != 1:
        if not isinstance(p, DiagonalNormal):
            raise UserError(f"--temperature is for a normal prior, which {type(model).__name__} lacks")
        p = DiagonalNormal(p.mu, p.logvar + 2 * math.log(temperature))
    likelihood = model.likelihood(p.sample(() if p.batch_shape else y.shape), y)
    return likelihood.sample() if draw_pixels else likelihood.mean


def write_samples(opened: OpenedRun, dataset: ImageData, n: int, label: str | None = None, **how: Any) -> Path:
    """Writes n images from the prior, 00000.png and so on, into a new folder `samples`. `how` is sample_images'.

    They are of one class, by its name, or of all in turn. Raises UserError for an unknown label or an existing folder,
    and OSError.
    """
    from PIL import Image

    classes = dataset.classes
    if label is not None and label not in classes:
        raise UserError(f"--label must be one of {', '.join(classes)}, not {label}")
    folder = opened.out_dir / "samples"
    if folder.exists():
        raise UserError(f"{folder} exists: delete it, or name another --out-dir")
    y = torch.arange(n) % len(classes) if label is None else torch.full((n,), classes.index(label))
    images = sample_images(opened.model, y.to(next(opened.model.parameters()).device), **how)
    pixels = (255 * images.float().cpu()).round().byte().view(n, *dataset.shape).permute(0, 2, 3, 1)
    folder.mkdir(parents=True)
    for i, image in enumerate(pixels.numpy()):
        Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(folder / f"{i:05d}.png")
    return folder


def compare_runs(runs: list[str], out_dir: str | Path) -> Path:
    """Writes compared.png, with the runs' test losses. Each is named by the options in which they differ.

    Raises UserError for a file that is not a run, and OSError.
    """
    paths = [utils.checkpoint_path(run) for run in runs]
    checkpoints = [utils.read_checkpoint(path) for path in paths]
    options = [checkpoint.get("options", {}) | {"class": checkpoint.get("class")} for checkpoint in checkpoints]
    different = [name for name in options[0] if any(other.get(name) != options[0][name] for other in options)]
    histories = {}
    for path, checkpoint, given in zip(paths, checkpoints, options, strict=True):
        if not checkpoint.get("history"):
            raise UserError(f"{path} has no history of a training run")
        how = ", ".join(f"{name} {given.get(name)}" for name in different)
        histories[how if how not in histories else f"{path.parent.name} {how}"] = checkpoint["history"]
    path = Path(out_dir) / "compared.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(draw_comparison(histories), path)
    return path


def add_nll_samples(parser: utils.ArgumentParser) -> None:
    """Adds the option --nll-samples to a command."""
    help = "importance samples for each image"
    parser.add_argument("--nll-samples", type=utils.count, default=NLL_SAMPLES, help=help)


@utils.command
def main() -> None:
    parser = utils.ArgumentParser(description=__doc__)
    parser.add_argument("run", nargs="?", default="runs", help="run folder, checkpoint file, or folder of runs")
    parser.add_argument("--dataset", help="test set: a name or path, as for train.py (default: the run's, else auto)")
    parser.add_argument("--data-dir", default="data", help="where data sets are read and downloaded")
    parser.add_argument(
        "--binarize", choices=BINARIZE, help="input and target (default: the run's, else the model's usual)"
    )
    hold_out = "test on the last N training images, or with 0 on the test set (default: as in training)"
    parser.add_argument("--hold-out", type=utils.number(int, 0, 2**31), help=hold_out)
    add_nll_samples(parser)
    parser.add_argument("--device", choices=utils.DEVICES, default="auto", help="where to compute")
    parser.add_argument("--out-dir", help="where to write (default: the run folder, or FILE/ for FILE.pt)")
    parser.add_argument("--seed", type=utils.number(int, 0, 2**40), default=0, help="of the draws of z")
    add = parser.add_argument_group("instead of metrics and pictures").add_argument
    add(
        "--save",
        metavar="FILE.npz",
        type=Path,
        help="write mu, logvar, label, neg_elbo and nll of each test image; of all images, if --dataset is a path",
    )
    add("--samples", type=utils.count, help="write as many images from the prior into a folder called samples")
    add("--label", help="of the samples, for a conditional model (default: all in turn)")
    add("--temperature", type=utils.number(float, 1e-3, 1e3), help="scale of the prior's deviation, for the samples")
    add("--draw-pixels", action="store_true", help="draw the samples' pixels too, instead of showing their means")
    add("--compare", nargs="+", metavar="RUN", help="draw these runs' test losses into one picture, compared.png")
    args = parser.parse_args()
    how = {name: value for name in ("label", "temperature", "draw_pixels") if (value := getattr(args, name))}
    if how and not args.samples:
        parser.error("--label, --temperature and --draw-pixels are for --samples")
    if args.compare:
        print(f"wrote {compare_runs(args.compare, args.out_dir or '.')}")
    elif args.save or args.samples:
        opened = open_run(args.run, None, args.binarize, args.device, args.out_dir)
        if args.save:
            images = args.dataset, args.data_dir, args.hold_out
            number = save_encoded(args.save, opened, *images, args.nll_samples, args.seed)
            print(f"wrote {args.save}: {number:,} images")
        if args.samples:
            images = args.data_dir, args.dataset, args.hold_out
            dataset = open_test_data(opened.model, opened.checkpoint, opened.path, *images)
            print(f"wrote {write_samples(opened, dataset, args.samples, seed=args.seed, **how)}")
    else:
        where = {"device": args.device, "out_dir": args.out_dir, "seed": args.seed, "hold_out": args.hold_out}
        evaluate_run(args.run, None, args.dataset, args.data_dir, args.binarize, args.nll_samples, **where)


if __name__ == "__main__":
    main()
