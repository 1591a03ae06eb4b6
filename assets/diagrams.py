"""Draws the README's diagrams: python assets/diagrams.py writes architecture.png and latent.png into assets/."""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from matplotlib.figure import Figure

from model import VAE, LatentZ
from pictures import BLUE, GRAY, ORANGE, save_figure


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
    for i, (texts, color) in enumerate(columns):
        for row, text in enumerate(texts):
            y = 0.75 - 1.5 * row if len(texts) > 1 else 0
            axes.text(i, y, text, ha="center", va="center", fontsize=9, bbox=_box(color))
            for next_row in range(len(columns[i + 1][0]) if i + 1 < len(columns) else 0):
                next_y = 0.75 - 1.5 * next_row if len(columns[i + 1][0]) > 1 else 0
                _arrow(axes, (i + 0.36, y), (i + 0.66, next_y))
    axes.text(3 + len(encoder) - 1, -1.35, "eps ~ N(0, I)", ha="center", fontsize=9, bbox=_box(GRAY))
    _arrow(axes, (2 + len(encoder), -1.1), (2 + len(encoder), -0.5))
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


def _box(color: str) -> dict[str, Any]:
    return {"boxstyle": "round,pad=0.4", "facecolor": color + "40", "edgecolor": color, "linewidth": 1.5}


def _arrow(axes: Any, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": "black"})


if __name__ == "__main__":
    torch.manual_seed(0)
    folder = Path(__file__).parent
    save_figure(draw_architecture(VAE()), folder / "architecture.png")
    save_figure(draw_latent_variable(), folder / "latent.png")
