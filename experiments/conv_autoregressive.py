"""Convolutions, a flow as prior, and pixels that depend on those before them: the lowest nll of digits here.

    python experiments/conv_autoregressive.py         # train.py's options, but for the defaults at the end of this file
    python experiments/conv_autoregressive.py --resume RUN --nll-samples 5000

Two experiments in one: conv_flow.py with the likelihood of autoregressive.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import train
from experiments.autoregressive import AutoregressiveVAE
from experiments.conv_flow import ConvFlowVAE
from experiments.convolutional import SIZES


class ConvAutoregressiveVAE(AutoregressiveVAE, ConvFlowVAE):
    """A ConvFlowVAE whose likelihood is AutoregressivePixels."""


if __name__ == "__main__":
    train.main(ConvAutoregressiveVAE, __doc__, **SIZES, lr=2e-3, kl_warmup=5)
