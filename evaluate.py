"""Metrics and pictures of a trained VAE.

    python evaluate.py                                # the newest run in runs/
    python evaluate.py runs/001-mnist-z20
    python evaluate.py somewhere/checkpoint.pt --dataset mnist --binarize threshold
    python evaluate.py --explorer                     # and a web page in which to walk about its latent space

Writes metrics.json and the pictures beside the checkpoint. All losses are in nats per image.
"""

import argparse
import base64
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
except KeyboardInterrupt:
    sys.exit(130)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# ---------------------------------------------------------------------------------------------------------------------
# Metrics


@torch.no_grad()
def elbo_terms(model: VAE, inputs: Tensor, targets: Tensor, batch_size: int = 1000) -> tuple[Tensor, Tensor]:
    """The negative ELBO's terms, with one z an image: inputs and targets (N, D) -> BCE (N,) and KL (N, latent)."""
    bces, kls = [], []
    for x, target in zip(inputs.split(batch_size), targets.split(batch_size), strict=True):
        z, logvar, mu = model.encode(x)
        bces.append(-bernoulli_log_likelihood(model.decoder.logits(z), target))
        kls.append(kl_divergence(logvar, mu))
    return torch.cat(bces), torch.cat(kls)


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
    total = torch.full_like(mu[:, 0], -math.inf, dtype=torch.promote_types(mu.dtype, torch.float32))
    bar = tqdm(total=num_samples, desc="nll", unit=" samples", leave=False, disable=None)
    with utils.fast_matmul(), bar as progress:
        for chunk in torch.arange(num_samples).split(10):
            eps = torch.randn(len(chunk), *mu.shape, generator=generator, device=mu.device, dtype=mu.dtype)
            for start in range(0, len(inputs), batch_size):
                i = slice(start, start + batch_size)
                log_weights = log_importance_weights(model.decoder, targets[i], logvar[i], mu[i], eps[:, i])
                total[i] = torch.logaddexp(total[i], log_weights.logsumexp(0))  # the log of all weights' sum so far
            progress.update(len(chunk))
    return math.log(num_samples) - total


@torch.no_grad()
def is_active(model: VAE, inputs: Tensor, threshold: float = 0.01) -> Tensor:
    """(latent,) bools: does the posterior mean vary over the data by more than threshold? (Burda et al. 2016)"""
    return model.encode(inputs)[2].var(0) > threshold


