"""Pictures of what a VAE learned.

Every draw_ function returns a matplotlib figure, which a notebook shows and save_figure writes.
"""

import contextlib
import io
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributions import Distribution

import runs
from measure import PerImage, TestSet, in_eval_mode, is_active
from model import VAE, DiagonalNormal

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # imported where it is used: it takes a third of a second

BLUE = "#3f90da"
ORANGE = "#ffa90e"
GRAY = "#94a4a2"
BINARIZED = {"dynamic": "binarized by sampling", "threshold": "binarized by a threshold", "none": "not binarized"}
TERMS = ("test_reconstruction", "test_kl")  # of test_loss, in metrics.csv


@in_eval_mode
def draw_reconstructions(model: VAE, test_set: TestSet, caption: str) -> "Figure":
    """Ten test images, of as many different classes as possible, with the encoder's input and the reconstructions."""
    few = test_set.take(one_of_each_class(test_set.labels.tolist(), 10))
    images = few.images / 255
    rows = {"image": images, "input": few.inputs, "reconstruction": model.reconstruct(few.inputs, few.labels)}
    if torch.equal(few.inputs, images):
        del rows["input"]
    columns = [few.classes[label] for label in few.labels] if len(few.classes) > 1 else None
    title = f"Reconstructions of test images\n{caption}"
    return draw_tiles(torch.cat(list(rows.values())), len(rows), few.shape, title, list(rows), columns)


@in_eval_mode
def draw_prior_samples(model: VAE, test_set: TestSet, caption: str, seed: int = 0) -> "Figure":
    """The decoded means of a hundred draws of the prior, the same for the same seed. Each row has one label."""
    device = next(model.parameters()).device
    y = torch.arange(10, device=device).repeat_interleave(10) % len(test_set.classes)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        images = model.sample(100, y)
    return draw_tiles(images, 10, test_set.shape, f"Samples from the prior\n{caption}")


@in_eval_mode
def draw_completions(model: VAE, test_set: TestSet, caption: str, draws: int = 5) -> "Figure":
    """The upper half of ten test images, several ways in which the model completes it, and the whole images."""
    few = test_set.take(one_of_each_class(test_set.labels.tolist(), 10))
    _, height, _ = few.shape
    seen = torch.arange(height, device=few.inputs.device)[:, None] < height // 2
    repeated = few.take(list(range(len(few.labels))) * draws)
    with torch.random.fork_rng([seen.device] if seen.is_cuda else []):
        torch.manual_seed(0)
        completed = model.complete(repeated.targets, seen, repeated.labels, steps=60)
    given = torch.where(seen, few.targets, 0.5)
    images = torch.cat([given, completed, few.targets])
    names = ["given", *(f"completed {i + 1}" for i in range(draws)), "image"]
    title = f"The lower half of test images, drawn given the upper half\n{caption}"
    return draw_tiles(images, draws + 2, few.shape, title, names)


@in_eval_mode
def draw_interpolations(model: VAE, test_set: TestSet, mu: Tensor, caption: str) -> "Figure":
    """Walks between test images' posterior means mu (N, latent_size), of different classes if there are any.

    The images themselves stand at both ends.
    """
    ends = one_of_each_class(test_set.labels.tolist(), 10, backwards=True)
    half = len(ends) // 2
    first = ends[:half]
    last = ends[-half:]
    y1 = test_set.labels[first]
    y2 = test_set.labels[last]
    shares = [step / 10 for step in range(11)]
    z = torch.stack([torch.lerp(mu[first], mu[last], share) for share in shares], 1)  # (half, 11, latent_size)
    y = torch.stack([y1 if share < 0.5 else y2 for share in shares], 1)
    walks = model.decode(z.flatten(0, 1), y.flatten()).view(half, len(shares), -1)
    images = test_set.images.flatten(1) / 255
    tiles = torch.cat([images[first, None], walks, images[last, None]], 1).flatten(0, 1)
    classes = test_set.classes
    names = [f"{classes[start]} to {classes[end]}" for start, end in zip(y1, y2, strict=True)]
    title = f"Decoded walks between test images' posterior means\n{caption}"
    columns = ["image", *map(str, shares), "image"]
    figure = draw_tiles(tiles, half, test_set.shape, title, names if len(classes) > 1 else None, columns)
    figure.axes[0].set_xlabel("share of the way")
    return figure


