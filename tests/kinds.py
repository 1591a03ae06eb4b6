"""Seven relatives of the VAE, each written against posterior, prior and likelihood alone, on 7 x 7 images."""

import torch
from torch import Tensor, nn
from torch.distributions import (
    Bernoulli,
    Categorical,
    ContinuousBernoulli,
    Distribution,
    Independent,
    MixtureSameFamily,
    Normal,
)

from model import VAE, DiagonalNormal

SIZE = 49


class SmallVAE(VAE):
    def __init__(self):
        super().__init__(SIZE, 16, 2)


class Coupling(nn.Module):
    """Shifts and scales the last latent by a function of the first, or the first by the last (Dinh et al. 2017)."""

    def __init__(self, flip: bool):
        super().__init__()
        self.flip, self.net = flip, nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 2))

    def forward(self, eps: Tensor) -> tuple[Tensor, Tensor]:
        """eps (..., 2) -> z (..., 2) and log |dz / deps| (...)."""
        first, last = (eps.flip(-1) if self.flip else eps).chunk(2, -1)
        shift, scale = self.net(first).chunk(2, -1)
        z = torch.cat([first, last * torch.exp(torch.tanh(scale)) + shift], -1)
        return z.flip(-1) if self.flip else z, torch.tanh(scale).sum(-1)

    def inverse(self, z: Tensor) -> Tensor:
        first, last = (z.flip(-1) if self.flip else z).chunk(2, -1)
        shift, scale = self.net(first).chunk(2, -1)
        eps = torch.cat([first, (last - shift) * torch.exp(-torch.tanh(scale))], -1)
        return eps.flip(-1) if self.flip else eps


class Flow(Distribution):
    """What layers make of draws of a base distribution."""

    def __init__(self, base: Distribution, layers: nn.ModuleList):
        self.base, self.layers = base, layers
        super().__init__(base.batch_shape, base.event_shape, validate_args=False)

    def rsample(self, sample_shape: tuple = ()) -> Tensor:
        return self.through(self.base.rsample(sample_shape))

    def through(self, eps: Tensor) -> Tensor:
        for layer in self.layers:
            eps, _ = layer(eps)
        return eps

    @property
    def mean(self) -> Tensor:
        """The image of the base's mean, for pictures."""
        return self.through(self.base.mean)

    def log_prob(self, z: Tensor) -> Tensor:
        log_det = 0.0
        for layer in reversed(self.layers):
            z = layer.inverse(z)
            log_det = log_det + layer(z)[1]
        return self.base.log_prob(z) - log_det


class FlowPrior(SmallVAE):
    def __init__(self):
        super().__init__()
        self.flow = nn.ModuleList([Coupling(False), Coupling(True)])

    def prior(self, y: Tensor | None = None) -> Distribution:
        return Flow(super().prior(y), self.flow)


class FlowPosterior(SmallVAE):
    def __init__(self):
        super().__init__()
        self.flow = nn.ModuleList([Coupling(False), Coupling(True)])

    def posterior(self, x: Tensor, y: Tensor | None = None) -> Distribution:
        return Flow(super().posterior(x, y), self.flow)


class MixturePrior(SmallVAE):
    """torch's mixture of normal distributions, which has sample, but no rsample."""

    def __init__(self):
        super().__init__()
        self.centres = nn.Parameter(torch.tensor([[1.0, 0.0], [-1.0, 1.0], [0.0, -1.5]]))

    def prior(self, y: Tensor | None = None) -> Distribution:
        components = Independent(Normal(self.centres, torch.full_like(self.centres, 0.7)), 1)
        return MixtureSameFamily(Categorical(logits=torch.zeros_like(self.centres[:, 0])), components)


class Joint(Distribution):
    """z = (z1, z2), one of which is drawn first, and the other given it."""

    def __init__(self, first: Distribution, conditional: nn.Module, is_z1_first: bool):
        self.first, self.conditional, self.is_z1_first = first, conditional, is_z1_first
        super().__init__(first.batch_shape, torch.Size([2]), validate_args=False)

    def second(self, first: Tensor) -> DiagonalNormal:
        return DiagonalNormal(*self.conditional(first).chunk(2, -1))

    def join(self, first: Tensor, second: Tensor) -> Tensor:
        return torch.cat([first, second] if self.is_z1_first else [second, first], -1)

    def rsample(self, sample_shape: tuple = ()) -> Tensor:
        first = self.first.rsample(sample_shape)
        return self.join(first, self.second(first).rsample())

    @property
    def mean(self) -> Tensor:
        return self.join(self.first.mean, self.second(self.first.mean).mean)

    def log_prob(self, z: Tensor) -> Tensor:
        first, second = z.chunk(2, -1) if self.is_z1_first else z.chunk(2, -1)[::-1]
        return self.first.log_prob(first) + self.second(first).log_prob(second)


class TwoLayers(VAE):
    """x <- z1 <- z2 (Burda et al. 2016), with one latent in each layer."""

    def __init__(self):
        super().__init__(SIZE, 16, 1)
        self.up = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 2))
        self.down = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 2))

    def posterior(self, x: Tensor, y: Tensor | None = None) -> Distribution:
        return Joint(super().posterior(x, y), self.up, is_z1_first=True)

    def prior(self, y: Tensor | None = None) -> Distribution:
        return Joint(super().prior(y), self.down, is_z1_first=False)

    def likelihood(self, z: Tensor, y: Tensor | None = None) -> Distribution:
        return super().likelihood(z[..., :1], y)


class Conditional(SmallVAE):
    """Each class has a prior and a decoder bias of its own."""

    def __init__(self):
        super().__init__()
        self.means, self.shades = nn.Embedding(10, 2), nn.Embedding(10, 16)

    def prior(self, y: Tensor | None = None) -> Distribution:
        mu = self.means(y)
        return DiagonalNormal(mu, torch.zeros_like(mu))

    def likelihood(self, z: Tensor, y: Tensor | None = None) -> Distribution:
        hidden = torch.relu(self.decoder.fc1(z) + self.shades(y))
        return Independent(Bernoulli(logits=self.decoder.fc2(hidden).float(), validate_args=False), 1)


class Gray(SmallVAE):
    """torch's likelihood of gray values."""

    def likelihood(self, z: Tensor, y: Tensor | None = None) -> Distribution:
        return Independent(ContinuousBernoulli(logits=self.decoder.logits(z).float(), validate_args=False), 1)


class Logistic(VAE):
    """The likelihood of 256 levels."""

    def __init__(self):
        super().__init__(SIZE, 16, 2, likelihood="logistic")


KINDS = [FlowPrior, FlowPosterior, MixturePrior, TwoLayers, Conditional, Gray, Logistic]
IN_GRAY = (Gray, Logistic)  # whose targets are not binarized
