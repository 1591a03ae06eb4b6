"""Other networks: a convolutional encoder and decoder of residual blocks, for images of any height and width.

    python experiments/convolutional.py               # train.py's options, but for the defaults at the end of this file
    python experiments/convolutional.py --resume RUN --nll-samples 5000

The encoder and the decoder change. For pixels of 256 levels the likelihood does too: the decoder gives each value's
scale, and how much each colour depends on those before it. All sizes follow from the images'. The encoder halves the
height and width once or more, until they are 8 or less, and doubles the channels each time. Residual blocks are only
there, where convolutions cost least: as many as --encoder-layers. The decoder goes the other way, with
--decoder-layers. Blocks add nothing at first, so no layer needs a normalization. Without --latent-size, there are 50
latents for 28 x 28 gray pixels, and twice as many for four times as many values.
"""

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

import train
from data import ImageData
from model import ACTIVATIONS, VAE, DiscretizedLogistic, EightBits
from options import Options

SIZES = {"hidden_size": 256, "latent_size": None, "encoder_layers": 1, "decoder_layers": 2, "activation": "silu"}


class Activation(nn.Module):
    """One of model.ACTIVATIONS, as a layer."""

    def __init__(self, name: str):
        super().__init__()
        self.function = ACTIVATIONS[name]

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Block(nn.Module):
    """Adds two convolutions of x (B, width, rows, columns) to x (He et al. 2016, arXiv 1603.05027)."""

    def __init__(self, width: int, activation: str):
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.conv1 = nn.Conv2d(width, width // 2, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(width // 2, width, kernel_size=3, padding=1)
        nn.init.zeros_(self.conv2.weight)  # at first, a block adds nothing
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(self.activation(x))
        return x + self.conv2(self.activation(y))


class ChannelsLast(nn.Module):
    """Returns x (B, C, H, W) with the channels of a pixel side by side in memory, which is faster on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        return x.clone(memory_format=torch.channels_last)


class ConvDecoder(nn.Sequential):
    """Layers that turn z (B, latent_size) into pictures (B, C, H, W), or larger ones to be cropped to that shape."""

    def __init__(self, shape: tuple[int, int, int], *layers: nn.Module):
        super().__init__(*layers)
        self.shape = shape

    def logits(self, z: Tensor) -> Tensor:
        """(..., latent_size) -> (..., C * H * W)."""
        pictures = self(z.reshape(-1, z.shape[-1]))[..., : self.shape[1], : self.shape[2]]
        return pictures.reshape(*z.shape[:-1], math.prod(self.shape))


class DependentColors(Distribution):
    """p(red) p(green | red) p(blue | red, green) for each pixel, where each factor is a DiscretizedLogistic.

    A factor's location moves with the colours before it, by weights times how far they are from their means (Salimans
    et al. 2017, arXiv 1701.05517, section 2.2). loc and log_scale are (..., C, pixels). weights
    (..., C * (C - 1) / 2, pixels) are those of red for green, of red for blue, and of green for blue.
    """

    support = constraints.independent(EightBits(), 1)

    def __init__(self, loc: Tensor, log_scale: Tensor, weights: Tensor):
        self.loc = loc
        self.log_scale = log_scale
        self.weights = weights
        super().__init__(loc.shape[:-2], (math.prod(loc.shape[-2:]),), validate_args=False)

    def given(self, x: Tensor) -> DiscretizedLogistic:
        """The distribution of each colour of a pixel, given those before it in x (..., C, pixels)."""
        errors = (x - self.mean.view_as(self.loc)).unbind(-2)
        weights = iter(self.weights.unbind(-2))
        moves = []
        for i, error in enumerate(errors):
            move = torch.zeros_like(error)
            for earlier in errors[:i]:
                move = move + next(weights) * earlier
            moves.append(move)
        return DiscretizedLogistic(self.loc + torch.stack(moves, -2), self.log_scale)

    def log_prob(self, x: Tensor) -> Tensor:
        """(..., C * pixels) -> (...)."""
        x = x.unflatten(-1, self.loc.shape[-2:])
        return self.given(x).log_prob(x).sum((-2, -1))

    @property
    def mean(self) -> Tensor:
        """(..., C * pixels): exact where no location moves below 0 or above 1."""
        return DiscretizedLogistic(self.loc, self.log_scale).mean.flatten(-2)

    @torch.no_grad()
    def sample(self, sample_shape: torch.Size | tuple = ()) -> Tensor:
        """(*sample_shape, ..., C * pixels) in 0, 1/255, ..., 1."""
        x = self.loc.repeat(*sample_shape, *(1 for _ in self.loc.shape))
        for i in range(self.loc.shape[-2]):  # each colour needs those before it
            x[..., i, :] = self.given(x).sample()[..., i, :]
        return x.flatten(-2)


class ConvVAE(VAE):
    """A VAE for images of shape (C, H, W). Once their height and width are halved, there are `width` channels."""

    def __init__(
        self,
        input_size: int = 784,
        shape: tuple[int, int, int] = (1, 28, 28),
        width: int = 32,
        latent_size: int | None = None,
        **sizes: int | str,
    ):
        latent_size = latent_size or round(50 * math.sqrt(input_size / 784))
        super().__init__(input_size, latent_size=latent_size, **sizes)
        self.config |= {"shape": shape, "width": width}
        hidden_size = self.config["hidden_size"]
        activation = self.config["activation"]
        channels, height, columns = shape
        outputs = channels  # of each pixel: logits, or locations, scales and the weights of DependentColors
        if self.config["likelihood"] == "logistic":
            outputs += channels + channels * (channels - 1) // 2
        halvings = max(1, math.ceil(math.log2(max(height, columns) / 8)))
        scale = 2**halvings
        grid = width * scale // 2, math.ceil(height / scale), math.ceil(columns / scale)
        features = math.prod(grid)
        down = []
        up = []
        for after in (width * 2**i for i in range(halvings)):
            down += [nn.Conv2d(channels, after, kernel_size=4, stride=2, padding=1), Activation(activation)]
            before = channels if up else outputs
            up = [Activation(activation), nn.ConvTranspose2d(after, before, kernel_size=4, stride=2, padding=1), *up]
            channels = after
        self.encoder = nn.Sequential(
            nn.Unflatten(1, shape),
            nn.ZeroPad2d((0, scale * grid[2] - columns, 0, scale * grid[1] - height)),
            ChannelsLast(),
            *down[:-1],
            *(Block(channels, activation) for _ in range(self.config["encoder_layers"])),
            Activation(activation),
            nn.Flatten(),
            nn.Linear(features, hidden_size),
            Activation(activation),
        )
        self.decoder = ConvDecoder(
            (outputs, height, columns),
            nn.Linear(latent_size, features),
            nn.Unflatten(1, grid),
            ChannelsLast(),
            *(Block(channels, activation) for _ in range(self.config["decoder_layers"])),
            *up,
        )
        nn.init.constant_(self.latent_z.logvar.bias, -4)  # less noise in z, so that the decoder learns to use it
        nn.init.kaiming_uniform_(self.latent_z.mu.weight)

    def likelihood(self, z: Tensor, y: Tensor | None = None) -> Distribution:
        """As VAE has it, but a logistic has a scale of its own, so a plain background costs few bits."""
        if self.config["likelihood"] == "bernoulli":
            return super().likelihood(z, y)
        channels, *_ = self.config["shape"]
        outputs = self.decoder.logits(z).to(self.log_scale.dtype).unflatten(-1, (self.decoder.shape[0], -1))
        logits, log_factor, weights = outputs.tensor_split((channels, 2 * channels), -2)
        return DependentColors(0.5 + 0.25 * logits, self.log_scale[:, None] + log_factor, weights)

    @classmethod
    def for_data(cls, dataset: ImageData, options: Options) -> "ConvVAE":
        return super().for_data(dataset, options, shape=dataset.shape)


if __name__ == "__main__":
    train.main(ConvVAE, __doc__, **SIZES, lr=2e-3, kl_warmup=5)
