"""Another prior: a flow of coupling layers, as in RealNVP (Dinh et al. 2017, arXiv 1605.08803).

    python experiments/flow_prior.py                  # train.py's options, but for the defaults at the end of this file
    python experiments/flow_prior.py --resume RUN --nll-samples 5000

The posteriors leave holes in N(0, I), and the KL pays for the mismatch. This prior bends N(0, I) until it fits them
(Chen et al. 2017, arXiv 1611.02731). Its density is exact, and takes one pass through the layers.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

import train
from model import VAE


class Coupling(nn.Module):
    """Scales and shifts half of z by functions of the other half, which is kept (Dinh et al. 2017, eq. 4, 5)."""

    def __init__(self, latent_size: int, width: int):
        super().__init__()
        kept_size = latent_size // 2
        self.first = nn.Linear(kept_size, width)
        last = nn.Linear(width, 2 * (latent_size - kept_size))
        self.rest = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU(), last)
        nn.init.zeros_(last.weight)  # so that at first, every z is scaled and shifted alike, and little

    def forward(self, z: Tensor, context: Tensor | float, invert: bool = False) -> tuple[Tensor, Tensor]:
        """z (..., latent_size) -> eps, log |det(d eps / dz)| (...), or back.

        context (B, width) is added to first's output.
        """
        other, kept = z.tensor_split(2, -1)
        log_scale, shift = self.rest(self.first(kept) + context).to(z.dtype).chunk(2, -1)
        log_scale = torch.tanh(log_scale)
        other = (other - shift) * torch.exp(-log_scale) if invert else other * torch.exp(log_scale) + shift
        return torch.cat([other, kept], -1), log_scale.sum(-1)


class Flow(Distribution):
    """The distribution of z that layers turn into draws of a base. Before each layer, the halves of z are swapped.

    contexts are the layers' own, by default 0.
    """

    def __init__(self, base: Distribution, layers: nn.ModuleList, contexts: tuple[Tensor, ...] | None = None):
        self.base = base
        self.layers = layers
        self.contexts = contexts or (0.0,) * len(layers)
        self.has_rsample = True
        super().__init__(base.batch_shape, base.event_shape, validate_args=False)

    def log_prob(self, z: Tensor) -> Tensor:
        """(..., latent_size) -> (...): the change of variables (Dinh et al. 2017, eq. 3)."""
        log_det = 0.0
        for layer, context in zip(self.layers, self.contexts, strict=True):
            z, change = layer(z.roll(z.shape[-1] // 2, -1), context)
            log_det = log_det + change
        return self.base.log_prob(z) + log_det

    def invert(self, eps: Tensor) -> Tensor:
        """The z that become eps, both (..., latent_size)."""
        for layer, context in zip(reversed(self.layers), reversed(self.contexts), strict=True):
            eps = layer(eps, context, invert=True)[0].roll(-(eps.shape[-1] // 2), -1)
        return eps

    def rsample(self, sample_shape: torch.Size | tuple = ()) -> Tensor:
        return self.invert(self.base.rsample(sample_shape))


class FlowPriorVAE(VAE):
    """A VAE whose prior is a flow of num_couplings layers."""

    def __init__(self, input_size: int = 784, num_couplings: int = 6, width: int = 128, **sizes: int | str):
        super().__init__(input_size, **sizes)
        self.config |= {"num_couplings": num_couplings, "width": width}
        self.flow = nn.ModuleList(Coupling(self.config["latent_size"], width) for _ in range(num_couplings))

    def prior(self, y: Tensor | None = None) -> Distribution:
        return Flow(super().prior(y), self.flow)


if __name__ == "__main__":
    sizes = {"hidden_size": 512, "decoder_layers": 2, "activation": "silu", "latent_size": 50}
    train.main(FlowPriorVAE, __doc__, **sizes, batch_size=256, lr=2e-3, kl_warmup=25, epochs=100)
