"""Other networks: a convolutional encoder and decoder, with batch normalization.

    python experiments/convolutional.py               # train.py's options, but for the defaults at the end of this file
    python experiments/convolutional.py --resume RUN --nll-samples 5000

self.encoder and self.decoder are other modules, and nothing else changes. Images arrive flat, (B, H * W), and z as
(B, latent_size) or, from importance sampling, (K, B, latent_size); the decoder gives one logit per pixel. Its running
statistics are averaged with the weights, and tests use those.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from torch import Tensor, nn

import train
from data import ImageData
from model import VAE
from utils import UserError


class ConvDecoder(nn.Module):
    """(..., latent_size) -> the pixels' logits (..., 4 rows * 4 columns)."""

    def __init__(self, latent_size: int, hidden_size: int, channels: int, rows: int, columns: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(latent_size, hidden_size),
            nn.SiLU(),
            nn.Linear(hidden_size, 2 * channels * rows * columns),
            nn.Unflatten(1, (2 * channels, rows, columns)),
            nn.BatchNorm2d(2 * channels),
            nn.SiLU(),
            nn.ConvTranspose2d(2 * channels, channels, kernel_size=4, stride=2, padding=1),
            nn.BatchNorm2d(channels),
            nn.SiLU(),
            nn.ConvTranspose2d(channels, 1, kernel_size=4, stride=2, padding=1),
            nn.Flatten(),
        )

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(z.flatten(0, -2)).unflatten(0, z.shape[:-1])


class ConvVAE(VAE):
    """A VAE with two convolutions on each side; height and width must be multiples of 4."""

    def __init__(self, height: int = 28, width: int = 28, channels: int = 32, hidden_size: int = 256, **sizes: int):
        super().__init__(height * width, hidden_size, **sizes)
        rows, columns = height // 4, width // 4
        self.encoder = nn.Sequential(
            nn.Unflatten(1, (1, height, width)),
            nn.Conv2d(1, channels, kernel_size=4, stride=2, padding=1),
            nn.BatchNorm2d(channels),
            nn.SiLU(),
            nn.Conv2d(channels, 2 * channels, kernel_size=4, stride=2, padding=1),
            nn.BatchNorm2d(2 * channels),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(2 * channels * rows * columns, hidden_size),
            nn.SiLU(),
        )
        self.decoder = ConvDecoder(self.config["latent_size"], hidden_size, channels, rows, columns)


def make_model(dataset: ImageData, options: train.Options) -> VAE:
    height, width = dataset.shape
    if height % 4 or width % 4:
        raise UserError(f"the convolutions need a height and width that are multiples of 4, not {height} x {width}")
    return ConvVAE(height, width, hidden_size=options.hidden_size, latent_size=options.latent_size)


if __name__ == "__main__":
    train.main(make_model, __doc__, hidden_size=256, latent_size=50, batch_size=128, lr=2e-3, kl_warmup=5, epochs=30)
