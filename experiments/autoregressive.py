"""Another likelihood: each pixel depends on z and on the pixels before it, as in DARN (Gregor et al. 2014).

    python experiments/autoregressive.py              # train.py's options, but for the defaults at the end of this file
    python experiments/autoregressive.py --resume RUN --nll-samples 5000

In the other models, pixels are independent given z, so z has to say exactly where each edge is. Here the decoder's
logits move with the pixels above and to the left (arXiv 1310.8499). Training needs only one more product of matrices,
because all pixels are known. Drawing pixels takes them one by one. The prior is that of flow_prior.py.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

import train
from data import ImageData
from experiments.flow_prior import FlowPriorVAE
from model import BernoulliPixels
from options import Options
from utils import UserError


class AutoregressivePixels(Distribution):
    """p(x) = p(x_1) p(x_2 | x_1) ... p(x_D | x_1, ..., x_D-1), of pixels that are 0 or 1.

    The logit of pixel i is logits[..., i] plus the sum of weight[i, j] (x_j - 0.5) over the pixels j < i. logits are
    (..., D). weight is (D, D), and only what lies below its diagonal counts.
    """

    support = constraints.independent(constraints.boolean, 1)

    def __init__(self, logits: Tensor, weight: Tensor):
        self.logits = logits
        self.weight = weight.tril(-1)
        super().__init__(logits.shape[:-1], logits.shape[-1:], validate_args=False)

    def log_prob(self, x: Tensor) -> Tensor:
        """(..., D) -> (...)."""
        return BernoulliPixels(self.logits + F.linear(x - 0.5, self.weight)).log_prob(x)

    @property
    def mean(self) -> Tensor:
        """(..., D): each pixel's probability, given the probabilities of those before it.

        It stands for the true mean, which has no closed form.
        """
        return self.in_turn(self.logits, torch.clone)

    def sample(self, sample_shape: torch.Size | tuple = ()) -> Tensor:
        """(*sample_shape, ..., D) in 0, 1."""
        return self.in_turn(self.logits.expand(*sample_shape, *self.logits.shape), torch.bernoulli)

    @torch.no_grad()
    def in_turn(self, logits: Tensor, value: Callable[[Tensor], Tensor]) -> Tensor:
        """Sets each pixel to the value of its probability, given the pixels before it. Returns logits' shape."""
        x = torch.zeros_like(logits)  # pixels, less 0.5
        for i, weights in enumerate(self.weight):
            x[..., i] = value(torch.sigmoid(logits[..., i] + x @ weights)) - 0.5
        return x + 0.5


class AutoregressiveVAE(FlowPriorVAE):
    """A VAE whose likelihood is AutoregressivePixels, and whose prior is a flow."""

    def __init__(self, input_size: int = 784, **sizes: Any):
        super().__init__(input_size, **sizes)
        self.pixel_weight = nn.Parameter(torch.zeros(input_size, input_size))

    def likelihood(self, z: Tensor, y: Tensor | None = None) -> Distribution:
        independent = super().likelihood(z, y)
        return AutoregressivePixels(independent.base_dist.logits, self.pixel_weight)

    def complete(self, *args: Any, **kwargs: Any) -> Tensor:
        """Raises NotImplementedError, because a draw of a pixel would have to know the pixels seen after it."""
        raise NotImplementedError

    @classmethod
    def for_data(cls, dataset: ImageData, options: Options) -> "AutoregressiveVAE":
        if options.likelihood != "bernoulli":
            raise UserError("autoregressive.py is for --likelihood bernoulli")
        return super().for_data(dataset, options)


if __name__ == "__main__":
    sizes = {"hidden_size": 512, "decoder_layers": 2, "activation": "silu", "latent_size": 50}
    train.main(AutoregressiveVAE, __doc__, **sizes, batch_size=256, lr=2e-3, kl_warmup=25, epochs=100)
