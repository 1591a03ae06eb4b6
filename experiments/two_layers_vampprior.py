"""Two layers of latents with a VampPrior on top (Tomczak & Welling 2018, arXiv 1705.07120).

    python experiments/two_layers_vampprior.py        # train.py's options, but for the defaults at the end of this file
    python experiments/two_layers_vampprior.py --resume RUN --nll-samples 5000

Two experiments in one: two_layers.py with vampprior.py's mixture for z2. In the paper, q(z2|x) reads images, so its
pseudo-inputs are images, and q(z1|x, z2) and p(x|z1, z2) read z2 too. Here q(z2|z1) reads z1, so the pseudo-inputs are
values of z1.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

import train
from experiments.two_layers import Joint, TwoLayerVAE
from experiments.vampprior import Mixture


class TwoLayerVampVAE(TwoLayerVAE):
    """A TwoLayerVAE whose p(z2) is the mixture of q(z2|z1) at num_pseudo_inputs learned z1."""

    def __init__(self, input_size: int = 784, num_pseudo_inputs: int = 500, **sizes: int | str):
        super().__init__(input_size, **sizes)
        self.config["num_pseudo_inputs"] = num_pseudo_inputs
        self.pseudo_inputs = nn.Parameter(torch.randn(num_pseudo_inputs, self.sizes[0]))

    def prior(self, y: Tensor | None = None) -> Distribution:
        return Joint(Mixture(self.up(self.pseudo_inputs)), self.down, self.sizes, is_upwards=False)


if __name__ == "__main__":
    sizes = {"hidden_size": 512, "decoder_layers": 2, "activation": "silu", "latent_size": 75}
    train.main(TwoLayerVampVAE, __doc__, **sizes, batch_size=256, lr=2e-3, kl_warmup=25, epochs=100)
