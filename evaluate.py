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

import torch
from torch import Tensor
from tqdm import tqdm

import utils
from data import BINARIZE, DATASETS, ImageData, binarize_test_set, check_bytes, load_dataset
from model import VAE, DiagonalNormal, kl_by_latent
from step import choose_precision, matmul_precision
from utils import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # imported where it is used: it takes a third of a second

NLL_SAMPLES = 100
BLUE, ORANGE, GRAY = "#3f90da", "#ffa90e", "#94a4a2"


class Examples(NamedTuple):
    """Binarized images to test a model on, and their labels."""

    inputs: Tensor  # (N, C, H, W) in [0, 1], for the encoder
    targets: Tensor  # of the same shape, for the likelihood
    labels: Tensor  # (N,) int64


def make_test_set(dataset: ImageData, binarization: str, device: torch.device | str = "cpu") -> Examples:
    """The test images of a data set in their one fixed binarization."""
    images, labels = dataset.test_images.to(device), dataset.test_labels.to(device)
    return Examples(*binarize_test_set(images, binarization), labels)


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


def evaluate(
    model: VAE,
    images: Tensor,
    binarize: str = "dynamic",
    nll_samples: int = NLL_SAMPLES,
    seed: int = 0,
    labels: Tensor | None = None,
) -> dict[str, Any]:
    """All metrics of a model on uint8 images (N, ...), with labels (N,) int64 if the model uses them. Reseeds PyTorch.

    In nats per image; a name with _se is a standard error over the images. nll is None where the targets are outside
    the likelihood's support, and kl_per_latent where a closed form is missing. Raises UserError for bad images.
    """
    check_bytes(images, "images")
    size = model.config["input_size"]
    if len(images) < 2 or images.dim() < 2 or images[0].numel() != size:
        raise UserError(f"the images must be two or more of {size} values each, not {tuple(images.shape)}")
    device = next(model.parameters()).device
    labels = torch.zeros(len(images), dtype=torch.int64) if labels is None else labels
    if not isinstance(labels, Tensor) or labels.shape != (len(images),) or labels.dtype != torch.int64:
        raise UserError(f"the labels must be a tensor ({len(images)},) of type int64, one for each image")
    test_set = Examples(*binarize_test_set(images.to(device), binarize), labels.to(device))
    return _measure(model, test_set, nll_samples, seed)


