"""Relatives of the VAE on 7 x 7 images. Together they override all that a subclass may override."""

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

from experiments.flow_posterior import FlowPosteriorVAE
from experiments.flow_prior import FlowPriorVAE
from experiments.two_layers import TwoLayerVAE
from model import VAE, DiagonalNormal

SIZE = 49


class SmallVAE(VAE):
    def __init__(self):
        super().__init__(SIZE, 16, 2)


class Normalized(SmallVAE):
    """Dropout, a normalization with statistics that only training changes, and weights that are idle or frozen.

    There is no bias before the normalization: of gradients that are 0 but for rounding, Adam makes whole steps.
    """

    def __init__(self):
        super().__init__()
        layers = nn.Linear(SIZE, 16, bias=False), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.1)
        self.encoder, self.spare = nn.Sequential(*layers), nn.Linear(2, 2)
        self.decoder.fc1.weight.requires_grad_(False)


class FlowPrior(FlowPriorVAE):
    def __init__(self):
        super().__init__(SIZE, num_couplings=2, width=8, hidden_size=16, latent_size=2)


class FlowPosterior(FlowPosteriorVAE):
    def __init__(self):
        super().__init__(SIZE, num_couplings=2, width=8, hidden_size=16, latent_size=2)


class TwoLayers(TwoLayerVAE):
    """With one latent in each layer."""

    def __init__(self):
        super().__init__(SIZE, hidden_size=16, latent_size=2)


class MixturePrior(SmallVAE):
    """torch's mixture of normal distributions, which has sample, but no rsample."""

    def __init__(self):
        super().__init__()
        self.centres = nn.Parameter(torch.tensor([[1.0, 0.0], [-1.0, 1.0], [0.0, -1.5]]))

    def prior(self, y: Tensor | None = None) -> Distribution:
        components = Independent(Normal(self.centres, torch.full_like(self.centres, 0.7)), 1)
        return MixtureSameFamily(Categorical(logits=torch.zeros_like(self.centres[:, 0])), components)


class Conditional(SmallVAE):
    """Each class has a prior and a decoder bias of its own."""

    def __init__(self):
        super().__init__()
        self.means = nn.Embedding(10, 2)
        self.shades = nn.Embedding(10, 16)

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
