"""Convolutions with a flow as prior: the lowest nll of digits here, and samples of pictures that have a shape.

    python experiments/conv_flow.py                   # train.py's options, but for the defaults at the end of this file
    python experiments/conv_flow.py --resume RUN --nll-samples 5000

Two experiments in one: convolutional.py with flow_prior.py's coupling layers.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from torch import Tensor, nn
from torch.distributions import Distribution

import train
from experiments.convolutional import SIZES, ConvVAE
from experiments.flow_prior import Coupling, Flow


class ConvFlowVAE(ConvVAE):
    """A ConvVAE whose prior is a flow of num_couplings layers."""

    def __init__(self, input_size: int = 784, num_couplings: int = 6, flow_width: int = 128, **sizes: Any):
        super().__init__(input_size, **sizes)
        self.config |= {"num_couplings": num_couplings, "flow_width": flow_width}
        latent_size = self.config["latent_size"]
        self.flow = nn.ModuleList(Coupling(latent_size, flow_width) for _ in range(num_couplings))

    def prior(self, y: Tensor | None = None) -> Distribution:
        return Flow(super().prior(y), self.flow)


if __name__ == "__main__":
    train.main(ConvFlowVAE, __doc__, **SIZES, lr=2e-3, kl_warmup=5)