def evaluate(
    model: VAE, images: Tensor, binarize: str = "dynamic", nll_samples: int = 100, seed: int = 0
) -> dict[str, Any]:
    """All metrics of a model on uint8 images (N, input_size) that are on its device. Reseeds PyTorch.

    In nats per image; a name with _se is the standard error over the images.
    """
    torch.manual_seed(seed)
    inputs, targets = utils.binarize_test_set(images, binarize)
    bce, kl = elbo_terms(model, inputs, targets)
    neg_elbo = bce + kl.sum(1)
    nll = estimate_nll(model, inputs, targets, nll_samples, seed)
    return {
        "neg_elbo": neg_elbo.mean().item(),
        "neg_elbo_se": neg_elbo.std().item() / math.sqrt(len(images)),
        "bce": bce.mean().item(),
        "kl": kl.sum(1).mean().item(),
        "kl_per_latent": kl.mean(0).tolist(),
        "nll": nll.mean().item(),
        "nll_se": nll.std().item() / math.sqrt(len(images)),
        "nll_samples": nll_samples,
        "active_units": int(is_active(model, inputs).sum()),
        "num_images": len(images),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Pictures: every draw_ function returns a matplotlib figure, which a notebook shows and save_figure writes


def draw_reconstructions(model: VAE, dataset: Dataset, binarize: str, caption: str) -> "Figure":
    """One test image of each class that has any, what the encoder was given of it, and its reconstruction."""
    labels = dataset.test_labels.unique().tolist()
    images = dataset.test_images[[int((dataset.test_labels == label).nonzero()[0]) for label in labels]]
    inputs, _ = utils.binarize_test_set(images, binarize)
    rows = {"image": images / 255, "input": inputs, "reconstruction": model.reconstruct(inputs)}
    if binarize != "dynamic":
        del rows["input"]  # the image as it is
    figure, axes = _new_figure(len(images), len(rows), f"Reconstructions of test images\n{caption}")
    _show_tiles(axes, torch.cat(list(rows.values())), len(rows))
    _label_tiles(axes, rows=list(rows), columns=[dataset.classes[label] for label in labels])
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
    figure, axes = _new_figure(steps, len(pairs), f"Decoded walks between test images' posterior means\n{caption}")
    _show_tiles(axes, images, len(pairs))
    names = [f"{dataset.classes[a]} to {dataset.classes[b]}" for a, b in pairs]
    _label_tiles(axes, rows=names, columns=[f"{step / (steps - 1):.1f}" for step in range(steps)])
    axes.set_xlabel("share of the way")
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
    labels = dataset.test_labels.cpu()
    if mu.shape[1] == 1:
        mu, names = torch.cat([mu, labels[:, None]], 1), [*names, "class"]

    figure, axes = _new_figure(8, 8, f"Posterior means of the test images\n{caption}")
    colors = matplotlib.color_sequences["petroff10"]  # told apart by the colour-blind too (arXiv 2107.02270)
    axes.scatter(*mu.T.numpy(), s=4, c=[colors[label] for label in labels], alpha=0.6, linewidths=0)
    for name, color in zip(dataset.classes, colors, strict=False):
        axes.scatter([], [], color=color, label=name)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    axes.set(xlabel=names[0], ylabel=names[1])
    return figure


def draw_latent_usage(model: VAE, dataset: Dataset, binarize: str, caption: str) -> "Figure":
    """The mean KL of each latent dimension over the test images, sorted: what the encoder says through each."""
    inputs, targets = utils.binarize_test_set(dataset.test_images, binarize)
    kl = elbo_terms(model, inputs, targets)[1].mean(0).cpu()
    order = kl.argsort(descending=True)
    active = is_active(model, inputs).cpu()[order]
    figure, axes = _new_figure(
        max(8, 0.4 * len(kl)), 6, f"KL of each latent dimension, over the test images\n{caption}"
    )
    bars = {"active": ("#3f90da", active), "not active": ("#94a4a2", ~active)}
    positions = torch.arange(len(kl))
    for name, (color, chosen) in bars.items():
        if chosen.any():
            label = f"{name}: {int(chosen.sum())}"
            axes.bar(positions[chosen].tolist(), kl[order][chosen].tolist(), color=color, label=label)
    axes.set_xticks(positions.tolist(), [str(int(i) + 1) for i in order], fontsize=7)
    axes.set(xlabel="latent dimension, by its KL", ylabel="KL, nats per image", xlim=(-0.6, len(kl) - 0.4))
    axes.legend(frameon=False)
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


def make_explorer(model: VAE, dataset: Dataset, binarize: str, caption: str, num_points: int = 500) -> str:
    """A web page with the decoder in it, in which the latent space can be explored: assets/explorer.html, filled in.

    Floats lose their lowest byte, which moves a probability by less than 1e-4. Raises UserError for a single latent,
    for images that are not square, and for a decoder so large that the page would be too.
    """
    import matplotlib

    linear = list(model.decoder.children())
    if sum(layer.weight.numel() for layer in linear) > 1_200_000:
        raise UserError("the decoder has more than 1.2 million weights, too many for a web page")
    if model.config["latent_size"] < 2:
        raise UserError("the explorer needs two latents or more")
    if math.isqrt(linear[-1].out_features) ** 2 != linear[-1].out_features:
        raise UserError("the explorer shows square images only")

    def encode(values: Tensor) -> str:
        bits = values.detach().float().cpu().contiguous().view(torch.int32) + 0x80  # rounds to 24 bits
        return base64.b64encode(bits.view(torch.uint8).view(-1, 4)[:, 1:].contiguous().numpy()).decode()

    chosen = torch.linspace(0, len(dataset.test_images) - 1, min(num_points, len(dataset.test_images))).long()
    inputs, targets = utils.binarize_test_set(dataset.test_images, binarize)
    kl = elbo_terms(model, inputs, targets)[1].mean(0)
    with torch.no_grad():
        mu = model.encode(inputs[chosen])[2]
    latent_size = len(kl)
    content = {
        "caption": caption,
        "latent_size": latent_size,
        "activation": model.config["activation"],
        "layers": [{"weight": encode(layer.weight), "bias": encode(layer.bias)} for layer in linear],
        "kl": kl.tolist(),
        "order": [0, 1] if latent_size == 2 else kl.argsort(descending=True).tolist(),
        "classes": dataset.classes,
        "colors": [matplotlib.colors.to_hex(color) for color in matplotlib.color_sequences["petroff10"]],
        "points": [
            {"mu": [round(value, 3) for value in row], "label": label}
            for row, label in zip(mu.tolist(), dataset.test_labels[chosen].tolist(), strict=True)
        ],
    }
    text = json.dumps(content).replace("</", "<\\/")  # nothing in it ends the script element
    return (Path(__file__).parent / "assets" / "explorer.html").read_text().replace("DATA", text, 1)


def describe(dataset: str, binarize: str, model: VAE, epoch: int | None) -> str:
    """The pictures' caption: what was trained on what."""
    after = "" if epoch is None else f", epoch {epoch}"
    return f"{dataset}, binarize {binarize}, latent size {model.config['latent_size']}{after}"


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
    yield "latent_usage.png", draw_latent_usage(model, dataset, binarize, caption)
    if model.config["latent_size"] == 2:
        yield "manifold.png", draw_manifold(model, caption)


def _new_figure(columns: float, rows: float, title: str) -> tuple["Figure", Any]:
    from matplotlib.figure import Figure  # not pyplot: needs no display, and nothing to close

    figure = Figure(figsize=(max(5, 0.5 * columns + 1.6), 0.5 * rows + 1), layout="constrained")  # for the title too
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
        "--nll-samples", type=utils.count, default=100, help="importance samples an image (default: %(default)s)"
    )
    parser.add_argument("--device", choices=utils.DEVICES, default="auto", help="(default: %(default)s)")
    parser.add_argument(
        "--out-dir", help="where metrics.json and the pictures are written (default: beside the checkpoint)"
    )
    parser.add_argument(
        "--explorer", action="store_true", help="write explorer.html, to walk about the latent space in"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draws of z (default: %(default)s)")
    args = parser.parse_args()
    if not 0 <= args.seed <= 2**40:
        raise UserError(f"--seed must be a whole number from 0 to 2^40, not {args.seed}")
    return args


@utils.command
def main() -> None:
    args = parse_args()
    device = utils.choose_device(args.device)
    path = utils.checkpoint_path(utils.newest_run("runs") if args.run is None else args.run)
    model, checkpoint = utils.load_checkpoint(path)
    options = checkpoint.get("options", {})  # a checkpoint of the original repository has none
    binarize = args.binarize or options.get("binarize", "dynamic")
    name = args.dataset or options.get("dataset", "auto")
    if name not in utils.DATASETS:
        raise UserError(f"{path} was trained on a data set of your own, {name!r}: call evaluate.evaluate in Python")
    dataset = utils.load_dataset(name, args.data_dir)
    if model.config["input_size"] != dataset.test_images.shape[1]:
        sizes = f"{model.config['input_size']} values an image, {dataset.name} has {dataset.test_images.shape[1]}"
        raise UserError(f"{path} is a model of {sizes}")
    out_dir = Path(args.out_dir or path.parent)
    out_dir.mkdir(parents=True, exist_ok=True)

    dataset = dataset.to(device)
    model = model.to(device)
    metrics = evaluate(model, dataset.test_images, binarize, args.nll_samples, args.seed)
    metrics |= {"dataset": dataset.name, "binarize": binarize}
    caption = describe(dataset.name, binarize, model, checkpoint.get("epoch"))
    print_metrics(metrics, f"{path}: {caption}")
    utils.write_atomically(out_dir / "metrics.json", (json.dumps(metrics, indent=2) + "\n").encode())
    for name, figure in draw_all(model, dataset, binarize, caption):
        save_figure(figure, out_dir / name)
        print(f"wrote {out_dir / name}")
    if args.explorer:
        page = make_explorer(model, dataset, binarize, caption)
        utils.write_atomically(out_dir / "explorer.html", page.encode())
        print(f"wrote {out_dir / 'explorer.html'}: open it in a browser")


def print_metrics(metrics: dict[str, Any], title: str) -> None:
    print(f"{title}; {metrics['num_images']:,} test images")
    if metrics["binarize"] == "none":
        print(
            "Targets are gray: the figures below are cross-entropies, not likelihoods, and compare with no other mode"
        )
    print(f"  neg_elbo      {metrics['neg_elbo']:8.2f} nats per image, standard error {metrics['neg_elbo_se']:.2f}")
    print(f"    bce         {metrics['bce']:8.2f}")
    print(f"    kl          {metrics['kl']:8.2f}, by latent, sorted:")
    kls = [f"{kl:5.2f}" for kl in sorted(metrics["kl_per_latent"], reverse=True)]
    for start in range(0, len(kls), 10):
        print(" " * 16 + " ".join(kls[start : start + 10]))
    if metrics["binarize"] != "none":
        how = f"standard error {metrics['nll_se']:.2f}, {metrics['nll_samples']:,} importance samples"
        print(f"  nll           {metrics['nll']:8.2f} nats per image, {how}")
    print(f"  active_units  {metrics['active_units']:8d} of {len(metrics['kl_per_latent'])} latents")


if __name__ == "__main__":
    main()
