"""Metrics and pictures of a trained VAE.

    python evaluate.py                                # the newest run in runs/
    python evaluate.py runs/001-mnist-z20
    python evaluate.py somewhere/checkpoint.pt --dataset mnist --binarize threshold

Writes metrics.json and the pictures beside the checkpoint. All losses are in nats per image.
"""

import argparse
import io
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

try:
    import torch
    from torch import Tensor
    from tqdm import tqdm

    import utils
    from model import VAE, bernoulli_log_likelihood, kl_divergence, log_importance_weights
    from utils import Dataset, UserError
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    print(f"evaluate.py: error: the package {error.name} is missing: pip install -r requirements.txt", file=sys.stderr)
    sys.exit(2)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# ---------------------------------------------------------------------------------------------------------------------
# Metrics


@torch.no_grad()
def compute_elbo(model: VAE, inputs: Tensor, targets: Tensor, batch_size: int = 1000) -> dict[str, float]:
    """The negative ELBO and its two terms, with one z an image: inputs and targets (N, D) -> nats per image."""
    bce = kl = 0.0
    for x, target in zip(inputs.split(batch_size), targets.split(batch_size), strict=True):
        z, logvar, mu = model.encode(x)
        bce -= bernoulli_log_likelihood(model.decoder.logits(z), target).sum().item()
        kl += kl_divergence(logvar, mu).sum().item()
    return {"neg_elbo": (bce + kl) / len(inputs), "bce": bce / len(inputs), "kl": kl / len(inputs)}


@torch.no_grad()
def estimate_nll(
    model: VAE, inputs: Tensor, targets: Tensor, num_samples: int = 100, seed: int = 0, batch_size: int = 200
) -> Tensor:
    """-log p(target) by importance sampling from q(z|input) (Burda et al. 2016, eq. 8): (N, D) -> (N,), in nats.

    A seed gives the same figures whatever the batch size, and memory does not grow with the number of samples.
    """
    posteriors = [model.encode(x)[1:] for x in inputs.split(batch_size)]
    logvar, mu = (torch.cat(parts) for parts in zip(*posteriors, strict=True))
    generator = torch.Generator(mu.device).manual_seed(seed)
    log_sums = torch.full((len(inputs),), -math.inf, device=mu.device)  # of the weights so far
    with tqdm(total=num_samples, desc="nll", unit=" samples", leave=False, disable=None) as progress:
        for chunk in torch.arange(num_samples).split(10):
            eps = torch.randn(len(chunk), *mu.shape, generator=generator, device=mu.device)
            for i in torch.arange(len(inputs), device=mu.device).split(batch_size):
                log_weights = log_importance_weights(model.decoder, targets[i], logvar[i], mu[i], eps[:, i])
                log_sums[i] = log_sums[i].logaddexp(log_weights.logsumexp(0))
            progress.update(len(chunk))
    return math.log(num_samples) - log_sums


@torch.no_grad()
def count_active_units(model: VAE, inputs: Tensor, threshold: float = 0.01) -> int:
    """The latents whose posterior mean varies over the data by more than threshold (Burda et al. 2016)."""
    return int((model.encode(inputs)[2].var(0) > threshold).sum())


