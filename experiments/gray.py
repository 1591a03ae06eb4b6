"""Another likelihood: of gray values, by the continuous Bernoulli (Loaiza-Ganem & Cunningham 2019, arXiv 1907.06845).

    python experiments/gray.py                        # train.py's options, with --binarize none by default
    python experiments/gray.py --resume RUN --nll-samples 5000

Cross-entropy with gray targets is no likelihood: p^x (1 - p)^(1 - x) does not integrate to 1 over x in [0, 1]. The
continuous Bernoulli divides it by its integral. Its density can grow without bound at 0 and 1, as most of MNIST is, so
this is its integral over each of the 256 gray levels: a probability, which compares with that of any other model of
8-bit images.
"""

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, constraints

import train
from model import VAE


class GrayLevels(Distribution):
    """Pixels in 0, 1/255, ..., 1. The density of the continuous Bernoulli at x is proportional to exp(logit * x)."""

    support = constraints.unit_interval

    def __init__(self, logits: Tensor):
        self.logits = logits
        super().__init__(logits.shape, validate_args=False)

    def log_prob(self, x: Tensor) -> Tensor:
        """log P(level), where P(level) is proportional to exp(logit * level / 256).

        With a = |logit| and d the levels from x to the likelier end, it is the logarithm of exp(-a d / 256) times
        (1 - exp(-a / 256)) / (1 - exp(-a)), which is stable for all logits; near 0, its series.
        """
        a = self.logits.abs()
        levels = 255 * torch.where(self.logits < 0, x, 1 - x)
        is_small = a < 0.05
        large = torch.where(is_small, 1.0, a)  # otherwise the branch not taken has the gradient of 0 / 0
        log_ratio = torch.log(torch.expm1(-large / 256) / torch.expm1(-large))
        series = -math.log(256) + 255 / 512 * a - (1 - 256**-2) / 24 * a**2
        return torch.where(is_small, series, log_ratio) - a * levels / 256

    @property
    def mean(self) -> Tensor:
        """1/2 + 1 / (2 tanh(logit / 2)) - 1 / logit, the density's mean: nearer to 1/2 than sigmoid(logit)."""
        is_small = self.logits.abs() < 0.05
        logits = torch.where(is_small, 1.0, self.logits)
        return 0.5 + torch.where(is_small, self.logits / 12, 0.5 / torch.tanh(0.5 * logits) - 1 / logits)


class GrayVAE(VAE):
    """A VAE of gray pixels."""

    def likelihood(self, z: Tensor, y: Tensor | None = None) -> Distribution:
        return Independent(GrayLevels(self.decoder.logits(z).float()), 1)


if __name__ == "__main__":
    train.main(GrayVAE, __doc__, binarize="none")
