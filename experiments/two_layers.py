"""Two layers of latents, x <- z1 <- z2 (Burda et al. 2016, arXiv 1509.00519, table 1).

    python experiments/two_layers.py                  # train.py's options, but for the defaults at the end of this file
    python experiments/two_layers.py --resume RUN --nll-samples 5000

The posterior of z = (z1, z2) is q(z1|x) q(z2|z1), the prior p(z2) p(z1|z2), and the likelihood p(x|z1). A third of
--latent-size is z2. The networks between z1 and z2 are as deep as the others and half as wide. For three layers, let a
Joint be the first distribution of another.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

import train
from model import VAE, Decoder, DiagonalNormal, Encoder, LatentZ


class Conditional(nn.Sequential):
    """An Encoder and a LatentZ, which map the latents of one layer to the distribution of the other layer's."""

    def forward(self, z: Tensor) -> DiagonalNormal:
        return self[1].posterior(self[0](z))


class Joint(Distribution):
    """The distribution of z = (z1, z2). Upwards, z1 is drawn first, and z2 given z1; otherwise z2, and z1 given z2."""

    def __init__(self, first: Distribution, second: Conditional, sizes: tuple[int, int], is_upwards: bool):
        self.first = first
        self.second = second
        self.sizes = sizes
        self.is_upwards = is_upwards
        super().__init__(first.batch_shape, (sum(sizes),), validate_args=False)

    def rsample(self, sample_shape: torch.Size | tuple = ()) -> Tensor:
        draw = self.first.rsample if self.is_upwards else self.first.sample  # a prior may lack rsample
        first = draw(sample_shape)
        return self.join(first, self.second(first).rsample())

    @property
    def mean(self) -> Tensor:
        """(..., latent_size): the first's mean, and the other's mean given that, which stands for its true mean."""
        return self.join(self.first.mean, self.second(self.first.mean).mean)

    def join(self, first: Tensor, second: Tensor) -> Tensor:
        return torch.cat([first, second] if self.is_upwards else [second, first], -1)

    def log_prob(self, z: Tensor) -> Tensor:
        """(..., latent_size) -> (...)."""
        z1, z2 = z.split(self.sizes, -1)
        first, second = (z1, z2) if self.is_upwards else (z2, z1)
        return self.first.log_prob(first) + self.second(first).log_prob(second)


class TwoLayerVAE(VAE):
    """A VAE with two layers of latents."""

    def __init__(self, input_size: int = 784, **sizes: int | str):
        super().__init__(input_size, **sizes)
        wide = self.config["hidden_size"]
        narrow = (wide + 1) // 2
        up = self.config["encoder_layers"]
        down = self.config["decoder_layers"]
        activation = self.config["activation"]
        size2 = (self.config["latent_size"] + 1) // 3
        size1 = self.config["latent_size"] - size2
        self.sizes = (size1, size2)
        self.latent_z = LatentZ(wide, size1)
        self.decoder = Decoder(size1, wide, input_size, down, activation)
        self.up = Conditional(Encoder(size1, narrow, up, activation), LatentZ(narrow, size2))
        self.down = Conditional(Encoder(size2, narrow, down, activation), LatentZ(narrow, size1))

    def posterior(self, x: Tensor, y: Tensor | None = None) -> Distribution:
        return Joint(super().posterior(x, y), self.up, self.sizes, is_upwards=True)

    def prior(self, y: Tensor | None = None) -> Distribution:
        zeros = next(self.parameters()).new_zeros(self.sizes[1])
        return Joint(DiagonalNormal(zeros, zeros), self.down, self.sizes, is_upwards=False)

    def likelihood(self, z: Tensor, y: Tensor | None = None) -> Distribution:
        return super().likelihood(z[..., : self.sizes[0]], y)


if __name__ == "__main__":
    sizes = {"hidden_size": 512, "decoder_layers": 2, "activation": "silu", "latent_size": 75}
    train.main(TwoLayerVAE, __doc__, **sizes, batch_size=256, lr=2e-3, kl_warmup=25, epochs=100)