def _measure(model: VAE, test_set: Examples, nll_samples: int, seed: int) -> dict[str, Any]:
    if not isinstance(nll_samples, int) or nll_samples < 1:
        raise UserError(f"nll_samples must be a whole number, 1 or more, not {nll_samples}")
    torch.manual_seed(seed)
    reconstruction, kl = elbo_terms(model, test_set)
    means, by_latent = posterior_means(model, test_set)
    neg_elbo, num_images = reconstruction + kl, len(kl)
    nll = estimate_nll(model, test_set, nll_samples, seed) if is_likelihood(model, test_set) else None
    return {
        "neg_elbo": neg_elbo.mean().item(),
        "neg_elbo_se": neg_elbo.std().item() / math.sqrt(num_images),
        "reconstruction": reconstruction.mean().item(),
        "kl": kl.mean().item(),
        "kl_per_latent": None if by_latent is None else by_latent.mean(0).tolist(),
        "nll": None if nll is None else nll.mean().item(),
        "nll_se": None if nll is None else nll.std().item() / math.sqrt(num_images),
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
    columns = [dataset.classes[label] for label in y]
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
    p = model.prior(label)
    shares = (torch.arange(steps, device=label.device) + 0.5) / steps
    if isinstance(p, DiagonalNormal):
        x, y = p.mu.flatten()[:, None] + torch.exp(0.5 * p.logvar.flatten())[:, None] * torch.special.ndtri(shares)
    else:  # no formula: take those of 10,000 draws
        x, y = torch.quantile(p.sample((10_000,)).flatten(0, -2), shares, dim=0).T
    z = torch.cartesian_prod(y.flip(0), x).flip(1)
    return model.decode(z, label.expand(len(z))), (x.tolist(), y.flip(0).tolist())


def draw_curves(history: list[dict[str, float]], caption: str) -> "Figure":
    """Training and test loss over the epochs, and the test loss's two terms, from the rows of metrics.csv."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator

    figure = Figure(figsize=(9, 3), layout="constrained")
    figure.suptitle(verbatim(f"Training curves: {caption}"), fontsize=10)
    panels = {
        "loss": {"train_loss": "training set, as it was learned", "test_loss": "test set, after the epoch"},
        "reconstruction": {"test_reconstruction": "test set"},
        "KL": {"test_kl": "test set"},
    }
    epochs = [row["epoch"] for row in history]
    for axes, (title, columns) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for (column, label), color in zip(columns.items(), (ORANGE, BLUE)[-len(columns) :], strict=True):
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
    return f"{what}{dataset.name}, binarize {binarization}, latent size {model.config['latent_size']}{after}{held_out}"


def save_figure(figure: "Figure", path: Path) -> None:
    """Writes a figure as PNG, atomically. Raises OSError."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    utils.write_atomically(path, buffer.getvalue())


def draw_all(model: VAE, dataset: ImageData, test_set: Examples, caption: str) -> Iterator[tuple[str, "Figure"]]:
    """The file name and figure of each picture that applies to this model."""
    means, kl = posterior_means(model, Examples(*(part[:2] for part in test_set)))
    yield "reconstructions.png", draw_reconstructions(model, dataset, test_set, caption)
    yield "prior_samples.png", draw_prior_samples(model, dataset, caption)
    yield "interpolations.png", draw_interpolations(model, dataset, test_set, caption)
    yield "latent_space.png", draw_latent_space(model, dataset, test_set, caption)
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

    A checkpoint of a subclass of VAE needs a `model` of that class. dataset, binarize and hold_out (0: the test set)
    default to the run's, whose images must not have changed; hold_out to 0 if a data set is named. out_dir is the run
    folder, or a folder FILE for FILE.pt. Raises UserError for a bad value or file, and OSError.
    """
    device, path = utils.choose_device(device), utils.checkpoint_path(run)
    model, checkpoint = utils.load_checkpoint(path, model)
    options = checkpoint.get("options", {})  # a checkpoint of the original repository has none
    binarize = binarize or options.get("binarize", "dynamic")
    if binarize not in BINARIZE:
        raise UserError(f"binarize must be one of {', '.join(BINARIZE)}, not {binarize}")
    dataset = open_test_data(model, checkpoint, path, data_dir, dataset, hold_out)
    # FILE.pt gets a folder of its own, because several may lie in one folder, such as weights/
    out_dir = Path(out_dir or (path.parent if path.name == "checkpoint.pt" else path.with_suffix("")))
    out_dir.mkdir(parents=True, exist_ok=True)

    model, test_set = model.to(device), make_test_set(dataset, binarize, device)
    metrics = _measure(model, test_set, nll_samples, seed)
    metrics |= {"dataset": dataset.name, "hold_out": dataset.num_held_out, "binarize": binarize}
    caption = describe(dataset, binarize, model, checkpoint.get("epoch"))
    print_metrics(metrics, f"{path}: {caption}")
    utils.write_atomically(out_dir / "metrics.json", (json.dumps(metrics, indent=2) + "\n").encode())
    for name, figure in draw_all(model, dataset, test_set, caption):
        save_figure(figure, out_dir / name)
        print(f"wrote {out_dir / name}")
    return metrics


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
        is_folder = name not in DATASETS and Path(name).is_dir()
        image_size = math.isqrt(model.config["input_size"]) if is_folder else None
        dataset = load_dataset(name, data_dir, image_size, hold_out)
    check_images(model, dataset)
    if is_the_runs:
        check_same_images(checkpoint, dataset, path)
    return dataset


def check_kind(dataset: Any) -> None:
    """Raises UserError unless a data set is given by name, by path or as ImageData."""
    if not isinstance(dataset, str | Path | ImageData):
        raise UserError(f"dataset must be a name, a path or ImageData, not {type(dataset).__name__}")


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
    print(f"  active_units    {metrics['active_units']:8d} of {metrics['latent_size']} latents")


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
    parser.add_argument("--binarize", choices=BINARIZE, help="input and target (default: the run's, else dynamic)")
    hold_out = "test on the last N training images, or with 0 on the test set (default: as in training)"
    parser.add_argument("--hold-out", type=utils.number(int, 0, 2**31), help=hold_out)
    add_nll_samples(parser)
    parser.add_argument("--device", choices=utils.DEVICES, default="auto", help="where to compute")
    parser.add_argument("--out-dir", help="where to write (default: the run folder, or FILE/ for FILE.pt)")
    parser.add_argument("--seed", type=utils.number(int, 0, 2**40), default=0, help="of the draws of z")
    evaluate_run(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