def draw_latent_space(
    test_set: TestSet, mu: Tensor, caption: str, training: tuple[Tensor, Tensor] | None = None
) -> "Figure":
    """The test images' posterior means mu (N, latent_size), coloured by class.

    Above two latents, they are shown by their first two principal components. `training` are labels (M,) and means (M,
    latent_size) of training images, which are shown as crosses.
    """
    labels = test_set.labels
    means = mu
    if training:
        labels = torch.cat([labels, training[0]])
        means = torch.cat([means, training[1]])
    labels = labels.cpu()
    points, names = to_plane(means.float().cpu(), labels)
    others = f", and of {len(training[0]):,} training images (crosses)" if training else ""
    figure, axes = _new_figure(8, 8, f"Posterior means of the test images{others}\n{caption}")
    classes = test_set.classes
    num_classes = len(classes)
    palette = class_colors(num_classes)
    colors = [palette[label] for label in labels]
    size = min(max(4, 4000 / len(labels)), 60)  # few points are large, so that they can be seen
    num_test = len(mu)
    if training:
        axes.scatter(*points[num_test:].T.numpy(), s=size, c=colors[num_test:], alpha=0.5, marker="x")
    axes.scatter(*points[:num_test].T.numpy(), s=size, c=colors[:num_test], alpha=0.6, linewidths=0)
    for name, color in zip(classes[:40], palette, strict=False):  # the legend has room for as many
        axes.scatter([], [], color=color, label=f" {verbatim(name)}")  # matplotlib hides labels that begin with _
    title = f"the first 40 of {num_classes} classes" if num_classes > 40 else None
    ncols, fontsize = (1, 10) if num_classes <= 20 else (2, 7)
    place = {"loc": "center left", "bbox_to_anchor": (1, 0.5), "frameon": False}
    if num_classes > 1:
        axes.legend(title=title, ncols=ncols, fontsize=fontsize, **place)
    axes.set(xlabel=names[0], ylabel=names[1])
    return figure


def to_plane(means: Tensor, labels: Tensor) -> tuple[Tensor, list[str]]:
    """Points (N, 2) for posterior means (N, latent_size), and the names of the two axes."""
    if means.shape[1] == 1:
        return torch.cat([means, labels[:, None]], 1), ["$z_1$", "class"]
    if means.shape[1] == 2:
        return means, ["$z_1$", "$z_2$"]
    means = means - means.mean(0)
    _, singular_values, directions = torch.linalg.svd(means, full_matrices=False)
    shares = singular_values**2 / (singular_values**2).sum()
    names = [f"principal component {i + 1} ({shares[i]:.0%} of the variance)" for i in range(2)]
    return means @ directions[:2].T, names


def draw_latent_usage(mu: Tensor, kl_by_latent: Tensor, caption: str) -> "Figure":
    """The mean KL of each latent over the images, sorted, from posterior means and KLs (N, latent_size)."""
    kl, order = kl_by_latent.mean(0).cpu().sort(descending=True)
    active = is_active(mu).cpu()[order]
    title = f"KL of each latent dimension, over the test images\n{caption}"
    figure, axes = _new_figure(min(max(8, 0.4 * len(kl)), 40), 6, title)
    for name, color, chosen in (("active", BLUE, active), ("not active", GRAY, ~active)):
        if chosen.any():
            bars = chosen.nonzero().flatten().tolist()
            axes.bar(bars, kl[chosen].tolist(), color=color, label=f"{name}: {len(bars)}")
    named = order.tolist() if len(kl) <= 50 else []  # there is room for no more
    axes.set_xticks(range(len(named)), [str(i + 1) for i in named], fontsize=7)
    axes.set(xlabel="latent dimension, by its KL", ylabel="KL, nats per image", xlim=(-0.6, len(kl) - 0.4))
    axes.set_ylim(0, max(0.1, 1.05 * kl.max().item()))  # so an unused latent looks flat
    axes.legend(frameon=False)
    return figure


def draw_traversals(model: VAE, test_set: TestSet, mu: Tensor, kl_by_latent: Tensor | None, caption: str) -> "Figure":
    """What the ten latents of largest KL do: each row moves one of them over the prior, around one test image.

    Without a KL for each latent, they are those whose posterior means mu (N, latent_size) vary most.
    """
    sizes = mu.var(0) if kl_by_latent is None else kl_by_latent.mean(0)
    order = sizes.argsort(descending=True)[:10].tolist()
    deviations = torch.arange(-3.0, 4.0, device=mu.device)
    images = decode_traversals(model, mu[:1], order, deviations, test_set.labels[:1])
    title = f"One latent at a time moved over the prior, around a test image\n{caption}"
    rows = [f"latent {i + 1}" for i in order]
    columns = [f"{value:.0f}" for value in deviations.tolist()]
    figure = draw_tiles(images, len(order), test_set.shape, title, rows, columns)
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
def draw_least_likely(model: VAE, test_set: TestSet, nll: Tensor, caption: str) -> "Figure":
    """The ten test images of largest nll (N,), in nats, with their reconstructions."""
    chosen = nll.argsort(descending=True)[:10].tolist()
    few = test_set.take(chosen)
    images = torch.cat([few.inputs, model.reconstruct(few.inputs, few.labels)])
    title = f"The least likely test images, and their nll in nats\n{caption}"
    columns = [f"{value:,.0f}" for value in nll[chosen].tolist()]
    return draw_tiles(images, 2, few.shape, title, ["image", "reconstruction"], columns)


