"""Metrics and pictures of a trained VAE.

    python evaluate.py                                # the newest run in runs/
    python evaluate.py runs/001-mnist-z20
    python evaluate.py somewhere/checkpoint.pt --dataset mnist --binarize threshold
    python evaluate.py --explorer                     # and a web page in which to touch its latent space

Writes metrics.json and the pictures into the run folder, or for FILE.pt into a folder FILE. All losses are in nats per
image.
"""

import base64
import copy
import functools
import io
import itertools
import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

try:
    import torch
    from torch import Tensor, nn
    from tqdm import tqdm

    import utils
    from data import BINARIZE, DATASETS, ImageData, binarize_test_set, check_bytes, load_dataset
    from model import VAE, Decoder, Encoder, LatentZ
    from utils import UserError
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    print(f"evaluate.py: error: the package {error.name} is missing: pip install -r requirements.txt", file=sys.stderr)
    sys.exit(2)
except KeyboardInterrupt:
    sys.exit(130)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NLL_SAMPLES = 100


def in_eval_mode(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a function of a model: it runs in eval mode, without gradients, and leaves all modes as they were."""

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
def elbo_terms(model: VAE, inputs: Tensor, targets: Tensor, batch_size: int = 1000) -> tuple[Tensor, Tensor]:
    """The negative ELBO's terms, with one z per image: inputs and targets (N, D) -> BCE and KL, each (N,)."""
    pairs = zip(inputs.split(batch_size), targets.split(batch_size), strict=True)
    bces, kls = zip(*(model.elbo_terms(x, target) for x, target in pairs), strict=True)
    return torch.cat(bces), torch.cat(kls)


@in_eval_mode
def posteriors(model: VAE, inputs: Tensor, batch_size: int = 1000) -> tuple[Tensor, Tensor]:
    """The parameters of q(z|x): inputs (N, D) -> logvar and mu, each (N, latent)."""
    logvars, mus = zip(*(model.encode(x)[1:] for x in inputs.split(batch_size)), strict=True)
    return torch.cat(logvars), torch.cat(mus)


@in_eval_mode
def estimate_nll(
    model: VAE,
    inputs: Tensor,
    targets: Tensor,
    num_samples: int = NLL_SAMPLES,
    seed: int = 0,
    batch_size: int = 50,
) -> Tensor:
    """-log p(target) by importance sampling from q(z|input) (Burda et al. 2016, eq. 8): (N, D) -> (N,), in nats.

    A seed gives the same figures whatever the batch size, and memory does not grow with the number of samples. By
    default, the logits of a batch stay in a CPU's cache.
    """
    logvar, mu = posteriors(model, inputs)
    generator = torch.Generator(mu.device).manual_seed(seed)
    total = torch.full_like(mu[:, 0], -math.inf, dtype=torch.promote_types(mu.dtype, torch.float32))
    bar = tqdm(total=num_samples, desc="nll", unit=" samples", leave=False, disable=None)
    precision = utils.choose_precision(mu.device, 10 * batch_size)
    with utils.matmul_precision(precision, mu.device), bar as progress:
        for chunk in torch.arange(num_samples).split(10):
            eps = torch.randn(len(chunk), *mu.shape, generator=generator, device=mu.device, dtype=mu.dtype)
            for start in range(0, len(inputs), batch_size):
                i = slice(start, start + batch_size)
                log_weights = model.log_importance_weights(targets[i], logvar[i], mu[i], eps[:, i])
                total[i] = torch.logaddexp(total[i], log_weights.logsumexp(0))  # the log of all weights' sum so far
            progress.update(len(chunk))
    return math.log(num_samples) - total


def is_active(mu: Tensor, threshold: float = 0.01) -> Tensor:
    """(N, latent) posterior means -> (latent,): do they vary over the data by more than threshold? (Burda et al.)"""
    return mu.var(0) > threshold


def evaluate(
    model: VAE, images: Tensor, binarize: str = "dynamic", nll_samples: int = NLL_SAMPLES, seed: int = 0
) -> dict[str, Any]:
    """All metrics of a model on uint8 images (N, H, W) or (N, D). Reseeds PyTorch.

    In nats per image; a name with _se is the standard error over the images. nll and nll_se are None where the
    model's log_likelihood is no likelihood of the targets (a Bernoulli's, of gray ones), and kl_per_latent where its
    prior has no KL by latent dimension. Raises UserError for images of another type, number or size.
    """
    check_bytes(images, "images")
    size = model.config["input_size"]
    if len(images) < 2 or images.dim() < 2 or images[0].numel() != size:
        raise UserError(f"the images must be two or more of {size} values each, not {tuple(images.shape)}")
    if nll_samples < 1:
        raise UserError(f"nll_samples must be 1 or more, not {nll_samples}")
    torch.manual_seed(seed)
    inputs, targets = binarize_test_set(images.to(next(model.parameters()).device), binarize)
    bce, kl = elbo_terms(model, inputs, targets)
    logvar, mu = posteriors(model, inputs)
    kl_by_latent = model.kl_by_latent(logvar, mu)
    neg_elbo, neg_elbo_se = _mean_and_error(bce + kl)
    nll, nll_se = None, None
    if model.is_likelihood(targets):
        nll, nll_se = _mean_and_error(estimate_nll(model, inputs, targets, nll_samples, seed))
    return {
        "neg_elbo": neg_elbo,
        "neg_elbo_se": neg_elbo_se,
        "bce": bce.mean().item(),
        "kl": kl.mean().item(),
        "kl_per_latent": None if kl_by_latent is None else kl_by_latent.mean(0).tolist(),
        "nll": nll,
        "nll_se": nll_se,
        "nll_samples": nll_samples,
        "active_units": int(is_active(mu).sum()),
        "latent_size": mu.shape[1],
        "num_images": len(images),
    }


def _mean_and_error(values: Tensor) -> tuple[float, float]:
    return values.mean().item(), values.std().item() / math.sqrt(len(values))


# ---------------------------------------------------------------------------------------------------------------------
# Pictures: every draw_ function returns a matplotlib figure, which a notebook shows and save_figure writes. `inputs`
# (N, D) are what the encoder is given of the data set's test images, from binarize_test_set


@in_eval_mode
def draw_reconstructions(model: VAE, dataset: ImageData, inputs: Tensor, caption: str) -> "Figure":
    """Ten test images, of as many classes as there are, with what the encoder was given, and the reconstructions."""
    chosen = _in_turn(dataset.test_labels.tolist(), 10)
    images = dataset.test_images[chosen].flatten(1).to(inputs.device) / 255
    rows = {"image": images, "input": inputs[chosen], "reconstruction": model.reconstruct(inputs[chosen])}
    if torch.equal(rows["input"], images):
        del rows["input"]
    columns = [dataset.classes[dataset.test_labels[i]] for i in chosen]
    title = f"Reconstructions of test images\n{caption}"
    return draw_tiles(torch.cat(list(rows.values())), len(rows), dataset.shape, title, list(rows), columns)


@in_eval_mode
def draw_prior_samples(model: VAE, caption: str, shape: tuple[int, int] = (28, 28), seed: int = 0) -> "Figure":
    """The decoded means of a hundred draws of the prior, always the same ones for a seed."""
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        images = model.sample(100)
    return draw_tiles(images, 10, shape, f"Samples from the prior\n{caption}")


@in_eval_mode
def draw_interpolations(model: VAE, dataset: ImageData, inputs: Tensor, caption: str) -> "Figure":
    """Straight walks in latent space between test images' posterior means, of different classes where there are any."""
    labels, steps = dataset.test_labels.tolist(), 11
    ends = _in_turn(labels, 10, backwards=True)
    half = max(1, len(ends) // 2)
    pairs = list(zip(ends[:half], ends[-half:], strict=True))
    start, end = posteriors(model, inputs[torch.tensor(pairs).flatten()])[1].view(half, 2, 1, -1).unbind(1)
    z = torch.lerp(start, end, torch.linspace(0, 1, steps, device=start.device, dtype=start.dtype)[:, None])
    names = [" to ".join(dataset.classes[labels[i]] for i in pair) for pair in pairs]
    shares = [f"{step / (steps - 1):.1f}" for step in range(steps)]
    title = f"Decoded walks between test images' posterior means\n{caption}"
    figure = draw_tiles(model.decode(z.flatten(0, 1)), half, dataset.shape, title, names, shares)
    figure.axes[0].set_xlabel("share of the way")
    return figure


def draw_latent_space(model: VAE, dataset: ImageData, inputs: Tensor, caption: str) -> "Figure":
    """The test images' posterior means coloured by class: on the first two principal components above two latents."""
    mu = posteriors(model, inputs)[1].float().cpu()
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
    colors = class_colors(len(dataset.classes))
    axes.scatter(*mu.T.numpy(), s=4, c=[colors[label] for label in labels], alpha=0.6, linewidths=0)
    shown = 40  # of the classes, as many as the legend has room for
    for name, color in zip(dataset.classes[:shown], colors, strict=False):
        axes.scatter([], [], color=color, label=f" {verbatim(name)}")  # without the space, none that begins with _
    title = f"the first {shown} of {len(colors)} classes" if len(colors) > shown else None
    legend = {"ncols": -(-min(shown, len(colors)) // 20), "fontsize": 10 if len(colors) <= 20 else 7}
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, title=title, **legend)
    axes.set(xlabel=names[0], ylabel=names[1])
    return figure


def draw_latent_usage(model: VAE, inputs: Tensor, caption: str) -> "Figure":
    """The mean KL of each latent dimension over the test images, sorted: what the encoder says through each.

    Raises ValueError where the prior has no KL by latent dimension.
    """
    logvar, mu = posteriors(model, inputs)
    kl = model.kl_by_latent(logvar, mu)
    if kl is None:
        raise ValueError("the prior has no KL by latent dimension")
    kl = kl.detach().mean(0).cpu()
    order = kl.argsort(descending=True)
    active = is_active(mu).cpu()[order]
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


@in_eval_mode
def draw_manifold(model: VAE, caption: str, shape: tuple[int, int] = (28, 28), steps: int = 20) -> "Figure":
    """A two-dimensional latent space decoded at equal quantiles of the prior (Kingma & Welling 2014, figure 4)."""
    images, (x, y) = decode_manifold(model, steps)
    rows, columns = ([f"{value:.1f}" for value in values] for values in (y, x))
    title = f"Images decoded at equal quantiles of the prior\n{caption}"
    figure = draw_tiles(images, steps, shape, title, rows, columns)
    figure.axes[0].set(xlabel="$z_1$", ylabel="$z_2$")
    return figure


@in_eval_mode
def decode_manifold(model: VAE, steps: int) -> tuple[Tensor, tuple[list[float], list[float]]]:
    """The tiles of draw_manifold (steps * steps, D), row by row, and their z_1 to the right and z_2 downwards.

    The quantiles are those of N(0, 1), or of 10,000 draws of another prior, along each axis.
    """
    weight = next(model.parameters())
    shares = ((torch.arange(steps) + 0.5) / steps).to(weight)
    if model.has_standard_prior():
        x = y = torch.special.ndtri(shares)
    else:
        x, y = torch.quantile(model.sample_prior(10_000), shares, dim=0).T
    z = torch.cartesian_prod(y.flip(0), x).flip(1)
    return model.decode(z), (x.tolist(), y.flip(0).tolist())


def draw_tiles(
    images: Tensor,
    rows: int,
    shape: tuple[int, int],
    title: str,
    row_labels: list[str] | None = None,
    column_labels: list[str] | None = None,
) -> "Figure":
    """(rows * columns, H * W) images in [0, 1] as one picture, row by row."""
    height, width = shape
    columns = len(images) // rows
    figure, axes = _new_figure(columns, rows, title)
    axes.imshow(tile(images, rows, shape).numpy(), cmap="gray", vmin=0, vmax=1)
    for set_ticks, labels, size in ((axes.set_yticks, row_labels, height), (axes.set_xticks, column_labels, width)):
        labels = [verbatim(label) for label in labels or []]
        set_ticks([(i + 0.5) * size for i in range(len(labels))], labels, fontsize=8)
    axes.tick_params(length=0)
    return figure


def tile(images: Tensor, rows: int, shape: tuple[int, int] = (28, 28)) -> Tensor:
    """(rows * columns, D) images as one picture, row by row: (rows * H, columns * W), on the CPU."""
    height, width = shape
    tiles = images.detach().float().cpu().view(rows, -1, height, width)
    return tiles.transpose(1, 2).reshape(rows * height, -1)


def verbatim(text: str) -> str:
    """Text that matplotlib shows as it is, without formulas."""
    return text.replace("$", r"\$")


def class_colors(num_classes: int) -> list[Any]:
    """A colour for each class: of up to ten, such as the colour-blind tell apart too (arXiv 2107.02270)."""
    import matplotlib

    if num_classes <= 10:
        return list(matplotlib.color_sequences["petroff10"])[:num_classes]
    return list(matplotlib.colormaps["turbo"](torch.linspace(0, 1, num_classes).tolist()))


def make_explorer(model: VAE, dataset: ImageData, caption: str) -> str:
    """A web page in which the latent space of a model can be explored. Raises UserError as check_explorer does."""
    check_explorer(model)
    about = [
        "What the encoder and the decoder of a variational autoencoder make of images, and of points between them."
    ]
    images, labels = dataset.test_images, dataset.test_labels
    return make_page("Latent explorer", about, [caption], {"main": model}, images, labels, dataset.classes)


def check_explorer(model: VAE) -> None:
    """Raises UserError for a model that the explorer can't show."""
    methods = ("outputs", "mean", "log_likelihood", "log_prior", "sample_prior", "kl_by_latent")
    if type(model.decoder) is not Decoder or any(
        getattr(type(model), name) is not getattr(VAE, name) for name in methods
    ):
        raise UserError("the explorer is for fully connected decoders of pixel probabilities and the prior N(0, I)")
    if sum(weight.numel() for weight in model.parameters()) > 4_000_000:
        raise UserError("the model has more than 4 million weights, too many for a web page")
    if model.config["latent_size"] < 2:
        raise UserError("the explorer needs two latents or more")


def make_page(
    title: str,
    about: list[str],
    notes: list[str],
    models: dict[str, VAE],
    images: Tensor,
    labels: Tensor,
    classes: list[str],
    num_points: int = 2000,
) -> str:
    """A web page, docs/page.html filled in, that needs no network and runs the models itself.

    about and notes are paragraphs, above and below. models: "main"; "map", of two latents, if there is one; and "vamp",
    of which only the prior and decoder are shown. images (N, H, W) uint8 and labels (N,) are those to place in latent
    space, by their posterior means. All is computed in float64, so that the same weights give the same page, byte for
    byte, on every machine.
    """
    import matplotlib

    chosen = _in_turn(labels.tolist(), num_points)
    shown = images[chosen[: max(10, min(100, 400_000 // images[0].numel()))]]
    content = {
        "title": title,
        "about": about,
        "notes": notes,
        "classes": classes,
        "colors": [matplotlib.colors.to_hex(color) for color in class_colors(len(classes))],
        "height": images.shape[1],
        "width": images.shape[2],
        "images": base64.b64encode(shown.contiguous().numpy()).decode(),
        "labels": labels[chosen].tolist(),
        "models": {role: _page_model(model, images[chosen]) for role, model in models.items()},
    }
    folder = Path(__file__).parent / "docs"
    parts = {f"@{name}@": (folder / name).read_text() for name in ("page.css", "networks.js", "page.js")}
    parts["@data@"] = json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")  # ends no script element
    return re.sub("|".join(parts), lambda match: parts[match[0]], (folder / "page.html").read_text())


@in_eval_mode
def _page_model(model: VAE, images: Tensor) -> dict[str, Any]:
    """What docs/networks.js reads a model from. Without an encoder of the usual kind, what needs one is left out."""
    model = copy.deepcopy(model).cpu().double()

    def layer(linear: nn.Linear) -> dict[str, Any]:
        return {"weight": _matrix(linear.weight.T), "bias": _floats(linear.bias)}

    decoder = [layer(linear) for linear in model.decoder.children()]
    content = {"activation": model.config["activation"], "decoder": decoder}
    if not model.has_standard_prior():
        logvar, mu = model.components()
        return content | {"prior": {"mu": _matrix(mu), "std": _matrix(torch.exp(0.5 * logvar))}, "size": mu.shape[1]}
    logvar, mu = posteriors(model, images.flatten(1).double() / 255)
    kl = model.kl_by_latent(logvar, mu).mean(0)
    order = [0, 1] if len(kl) == 2 else kl.argsort(descending=True).tolist()
    content |= {"size": len(kl), "order": order, "points": _matrix(mu)}
    if type(model.encoder) is Encoder and type(model.latent_z) is LatentZ and type(model).encode is VAE.encode:
        content["encoder"] = [layer(linear) for linear in model.encoder.children()]
        content |= {"mu": layer(model.latent_z.mu), "logvar": layer(model.latent_z.logvar)}
    return content


def _matrix(values: Tensor) -> dict[str, str]:
    """(rows, columns) as whole numbers of 16 bits, with a scale per row: closer than float16, of the same size."""
    scales = (values.abs().amax(1) / (2**15 - 1)).clamp(min=1e-30)
    whole = (values / scales[:, None]).round()
    return {"scales": _floats(scales), "values": base64.b64encode(whole.numpy().astype("<i2").tobytes()).decode()}


def _floats(values: Tensor) -> str:
    return base64.b64encode(values.numpy().astype("<f4").tobytes()).decode()


def bce_label(model: VAE) -> str:
    """The name of the loss's first term, -log p(x|z): BCE, where it is a binary cross-entropy."""
    return "BCE" if type(model).log_likelihood is VAE.log_likelihood else "-log p(x|z)"


def describe(dataset: str, binarize: str, model: VAE, epoch: int | None, num_held_out: int = 0) -> str:
    """The pictures' caption: what was trained on what, and tested on what if that is not the test set."""
    held_out = f", tested on {num_held_out:,} held-out training images" if num_held_out else ""
    what = "" if type(model) is VAE else f"{type(model).__name__}, "
    after = "" if epoch is None else f", epoch {epoch}"
    return f"{what}{dataset}, binarize {binarize}, latent size {model.config['latent_size']}{after}{held_out}"


def save_figure(figure: "Figure", path: Path) -> None:
    """Writes a figure as PNG, atomically. Raises OSError."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    utils.write_atomically(path, buffer.getvalue())


def draw_all(model: VAE, dataset: ImageData, inputs: Tensor, caption: str) -> Iterator[tuple[str, "Figure"]]:
    """The file name and figure of each picture that there is of such a model."""
    yield "reconstructions.png", draw_reconstructions(model, dataset, inputs, caption)
    yield "prior_samples.png", draw_prior_samples(model, caption, dataset.shape)
    yield "interpolations.png", draw_interpolations(model, dataset, inputs, caption)
    yield "latent_space.png", draw_latent_space(model, dataset, inputs, caption)
    if model.kl_by_latent(*posteriors(model, inputs[:2])) is not None:
        yield "latent_usage.png", draw_latent_usage(model, inputs, caption)
    if model.config["latent_size"] == 2:
        yield "manifold.png", draw_manifold(model, caption, dataset.shape)


def _in_turn(labels: list[int], count: int, backwards: bool = False) -> list[int]:
    """The first `count` indices in the order: first (or last) image of each class, second of each, and so on."""
    order = range(len(labels))[:: -1 if backwards else 1]
    by_class = ([i for i in order if labels[i] == label] for label in sorted(set(labels)))
    return [i for turn in itertools.zip_longest(*by_class) for i in turn if i is not None][:count]


def _new_figure(columns: float, rows: float, title: str) -> tuple["Figure", Any]:
    from matplotlib.figure import Figure  # not pyplot: needs no display, and nothing to close

    figure = Figure(figsize=(max(5, 0.5 * columns + 1.6), 0.5 * rows + 1), layout="constrained")  # for the title too
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
    explorer: bool = False,
    seed: int = 0,
    hold_out: int | None = None,
) -> dict[str, Any]:
    """Evaluates a run or a checkpoint file, prints its metrics, and writes metrics.json and the pictures -> metrics.

    A checkpoint of a subclass of VAE needs such a model. dataset, binarize and hold_out (0: the test set) are by
    default those of the run, whose images must be the same still; hold_out is 0 by default where a data set is named.
    out_dir is the run folder, and for a checkpoint FILE.pt a folder FILE. Raises UserError for a bad value or file, and
    OSError.
    """
    device = utils.choose_device(device)
    path = utils.checkpoint_path(run)
    model, checkpoint = utils.load_checkpoint(path, model)
    if checkpoint.get("epoch") == 0:
        raise UserError(
            f"{path} is not trained yet, having been stopped in its first epoch: go on with train.py --resume"
        )
    options = checkpoint.get("options", {})  # a checkpoint of the original repository has none
    binarize = binarize or options.get("binarize", "dynamic")
    if binarize not in BINARIZE:
        raise UserError(f"--binarize, given or that of {path}, must be one of {', '.join(BINARIZE)}, not {binarize}")
    is_the_runs = dataset is None and hold_out is None
    if hold_out is None:
        is_named = dataset is not None and not isinstance(dataset, ImageData)
        hold_out = 0 if is_named else options.get("hold_out", 0)
    if isinstance(dataset, ImageData):
        dataset = dataset.hold_out(hold_out or dataset.num_held_out)
    else:
        name = str(dataset or options.get("dataset", "auto"))
        is_folder = name not in DATASETS and Path(name).is_dir()
        image_size = math.isqrt(model.config["input_size"]) if is_folder else None
        dataset = load_dataset(name, data_dir, image_size, hold_out)
        if is_the_runs:
            check_same_images(checkpoint, dataset, path)
    check_images(model, dataset)
    if explorer:
        check_explorer(model)
    if not out_dir:  # files of one folder, such as weights/, get folders of their own
        out_dir = path.with_suffix("") if path.suffix and path.name != "checkpoint.pt" else path.parent
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    utils.clear_parts(out_dir)

    model = model.to(device)
    inputs, _ = binarize_test_set(dataset.test_images.to(device), binarize)
    metrics = evaluate(model, dataset.test_images, binarize, nll_samples, seed)
    metrics |= {"dataset": dataset.name, "hold_out": dataset.num_held_out, "binarize": binarize}
    caption = describe(dataset.name, binarize, model, checkpoint.get("epoch"), dataset.num_held_out)
    print_metrics(metrics, f"{path}: {caption}", bce_label(model))
    utils.write_atomically(out_dir / "metrics.json", (json.dumps(metrics, indent=2) + "\n").encode())
    for name, figure in draw_all(model, dataset, inputs, caption):
        save_figure(figure, out_dir / name)
        print(f"wrote {out_dir / name}")
    if explorer:
        page = make_explorer(model, dataset, caption)
        utils.write_atomically(out_dir / "explorer.html", page.encode())
        print(f"wrote {out_dir / 'explorer.html'}: open it in a browser")
    return metrics


def check_images(model: VAE, dataset: ImageData) -> None:
    """Raises UserError where the model is not one of images of such a size."""
    if model.config["input_size"] != dataset.input_size:
        sizes = f"{model.config['input_size']} values each, those of {dataset.name} have {dataset.input_size}"
        raise UserError(f"the model is for other images: of {sizes}")


def check_same_images(checkpoint: dict[str, Any], dataset: ImageData, path: Path) -> None:
    """Raises UserError where a run was trained on other images, so that those to test on may have been among them."""
    if checkpoint.get("checksum", checksum := dataset.checksum()) != checksum:
        how = "give it its own; evaluate.py takes others by --dataset, and evaluate_run by dataset"
        raise UserError(f"{path} is of other images than those that {dataset.name} holds now: {how}")


def print_metrics(metrics: dict[str, Any], title: str, bce: str = "BCE") -> None:
    """Prints what evaluate returns; bce is the name of the loss's first term."""
    print(f"{title}; {metrics['num_images']:,} {'held-out' if metrics.get('hold_out') else 'test'} images")
    if metrics["nll"] is None:
        print("The model has no likelihood of such targets (gray, for a Bernoulli): these figures are not likelihoods")
    print(f"  neg_elbo      {metrics['neg_elbo']:8.2f} nats per image, standard error {metrics['neg_elbo_se']:.2f}")
    print(f"    {bce.lower():11s} {metrics['bce']:8.2f}")
    if metrics["kl_per_latent"] is None:
        print(f"    kl          {metrics['kl']:8.2f}, from one draw per image: the prior has no KL by latent")
    else:
        print(f"    kl          {metrics['kl']:8.2f}, by latent, sorted:")
        kls = [f"{kl:5.2f}" for kl in sorted(metrics["kl_per_latent"], reverse=True)]
        for start in range(0, len(kls), 10):
            print(" " * 16 + " ".join(kls[start : start + 10]))
    if metrics["nll"] is not None:
        how = f"standard error {metrics['nll_se']:.2f}, {metrics['nll_samples']:,} importance samples"
        print(f"  nll           {metrics['nll']:8.2f} nats per image, {how}")
    print(f"  active_units  {metrics['active_units']:8d} of {metrics['latent_size']} latents")


def add_nll_samples(parser: utils.ArgumentParser) -> None:
    help = f"importance samples per image (default: {NLL_SAMPLES})"
    parser.add_argument("--nll-samples", type=utils.count, default=NLL_SAMPLES, metavar="K", help=help)


@utils.command
def main() -> None:
    parser = utils.ArgumentParser(description=__doc__)
    parser.add_argument(
        "run",
        nargs="?",
        default="runs",
        help="run folder or checkpoint file, or a folder of runs, of which the newest counts (default: %(default)s)",
    )
    parser.add_argument("--dataset", help="test set: a name or path, as for train.py (default: the run's, else auto)")
    parser.add_argument(
        "--data-dir", default="data", help="where data sets are read and downloaded (default: %(default)s)"
    )
    parser.add_argument("--binarize", choices=BINARIZE, help="input and target (default: the run's, else dynamic)")
    parser.add_argument(
        "--hold-out",
        type=int,
        metavar="N",
        help="test on the last N training images, or with 0 on the test set (default: as in training)",
    )
    add_nll_samples(parser)
    parser.add_argument("--device", choices=utils.DEVICES, default="auto", help="(default: %(default)s)")
    parser.add_argument(
        "--out-dir",
        help="where metrics.json and the pictures are written (default: the run folder, or FILE/ for FILE.pt)",
    )
    parser.add_argument("--explorer", action="store_true", help="write explorer.html, to touch the latent space in")
    parser.add_argument("--seed", type=int, default=0, help="of the draws of z (default: %(default)s)")
    args = parser.parse_args()
    if not 0 <= args.seed <= 2**40:
        raise UserError(f"--seed must be a whole number from 0 to 2^40, not {args.seed}")
    if args.hold_out is not None and args.hold_out < 0:
        raise UserError(f"--hold-out must be 0 or above, not {args.hold_out}")
    evaluate_run(**vars(args))


if __name__ == "__main__":
    main()
