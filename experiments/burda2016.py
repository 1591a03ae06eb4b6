"""Another start and schedule: the VAE of Burda et al. 2016 (arXiv 1509.00519), table 1, one stochastic layer.

    python experiments/burda2016.py --nll-samples 5000        # 3,280 epochs; the first third with --epochs 1093
    python experiments/burda2016.py --objective iwae --importance-samples 5

Weights are Glorot-uniform, and the output's bias gives the mean image. The learning rate falls by 10^(-1/7) after 1,
1 + 3, 1 + 3 + 9, ... epochs. Adam's epsilon is compared with gradients that are summed over the 20 images, here and in
the paper's own code (github.com/yburda/iwae), which has 0.99 for Adam's first beta. Here it is 0.9, as in the paper.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import Tensor, nn

import train
from data import ImageData
from model import VAE
from options import Options


class BurdaVAE(VAE):
    """A VAE with the paper's initial weights."""

    @classmethod
    def for_data(cls, dataset: ImageData, options: Options) -> "BurdaVAE":
        model = super().for_data(dataset, options)
        initialize(model, dataset.train_images.flatten(1))
        return model


@torch.no_grad()
def initialize(model: VAE, images: Tensor) -> None:
    """Glorot-uniform weights, and the last bias such that the decoder returns the mean of the images (N, D) uint8."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            layer.bias.zero_()
    *_, output_layer = model.decoder.children()
    output_layer.bias.copy_(torch.logit(images.double().mean(0) / 255, eps=1e-3))


def learning_rate(done: float, options: Options) -> float:
    """Adam's step size after `done` epochs."""
    i = 0
    while done >= (3 ** (i + 1) - 1) / 2:
        i += 1
    return options.lr * 10 ** (-i / 7)


SIZES = {"hidden_size": 200, "decoder_layers": 2, "activation": "tanh"}
TRAINING = {"batch_size": 20, "lr": 1e-3, "adam_eps": 1e-4, "average": False, "epochs": 3280}

if __name__ == "__main__":
    train.main(BurdaVAE, __doc__, learning_rate=learning_rate, latent_size=50, **SIZES, **TRAINING)