def draw_manifold(model: VAE, shape: tuple[int, int, int], caption: str, steps: int = 20) -> "Figure":
    """A two-dimensional latent space decoded at equal quantiles of the prior (Kingma & Welling 2014, figure 4)."""
    images, (x, y) = decode_manifold(model, steps)
    rows, columns = ([f"{value:.1f}" for value in values] for values in (y, x))
    title = f"Images decoded at equal quantiles of the prior\n{caption}"
    figure = draw_tiles(images, steps, shape, title, rows, columns)
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


def draw_comparison(histories: list[tuple[str, list[dict[str, float]]]]) -> "Figure":
    """The test loss and its two terms over the epochs, of several runs with their names."""
    figure, panels = _new_panels("Test set, after each epoch", max(len(history) for _, history in histories))
    for (name, history), color in zip(histories, class_colors(len(histories)), strict=True):
        for axes, column in zip(panels, ("test_loss", *TERMS), strict=True):
            _plot_column(axes, history, column, color, name)
    figure.set_figheight(3 + 0.2 * sum(1 + name.count("\n") for name, _ in histories))
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
    """A colour for each class. The colour-blind can tell up to ten apart too (arXiv 2107.02270)."""
    from matplotlib import color_sequences, colormaps

    if num_classes <= 10:
        colors = list(color_sequences["petroff10"])
        colors[3] = "#007a87"  # in place of its two grays, which look alike in small dots
        colors[8] = "#e699ff"
        return colors[:num_classes]
    return list(colormaps["turbo"](torch.linspace(0, 1, num_classes).tolist()))


def one_of_each_class(labels: list[int], count: int, backwards: bool = False) -> list[int]:
    """The first `count` indices, taken from the classes in turn: the first image of each, then the second of each."""
    order = range(len(labels))[:: -1 if backwards else 1]
    by_class = ([i for i in order if labels[i] == label] for label in sorted(set(labels)))
    return [i for turn in itertools.zip_longest(*by_class) for i in turn if i is not None][:count]


def describe(model: VAE, dataset: str, binarize: str, epoch: int | None = None, num_held_out: int = 0) -> str:
    """The pictures' caption: what was trained on what, and what it was tested on if not the test set."""
    is_logistic = type(model).likelihood is VAE.likelihood and model.config["likelihood"] == "logistic"
    pixels = "with a logistic likelihood" if is_logistic else BINARIZED[binarize]
    kind = "" if type(model) is VAE else f"{type(model).__name__}, "
    after = "" if epoch is None else f", epoch {epoch}"
    held_out = f", tested on {num_held_out:,} held-out training images" if num_held_out else ""
    return f"{kind}{dataset} {pixels}, {model.config['latent_size']} latents{after}{held_out}"


def save_figure(figure: "Figure", path: Path, notes: dict[str, str] | None = None) -> None:
    """Writes a figure as PNG, atomically, with notes that the file carries unseen. Raises OSError."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata=notes)
    runs.write_atomically(path, buffer.getvalue())


def draw_all(
    model: VAE, test_set: TestSet, found: PerImage, caption: str, training: tuple[Tensor, Tensor] | None = None
) -> Iterator[tuple[str, "Figure"]]:
    """The file name and figure of each picture that applies to this model, from what it says about the test set.

    `training` are labels and posterior means of training images to show beside the test images'.
    """
    mu = found.mu
    yield "reconstructions.png", draw_reconstructions(model, test_set, caption)
    yield "prior_samples.png", draw_prior_samples(model, test_set, caption)
    with contextlib.suppress(NotImplementedError):  # the likelihood cannot be drawn from
        yield "completions.png", draw_completions(model, test_set, caption)
    yield "interpolations.png", draw_interpolations(model, test_set, mu, caption)
    yield "latent_space.png", draw_latent_space(test_set, mu, caption, training)
    yield "traversals.png", draw_traversals(model, test_set, mu, found.kl_by_latent, caption)
    if found.nll is not None:
        yield "least_likely.png", draw_least_likely(model, test_set, found.nll, caption)
    if found.kl_by_latent is not None:
        yield "latent_usage.png", draw_latent_usage(mu, found.kl_by_latent, caption)
    if mu.shape[1] == 2:
        yield "manifold.png", draw_manifold(model, test_set.shape, caption)


def _new_figure(columns: float, rows: float, title: str) -> tuple["Figure", Any]:
    from matplotlib.figure import Figure  # not pyplot, which needs a backend

    width = max(7, 0.5 * columns + 1.6)  # wide enough for the title
    figure = Figure(figsize=(width, 0.5 * rows + 1), layout="constrained")
    axes = figure.subplots()
    axes.set_title(verbatim(title), fontsize=10)
    return figure, axes
