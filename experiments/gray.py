"""Another likelihood: of gray values, by the continuous Bernoulli (Loaiza-Ganem & Cunningham 2019, arXiv 1907.06845).

    python experiments/gray.py                        # train.py's options, with --binarize none by default
    python experiments/gray.py --resume RUN --nll-samples 5000

Cross-entropy with gray targets is no likelihood: as a density of x in [0, 1], p^x (1 - p)^(1 - x) does not integrate to
1. The continuous Bernoulli divides it by its integral. Its figures are log densities, which may be above 0, and compare
with those of other densities of the same gray values only.
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
    """A VAE of pixels x in [0, 1]: given logits l, p(x) = C(l) p^x (1 - p)^(1 - x) with p = sigmoid(l)."""

    support = constraints.unit_interval

    def is_likelihood(self, targets: Tensor) -> bool:
        """Not of black and white pixels only, as --binarize dynamic has them: of those, a Bernoulli's would be."""
        return super().is_likelihood(targets) and not VAE.support.check(targets).all()

    def log_likelihood(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """log p(x|z): the Bernoulli's formula and log C(l) of each pixel, where C(l) = l / tanh(l / 2) (eq. 8).

        In logits it is stable everywhere, as torch.distributions.ContinuousBernoulli, from probabilities, is not.
        """
        is_small = outputs.abs() < 0.05
        logits = torch.where(is_small, 1.0, outputs)  # else the gradient of 0 / 0, which is not taken, would be NaN
        log_constant = torch.log(logits / torch.tanh(0.5 * logits))
        series = math.log(2) + outputs**2 / 12
        return super().log_likelihood(outputs, targets) + torch.where(is_small, series, log_constant).sum(-1)

    def mean(self, outputs: Tensor) -> Tensor:
        """E[x|z] = 1/2 + 1 / (2 tanh(l / 2)) - 1 / l (eq. 9): pulled towards 1/2 from sigmoid(l)."""
        is_small = outputs.abs() < 0.05
        logits = torch.where(is_small, 1.0, outputs)
        return 0.5 + torch.where(is_small, outputs / 12, 0.5 / torch.tanh(0.5 * logits) - 1 / logits)


if __name__ == "__main__":
    train.main(GrayVAE, __doc__, binarize="none")
