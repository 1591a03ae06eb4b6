"""Other networks: a convolutional encoder and decoder of residual blocks, for images of any height and width.

    python experiments/convolutional.py               # train.py's options, but for the defaults at the end of this file
    python experiments/convolutional.py --resume RUN --nll-samples 5000

Only self.encoder, self.decoder and initial weights change. The encoder halves the height and width twice and ends in
--hidden-size features. The decoder goes the other way and crops its pictures to the images' size. --encoder-layers and
--decoder-layers count the residual blocks at each of the two resolutions.
"""

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from torch import Tensor, nn

import train
from data import ImageData
from model import ACTIVATIONS, VAE, Encoder
from options import Options


class Block(nn.Module):
    """Adds two convolutions of x (B, width, rows, columns) to x (He et al. 2015, arXiv 1512.03385)."""

    def __init__(self, width: int, activation: str):
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.conv1 = nn.Conv2d(width, width, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(width, width, kernel_size=3, padding=1)
        self.norm1 = nn.GroupNorm(1, width)  # the same in training and in tests
        self.norm2 = nn.GroupNorm(1, width)
        nn.init.zeros_(self.norm2.weight)  # at first, a block adds nothing

    def forward(self, x: Tensor) -> Tensor:
        y = self.activation(self.norm1(self.conv1(x)))
        return self.activation(x + self.norm2(self.conv2(y)))


class ConvDecoder(nn.Sequential):
    """Layers that turn z (B, latent_size) into pictures (B, C, H, W), or larger ones to be cropped to that shape."""

    def __init__(self, shape: tuple[int, int, int], *layers: nn.Module):
        super().__init__(*layers)
        self.shape = shape

    def logits(self, z: Tensor) -> Tensor:
        """(..., latent_size) -> (..., C * H * W)."""
        pictures = self(z.reshape(-1, z.shape[-1]))[..., : self.shape[1], : self.shape[2]]
        return pictures.reshape(*z.shape[:-1], math.prod(self.shape))


class ConvVAE(VAE):
    """A VAE for images of shape (C, H, W), with feature maps `width` and 2 * width channels wide."""

    def __init__(self, input_size: int = 784, shape: tuple[int, int, int] = (1, 28, 28), width: int = 32, **sizes):
        super().__init__(input_size, **sizes)
        self.config |= {"shape": shape, "width": width}
        hidden_size = self.config["hidden_size"]
        activation = self.config["activation"]
        down = [nn.Unflatten(1, shape)]
        up = []
        for before, after in ((shape[0], width), (width, 2 * width)):
            down += [nn.Conv2d(before, after, kernel_size=3, stride=2, padding=1)]
            down += [Block(after, activation) for _ in range(self.config["encoder_layers"])]
            up = [nn.ConvTranspose2d(after, before, kernel_size=4, stride=2, padding=1), *up]
            up = [Block(after, activation) for _ in range(self.config["decoder_layers"])] + up
        grid = 2 * width, math.ceil(shape[1] / 4), math.ceil(shape[2] / 4)
        features = math.prod(grid)
        self.encoder = nn.Sequential(*down, nn.Flatten(), Encoder(features, hidden_size, 1, activation))
        self.decoder = ConvDecoder(shape, nn.Linear(self.config["latent_size"], features), nn.Unflatten(1, grid), *up)
        nn.init.constant_(self.latent_z.logvar.bias, -4)  # less noise in z, so that the decoder learns to use it
        nn.init.kaiming_uniform_(self.latent_z.mu.weight)

    @classmethod
    def for_data(cls, dataset: ImageData, options: Options) -> "ConvVAE":
        return super().for_data(dataset, options, shape=dataset.shape)


if __name__ == "__main__":
    sizes = {"hidden_size": 256, "latent_size": 50, "encoder_layers": 1, "activation": "silu"}
    train.main(ConvVAE, __doc__, **sizes, lr=2e-3, kl_warmup=5)
