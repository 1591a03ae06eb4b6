"""The README's diagrams, which assets/make.py draws."""

from itertools import pairwise, product
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.text import Text

from model import VAE, LatentZ
from pictures import BLUE, GRAY, ORANGE


def draw_architecture(vae: VAE) -> Figure:
    """The layers of a VAE with their sizes, from an image x to the pixel probabilities x_hat."""

    def describe(name: str, layer: Any, activation: str) -> str:
        return f"{name}, {activation}\n{layer.in_features} → {layer.out_features}"

    activation = vae.config["activation"]
    encoder = [describe(name, layer, activation) for name, layer in vae.encoder.named_children()]
    *hidden, (name, layer) = vae.decoder.named_children()
    decoder = [*(describe(*named, activation) for named in hidden), describe(name, layer, "sigmoid")]
    size, latent = vae.config["input_size"], vae.config["latent_size"]
    columns = [
        *[(["x\n" + str(size)], GRAY)],
        *[([text], BLUE) for text in encoder],
        (["mu\n" + str(latent), "logvar\n" + str(latent)], BLUE),
        (["z = mu +\nstd · eps\n" + str(latent)], ORANGE),
        *[([text], BLUE) for text in decoder],
        (["x_hat\n" + str(size)], GRAY),
    ]
    figure, axes = _blank(1.55 * len(columns), 2.6)
    boxes = []
    for i, (texts, color) in enumerate(columns):
        heights = (0.75, -0.75) if len(texts) > 1 else (0,)
        boxes.append([_box(axes, i, y, text, color) for y, text in zip(heights, texts, strict=True)])
    for before, after in pairwise(boxes):
        for start, end in product(before, after):
            _arrow(axes, start, end)
    sampled = len(encoder) + 2
    _arrow(axes, _box(axes, sampled, -1.35, "eps ~ N(0, I)", GRAY), boxes[sampled][0])
    spans = {"Encoder": (1, len(encoder)), "LatentZ": (len(encoder) + 1, len(encoder) + 2)}
    spans["Decoder"] = (len(encoder) + 3, len(encoder) + 2 + len(decoder))
    for name, (first, last) in spans.items():
        axes.text((first + last) / 2, 1.45, name, ha="center", fontsize=11, weight="bold")
        axes.plot([first - 0.4, last + 0.4], [1.35, 1.35], color="black", linewidth=1)
    axes.set(xlim=(-0.6, len(columns) - 0.4), ylim=(-1.8, 1.9))
    return figure


def draw_latent_variable(mu: float = 1.0, logvar: float = -1.0) -> Figure:
    """One latent dimension: the prior, a posterior, and draws z = mu + std * eps of LatentZ from it."""
    layer = LatentZ(1, 1)
    with torch.no_grad():
        layer.mu.weight.zero_(), layer.logvar.weight.zero_(), layer.mu.bias.fill_(mu), layer.logvar.bias.fill_(logvar)
        z, _, _ = layer(torch.zeros(40, 1))
    std = torch.tensor(0.5 * logvar).exp()
    values = torch.linspace(-3.5, 3.5, 300)
    figure = Figure(figsize=(6, 2.6), layout="constrained", facecolor="white")
    axes = figure.subplots()
    for name, color, center, width in (("prior N(0, 1)", GRAY, 0.0, 1.0), ("posterior q(z|x)", BLUE, mu, std)):
        density = torch.distributions.Normal(center, width).log_prob(values).exp()
        axes.plot(values, density, color=color, label=name)
        axes.fill_between(values, density, color=color, alpha=0.2)
    axes.plot(z.flatten(), torch.full((len(z),), -0.04), "|", color=ORANGE, markersize=10, label="z = mu + std · eps")
    axes.annotate("", (mu, 0.3), (mu + std.item(), 0.3), arrowprops={"arrowstyle": "<->"})
    axes.text(mu + std.item() + 0.4, 0.3, "std = exp(logvar / 2)", va="center", fontsize=8)
    axes.annotate("mu", (mu, 0), (mu, -0.2), ha="center", arrowprops={"arrowstyle": "->"}, fontsize=9)
    axes.set(xlabel="z", ylabel="density", ylim=(-0.25, 0.75), yticks=(0, 0.2, 0.4, 0.6))
    axes.legend(fontsize=8, frameon=False, loc="upper left")
    return figure


def _blank(width: float, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    axes = figure.subplots()
    axes.axis("off")
    return figure, axes


def _box(axes: Any, x: float, y: float, text: str, color: str) -> Text:
    style = {"boxstyle": "round,pad=0.4", "facecolor": color + "40", "edgecolor": color, "linewidth": 1.5}
    return axes.text(x, y, text, ha="center", va="center", fontsize=9, bbox=style)


def _arrow(axes: Any, start: Text, end: Text) -> None:
    """From the edge of a box to the edge of another."""
    ends = {"patchA": start.get_bbox_patch(), "patchB": end.get_bbox_patch(), "shrinkA": 0, "shrinkB": 0}
    style = {"arrowstyle": "->", "color": "black"}
    axes.annotate("", end.get_position(), start.get_position(), arrowprops=style | ends)