def evaluate(
    model: VAE, images: Tensor, binarize: str = "dynamic", nll_samples: int = 100, seed: int = 0
) -> dict[str, Any]:
    """All metrics of a model on uint8 images (N, input_size) that are on its device. Reseeds PyTorch."""
    torch.manual_seed(seed)
    inputs, targets = utils.binarize_test_set(images, binarize)
    return {
        **compute_elbo(model, inputs, targets),
        "nll": estimate_nll(model, inputs, targets, nll_samples, seed).mean().item(),
        "nll_samples": nll_samples,
        "active_units": count_active_units(model, inputs),
        "num_images": len(images),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Pictures: every draw_ function returns a matplotlib figure, which a notebook shows and save_figure writes


def draw_reconstructions(model: VAE, dataset: Dataset, binarize: str, caption: str) -> "Figure":
    """One test image of each class, what the encoder was given of it, and its reconstruction."""
    labels = dataset.test_labels
    images = dataset.test_images[[int((labels == label).nonzero()[0]) for label in range(len(dataset.classes))]]
    inputs, _ = utils.binarize_test_set(images, binarize)
    rows = {"image": images / 255, "input": inputs, "reconstruction": model.reconstruct(inputs)}
    if binarize != "dynamic":
        del rows["input"]  # the image as it is
    figure, axes = _new_figure(len(images), len(rows), f"Reconstructions of test images\n{caption}")
    _show_tiles(axes, torch.cat(list(rows.values())), len(rows))
    _label_tiles(axes, rows=list(rows), columns=dataset.classes)
    return figure


def draw_prior_samples(model: VAE, caption: str, seed: int = 0) -> "Figure":
    """A hundred decoded draws of the prior, always the same ones for a seed."""
    device = next(model.parameters()).device
    z = torch.randn(100, model.config["latent_size"], generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        images = model.decode(z.to(device))
    figure, axes = _new_figure(10, 10, f"Samples from the prior\n{caption}")
    _show_tiles(axes, images, 10)
    return figure


def draw_interpolations(model: VAE, dataset: Dataset, binarize: str, caption: str) -> "Figure":
    """Straight walks in latent space between the posterior means of test images of different classes."""
    labels, steps = dataset.test_labels, 11
    pairs = [(label, (label + 5) % len(dataset.classes)) for label in range(5)]
    ends = [int((labels == label).nonzero()[-1]) for pair in pairs for label in pair]
    inputs, _ = utils.binarize_test_set(dataset.test_images[ends], binarize)
    with torch.no_grad():
        start, end = model.encode(inputs)[2].view(len(pairs), 2, 1, -1).unbind(1)
        z = torch.lerp(start, end, torch.linspace(0, 1, steps, device=start.device)[:, None])
        images = model.decode(z).flatten(0, 1)
    figure, axes = _new_figure(steps, len(pairs), f"Walks between test images in latent space\n{caption}")
    _show_tiles(axes, images, len(pairs))
    names = [f"{dataset.classes[a]} to {dataset.classes[b]}" for a, b in pairs]
    _label_tiles(axes, rows=names, columns=[f"{step / (steps - 1):.1f}" for step in range(steps)])
    return figure


def draw_latent_space(model: VAE, dataset: Dataset, binarize: str, caption: str) -> "Figure":
    """The test images' posterior means coloured by class: on the first two principal components above two latents."""
    import matplotlib

    inputs, _ = utils.binarize_test_set(dataset.test_images, binarize)
    with torch.no_grad():
        mu = model.encode(inputs)[2].float().cpu()
    names = [f"$z_{i + 1}$" for i in range(mu.shape[1])]
    if mu.shape[1] > 2:
        centred = mu - mu.mean(0)
        _, singular_values, directions = torch.linalg.svd(centred, full_matrices=False)
        mu = centred @ directions[:2].T
        shares = singular_values**2 / (singular_values**2).sum()
        names = [f"principal component {i + 1} ({shares[i]:.0%} of the variance)" for i in range(2)]
    elif mu.shape[1] == 1:
        mu, names = torch.cat([mu, torch.zeros_like(mu)], 1), [*names, ""]

    figure, axes = _new_figure(8, 8, f"Posterior means of the test images\n{caption}")
    colors = matplotlib.color_sequences["petroff10"]  # told apart by the colour-blind too (arXiv 2107.02270)
    labels = dataset.test_labels.cpu()
    axes.scatter(*mu.T.numpy(), s=4, c=[colors[label] for label in labels], alpha=0.6, linewidths=0)
    for label, (name, color) in enumerate(zip(dataset.classes, colors, strict=True)):
        box = {"boxstyle": "round,pad=0.2", "facecolor": color, "edgecolor": "white"}
        middle = mu[labels == label].median(0).values.tolist()
        axes.annotate(name, middle, ha="center", va="center", color="white", weight="bold", bbox=box)
    axes.set(xlabel=names[0], ylabel=names[1])
    return figure


def draw_manifold(model: VAE, caption: str, steps: int = 20) -> "Figure":
    """A two-dimensional latent space decoded at equal quantiles of the prior (Kingma & Welling 2014, figure 4)."""
    device = next(model.parameters()).device
    values = torch.special.ndtri((torch.arange(steps) + 0.5) / steps)
    with torch.no_grad():
        z = torch.cartesian_prod(values.flip(0), values).flip(1)  # z_2 upwards, z_1 to the right
        images = model.decode(z.to(device))
    figure, axes = _new_figure(steps, steps, f"Images decoded at equal quantiles of the prior\n{caption}")
    _show_tiles(axes, images, steps)
    ticks = [f"{value:.1f}" for value in values.tolist()]
    _label_tiles(axes, rows=ticks[::-1], columns=ticks)
    axes.set(xlabel="$z_1$", ylabel="$z_2$")
    return figure


def save_figure(figure: "Figure", path: Path) -> None:
    """Writes a figure as PNG, atomically. Raises OSError."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    utils.write_atomically(path, buffer.getvalue())


def draw_all(model: VAE, dataset: Dataset, binarize: str, caption: str) -> Iterator[tuple[str, "Figure"]]:
    """The file name and figure of each picture."""
    yield "reconstructions.png", draw_reconstructions(model, dataset, binarize, caption)
    yield "prior_samples.png", draw_prior_samples(model, caption)
    yield "interpolations.png", draw_interpolations(model, dataset, binarize, caption)
    yield "latent_space.png", draw_latent_space(model, dataset, binarize, caption)
    if model.config["latent_size"] == 2:
        yield "manifold.png", draw_manifold(model, caption)


def _new_figure(columns: float, rows: float, title: str) -> tuple["Figure", Any]:
    from matplotlib.figure import Figure  # not pyplot: needs no display, and nothing to close

    figure = Figure(figsize=(0.5 * columns + 1.6, 0.5 * rows + 1), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=10)
    return figure, axes


def _show_tiles(axes: Any, images: Tensor, rows: int) -> None:
    """Shows (rows * columns, D) square images in [0, 1] as one picture, row by row."""
    side = math.isqrt(images.shape[1])
    tiles = images.float().cpu().view(rows, -1, side, side).permute(0, 2, 1, 3).reshape(rows * side, -1)
    axes.imshow(tiles.numpy(), cmap="gray", vmin=0, vmax=1)
    axes.set(xticks=[], yticks=[])


def _label_tiles(axes: Any, rows: list[str], columns: list[str]) -> None:
    side = axes.images[0].get_array().shape[0] / len(rows)
    axes.set_yticks([(row + 0.5) * side for row in range(len(rows))], rows, fontsize=8)
    axes.set_xticks([(column + 0.5) * side for column in range(len(columns))], columns, fontsize=8)
    axes.tick_params(length=0)


# ---------------------------------------------------------------------------------------------------------------------
# The command


def parse_args() -> argparse.Namespace:
    parser = utils.ArgumentParser(description=__doc__)
    parser.add_argument("run", nargs="?", help="run folder or checkpoint file (default: the newest run in runs/)")
    parser.add_argument("--dataset", choices=utils.DATASETS, help="test set (default: the run's, else auto)")
    parser.add_argument(
        "--data-dir", default="data", help="where data sets are read and downloaded (default: %(default)s)"
    )
    parser.add_argument(
        "--binarize", choices=utils.BINARIZE, help="input and target (default: the run's, else dynamic)"
    )
    parser.add_argument(
        "--nll-samples", type=int, default=100, help="importance samples an image (default: %(default)s)"
    )
    parser.add_argument("--device", choices=utils.DEVICES, default="auto", help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws of z (default: %(default)s)")
    args = parser.parse_args()
    if args.nll_samples < 1:
        raise UserError(f"--nll-samples must be a whole number above 0, not {args.nll_samples}")
    if args.seed < 0:
        raise UserError(f"--seed must be a whole number, 0 or above, not {args.seed}")
    return args


@utils.command
def main() -> None:
    args = parse_args()
    device = utils.choose_device(args.device)
    path = utils.checkpoint_path(args.run or utils.newest_run("runs"))
    model, checkpoint = utils.load_checkpoint(path)
    options = checkpoint.get("options", {})  # a checkpoint of the original repository has none
    binarize = args.binarize or options.get("binarize", "dynamic")
    dataset = utils.load_dataset(args.dataset or options.get("dataset", "auto"), args.data_dir)
    if model.config["input_size"] != dataset.test_images.shape[1]:
        sizes = f"{model.config['input_size']} values an image, {dataset.name} has {dataset.test_images.shape[1]}"
        raise UserError(f"{path} is a model of {sizes}")

    dataset = dataset.to(device)
    model = model.to(device)
    metrics = evaluate(model, dataset.test_images, binarize, args.nll_samples, args.seed)
    metrics |= {"dataset": dataset.name, "binarize": binarize}
    print_metrics(metrics, path)
    utils.write_atomically(path.with_name("metrics.json"), (json.dumps(metrics, indent=2) + "\n").encode())
    caption = f"{dataset.name}, {model.config['latent_size']} latents"
    if "epoch" in checkpoint:
        caption += f", epoch {checkpoint['epoch']}"
    for name, figure in draw_all(model, dataset, binarize, caption):
        save_figure(figure, path.with_name(name))
        print(f"wrote {path.with_name(name)}")


def print_metrics(metrics: dict[str, Any], path: Path) -> None:
    print(f"{path}: {metrics['num_images']:,} test images of {metrics['dataset']}, binarize {metrics['binarize']}")
    if metrics["binarize"] == "none":
        print(
            "Targets are gray: the figures below are cross-entropies, not likelihoods, and compare with no other mode"
        )
    print(f"  neg_elbo      {metrics['neg_elbo']:8.2f} nats per image")
    print(f"    bce         {metrics['bce']:8.2f}")
    print(f"    kl          {metrics['kl']:8.2f}")
    print(f"  nll           {metrics['nll']:8.2f} nats per image, {metrics['nll_samples']} importance samples")
    print(f"  active_units  {metrics['active_units']:8d} latents")


if __name__ == "__main__":
    main()
