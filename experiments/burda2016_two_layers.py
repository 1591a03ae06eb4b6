"""Two layers of latents as in Burda et al. 2016 (arXiv 1509.00519), table 1: two_layers.py and burda2016.py in one.

    python experiments/burda2016_two_layers.py --nll-samples 5000
    python experiments/burda2016_two_layers.py --objective iwae --importance-samples 5

z1 has 100 of the 150 latents.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import train
from experiments.burda2016 import SIZES, TRAINING, BurdaVAE, learning_rate
from experiments.two_layers import TwoLayerVAE


class BurdaTwoLayerVAE(BurdaVAE, TwoLayerVAE):
    """A TwoLayerVAE with the paper's initial weights."""


if __name__ == "__main__":
    train.main(BurdaTwoLayerVAE, __doc__, learning_rate=learning_rate, latent_size=150, **SIZES, **TRAINING)
