"""Labels: a conditional VAE (Sohn et al. 2015, NeurIPS 28). Encoder and decoder are told the class y of each image.

    python experiments/conditional.py                 # train.py's options
    python experiments/conditional.py --resume RUN --nll-samples 5000

Two of the three distributions use the labels that the training loop passes on. nll is the mean of -log p(x|y), and each
row of prior_samples.png is drawn for one class.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Distribution

import train
from data import ImageData
from model import VAE, Decoder, Encoder
from options import Options


class ConditionalVAE(VAE):
    """A VAE whose encoder and decoder read the label beside their input, one-hot."""

    def __init__(self, input_size: int = 784, num_classes: int = 10, **sizes: int | str):
        super().__init__(input_size, **sizes)
        config = self.config
        config["num_classes"] = num_classes
        hidden_size = config["hidden_size"]
        to_encoder = input_size + num_classes
        to_decoder = config["latent_size"] + num_classes
        self.encoder = Encoder(to_encoder, hidden_size, config["encoder_layers"], config["activation"])
        self.decoder = Decoder(to_decoder, hidden_size, input_size, config["decoder_layers"], config["activation"])

    @classmethod
    def for_data(cls, dataset: ImageData, options: Options, **more: int) -> "ConditionalVAE":
        return super().for_data(dataset, options, num_classes=len(dataset.classes), **more)

    def posterior(self, x: Tensor, y: Tensor | None = None) -> Distribution:
        return super().posterior(self.append_labels(x.flatten(1), y))

    def likelihood(self, z: Tensor, y: Tensor | None = None) -> Distribution:
        return super().likelihood(self.append_labels(z, y))

    def append_labels(self, values: Tensor, y: Tensor | None) -> Tensor:
        """Appends the labels y (B,) to values (..., B, D): (..., B, D + num_classes)."""
        if y is None:
            raise ValueError("ConditionalVAE needs the labels y of its images")
        labels = F.one_hot(y, self.config["num_classes"]).to(values.dtype)
        return torch.cat([values, labels.expand(*values.shape[:-1], -1)], -1)


if __name__ == "__main__":
    train.main(ConditionalVAE, __doc__)
