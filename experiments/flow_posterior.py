"""Another posterior: a normal distribution whose noise comes from a flow (Rezende & Mohamed 2015, arXiv 1505.05770).

    python experiments/flow_posterior.py              # train.py's options, but for the defaults at the end of this file
    python experiments/flow_posterior.py --resume RUN --nll-samples 5000

The latents of N(mu, diag(exp(logvar))) do not depend on each other, but those of the true posterior do. Here, too,
z = mu + exp(logvar / 2) eps, but eps is drawn from a flow that reads the encoder's features. log_prob is given z alone
and has to find its eps. With coupling layers (Dinh et al. 2017, arXiv 1605.08803), that takes one pass, like drawing.
An inverse autoregressive flow (Kingma et al. 2016, arXiv 1606.04934) would need a pass for each latent.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

import train
from experiments.flow_prior import Coupling, Flow
from model import VAE, DiagonalNormal


class FlowPosterior(Distribution):
    """The distribution of z = mu + exp(logvar / 2) eps, with mu and logvar (B, latent_size) and eps from a flow."""

    has_rsample = True

    def __init__(self, normal: DiagonalNormal, noise: Flow):
        self.mu = normal.mu
        self.log_std = 0.5 * normal.logvar
        self.noise = noise
        super().__init__(normal.batch_shape, normal.event_shape, validate_args=False)

    def rsample(self, sample_shape: torch.Size | tuple = ()) -> Tensor:
        return self.mu + torch.exp(self.log_std) * self.noise.rsample(sample_shape)

    @property
    def mean(self) -> Tensor:
        """(B, latent_size): the z of the base's mean. It stands for the true mean, which has no closed form."""
        return self.mu + torch.exp(self.log_std) * self.noise.invert(self.noise.base.mean)

    def log_prob(self, z: Tensor) -> Tensor:
        """(..., B, latent_size) -> (..., B)."""
        return self.noise.log_prob((z - self.mu) * torch.exp(-self.log_std)) - self.log_std.sum(-1)


class FlowPosteriorVAE(VAE):
    """A VAE whose posterior's noise comes from a flow of num_couplings layers that read the encoder's features."""

    def __init__(self, input_size: int = 784, num_couplings: int = 4, width: int = 128, **sizes: int | str):
        super().__init__(input_size, **sizes)
        self.config |= {"num_couplings": num_couplings, "width": width}
        self.flow = nn.ModuleList(Coupling(self.config["latent_size"], width) for _ in range(num_couplings))
        self.contexts = nn.Linear(self.config["hidden_size"], num_couplings * width)  # one for each layer

    def posterior(self, x: Tensor, y: Tensor | None = None) -> Distribution:
        hidden = self.encoder(x.flatten(1))
        q = self.latent_z.posterior(hidden)
        contexts = self.contexts(hidden).chunk(len(self.flow), -1)
        zeros = torch.zeros_like(q.mu)
        return FlowPosterior(q, Flow(DiagonalNormal(zeros, zeros), self.flow, contexts))


if __name__ == "__main__":
    sizes = {"hidden_size": 512, "decoder_layers": 2, "activation": "silu", "latent_size": 50}
    train.main(FlowPosteriorVAE, __doc__, **sizes, batch_size=256, lr=2e-3, kl_warmup=25, epochs=100)
