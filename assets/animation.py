"""Draws a two-dimensional manifold as it forms: python assets/animation.py writes manifold.gif into assets/."""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from PIL import Image, ImageDraw

from model import VAE
from pictures import decode_manifold, tile
from train import train


def draw_frame(model: VAE, epoch: int, steps: int = 14) -> Image.Image:
    """Images decoded at equal quantiles of the prior, as pictures.draw_manifold shows them, with the epoch below."""
    tiles = tile(decode_manifold(model, steps)[0], steps)
    frame = Image.new("L", (28 * steps, 28 * steps + 20), 255)
    frame.paste(Image.fromarray((255 * tiles).byte().numpy()))
    ImageDraw.Draw(frame).text((4, 28 * steps + 4), f"after epoch {epoch}", fill=0)
    return frame


def main() -> None:
    torch.manual_seed(0)
    frames = [draw_frame(VAE(latent_size=2), 0)]

    def add_frame(model: VAE, history: list[dict]) -> None:
        if len(history) in shown:
            frames.append(draw_frame(model, len(history)))

    shown = {round(1.17**i) for i in range(32)}  # most happens in the first epochs
    with tempfile.TemporaryDirectory() as out_dir:
        train("mnist-5k", epochs=max(shown), latent_size=2, out_dir=out_dir, on_epoch=add_frame)
    durations = [*[250] * (len(frames) - 1), 3000]  # milliseconds
    path = Path(__file__).parent / "manifold.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0, optimize=True)


if __name__ == "__main__":
    main()
