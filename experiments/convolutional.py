"""Other networks: a convolutional encoder and decoder, with batch normalization.

    python experiments/convolutional.py               # train.py's options, but for the defaults at the end of this file
    python experiments/convolutional.py --resume RUN --nll-samples 5000

self.encoder and self.decoder are other modules, and nothing else changes. Images arrive flat, (B, C * H * W), and z as
(B, latent_size) or, from importance sampling, (K, B, latent_size). The running statistics of the normalizations are
averaged with the weights. --encoder-layers, --decoder-layers and --activation have no effect.
"""

import math
import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from torch import Tensor, nn

import train
from data import ImageData
from model import VAE
from utils import UserError


class ConvDecoder(nn.Sequential):
    """Doubles a picture's height and width twice: (..., latent_size) -> the pixels' logits (..., C * H * W)."""

    def __init__(self, latent_size: int, hidden_size: int, width: int, shape: tuple[int, int, int]):
        channels, rows, columns = shape[0], shape[1] // 4, shape[2] // 4
        super().__init__(
            nn.Linear(latent_size, hidden_size),
            nn.SiLU(),
            nn.Linear(hidden_size, 2 * width * rows * columns),
            nn.Unflatten(1, (2 * width, rows, columns)),
            nn.BatchNorm2d(2 * width),
            nn.SiLU(),
            nn.ConvTranspose2d(2 * width, width, kernel_size=4, stride=2, padding=1),
            nn.BatchNorm2d(width),
            nn.SiLU(),
            nn.ConvTranspose2d(width, channels, kernel_size=4, stride=2, padding=1),
            nn.Flatten(),
        )

    def logits(self, z: Tensor) -> Tensor:
        return self(z.flatten(0, -2)).unflatten(0, z.shape[:-1])


class ConvVAE(VAE):
    """A VAE with two convolutions on each side, `width` and 2 * `width` channels wide."""

    def __init__(
        self, shape: tuple[int, int, int] = (1, 28, 28), width: int = 32, hidden_size: int = 256, **sizes: int
    ):
        channels, rows, columns = shape[0], shape[1] // 4, shape[2] // 4
        super().__init__(math.prod(shape), hidden_size, **sizes)
        self.encoder = nn.Sequential(
            nn.Unflatten(1, shape),
            nn.Conv2d(channels, width, kernel_size=4, stride=2, padding=1),
            nn.BatchNorm2d(width),
            nn.SiLU(),
            nn.Conv2d(width, 2 * width, kernel_size=4, stride=2, padding=1),
            nn.BatchNorm2d(2 * width),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(2 * width * rows * columns, hidden_size),
            nn.SiLU(),
        )
        self.decoder = ConvDecoder(self.config["latent_size"], hidden_size, width, shape)


def make_model(dataset: ImageData, options: Namespace) -> VAE:
    _, height, width = dataset.shape
    if height % 4 or width % 4:
        raise UserError(f"the convolutions need a height and width that are multiples of 4, not {height} x {width}")
    return ConvVAE(dataset.shape, hidden_size=options.hidden_size, latent_size=options.latent_size)


if __name__ == "__main__":
    train.main(make_model, __doc__, hidden_size=256, latent_size=50, batch_size=128, lr=2e-3, kl_warmup=5, epochs=30)
