"""Another likelihood: of gray values, by the continuous Bernoulli (Loaiza-Ganem & Cunningham 2019, arXiv 1907.06845).

    python experiments/gray.py                        # train.py's options, with --binarize none by default
    python experiments/gray.py --resume RUN --nll-samples 5000

Cross-entropy with gray targets is no likelihood: p^x (1 - p)^(1 - x) does not integrate to 1 over x in [0, 1]. The
continuous Bernoulli is that, divided by its integral. Its density has no bound where x is 0 or 1, as most of MNIST is,
so the likelihood here is its integral over each of the 256 gray levels: a probability, whose figures compare with those
of any other model of 8-bit images.
"""

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import Tensor
from torch.distributions import constraints

import train
from model import VAE


class GrayVAE(VAE):
    """A VAE of pixels in 0, 1/255, ..., 1: given logits l, the density at x is proportional to exp(l x)."""

    support = constraints.unit_interval

    def is_likelihood(self, targets: Tensor) -> bool:
        """Not of black and white pixels only, as --binarize dynamic has them: of those, a Bernoulli's would be."""
        return super().is_likelihood(targets) and not VAE.support.check(targets).all()

    def log_likelihood(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """log p(x|z): the sum over pixels of log P(b), b = 255 x, where P(b) is proportional to exp(l b / 256).

        With a = |l| and d the levels from b to the likelier end, it is log of exp(-a d / 256) times
        (1 - exp(-a / 256)) / (1 - exp(-a)), which is stable for all l; near 0, its series.
        """
        a = outputs.abs()
        levels = 255 * torch.where(outputs < 0, targets, 1 - targets)
        is_small = a < 0.05
        large = torch.where(is_small, 1.0, a)  # else the gradient of 0 / 0, which is not taken, would be NaN
        log_ratio = torch.log(torch.expm1(-large / 256) / torch.expm1(-large))
        series = -math.log(256) + 255 / 512 * a - (1 - 256**-2) / 24 * a**2
        return (torch.where(is_small, series, log_ratio) - a * levels / 256).sum(-1)

    def mean(self, outputs: Tensor) -> Tensor:
        """E[x|z] = 1/2 + 1 / (2 tanh(l / 2)) - 1 / l, the density's mean: nearer to 1/2 than sigmoid(l)."""
        is_small = outputs.abs() < 0.05
        logits = torch.where(is_small, 1.0, outputs)
        return 0.5 + torch.where(is_small, outputs / 12, 0.5 / torch.tanh(0.5 * logits) - 1 / logits)


if __name__ == "__main__":
    train.main(GrayVAE, __doc__, binarize="none")
