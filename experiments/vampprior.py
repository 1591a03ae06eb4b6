"""Another prior: the VampPrior (Tomczak & Welling 2018, arXiv 1705.07120), a mixture of posteriors of learned inputs.

    python experiments/vampprior.py                   # train.py's options, but for the defaults at the end of this file
    python experiments/vampprior.py --objective iwae --importance-samples 5 --elbo-epochs 80 --epochs 100  # a lower nll
    python experiments/vampprior.py --resume RUN --nll-samples 5000

The posteriors leave holes in N(0, I), and the KL pays for the mismatch. This prior is
p(z) = 1/K sum_k q(z|u_k) (eq. 9), with K pseudo-inputs u_k that start as training images and are learned like weights.
Its KL has no closed form, so it is estimated from the draw of z.
"""

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

import train
from data import ImageData
from model import VAE, DiagonalNormal
from options import Options


class Mixture(Distribution):
    """The mixture of K DiagonalNormals (K, latent_size) with equal weights."""

    def __init__(self, components: DiagonalNormal):
        self.components = components
        super().__init__((), components.event_shape, validate_args=False)

    def log_prob(self, z: Tensor) -> Tensor:
        """(..., latent_size) -> (...).

        sum (z - mu)^2 / var is multiplied out, so that matrix products compute it without a tensor of (..., K,
        latent_size). In float64, because training may round the factors of float32 products, which would cost whole
        nats.
        """
        exact = torch.float32 if z.device.type == "mps" else torch.float64  # mps has no float64
        logvar, mu, x = (values.to(exact) for values in (self.components.logvar, self.components.mu, z))
        precision = torch.exp(-logvar)
        squares = x**2 @ precision.T - 2 * x @ (mu * precision).T + (mu**2 * precision).sum(-1)
        log_posteriors = -0.5 * (squares + (logvar + math.log(2 * math.pi)).sum(-1))
        return log_posteriors.to(z.dtype).logsumexp(-1) - math.log(len(mu))

    @torch.no_grad()
    def sample(self, sample_shape: torch.Size | tuple = ()) -> Tensor:
        """(*sample_shape, latent_size): draws from components that are drawn themselves."""
        k = torch.randint(len(self.components.mu), sample_shape, device=self.components.mu.device)
        return DiagonalNormal(self.components.mu[k], self.components.logvar[k]).rsample()


class VampVAE(VAE):
    """A VAE whose prior is the mixture of its own posteriors at num_pseudo_inputs learned pseudo-inputs."""

    def __init__(self, input_size: int = 784, num_pseudo_inputs: int = 500, **sizes: int | str):
        super().__init__(input_size, **sizes)
        self.config["num_pseudo_inputs"] = num_pseudo_inputs
        self.pseudo_inputs = nn.Parameter(torch.rand(num_pseudo_inputs, input_size))

    @classmethod
    def for_data(cls, dataset: ImageData, options: Options) -> "VampVAE":
        model = super().for_data(dataset, options)
        chosen = torch.randint(len(dataset.train_images), (len(model.pseudo_inputs),))
        model.pseudo_inputs.data = dataset.train_images[chosen].flatten(1) / 255
        return model

    def prior(self, y: Tensor | None = None) -> Distribution:
        return Mixture(self.posterior(self.pseudo_inputs.clamp(0, 1)))


if __name__ == "__main__":
    sizes = {"hidden_size": 512, "decoder_layers": 2, "activation": "silu", "latent_size": 50}
    train.main(VampVAE, __doc__, **sizes, batch_size=512, lr=2e-3, kl_warmup=25, epochs=80)
