"""Few labels: a conditional VAE that is given ten labels per class and infers the rest (Kingma et al. 2014, M2).

    python experiments/semi_supervised.py             # train.py's options, but for the defaults at the end of this file
    python experiments/semi_supervised.py --resume RUN --nll-samples 5000

The loss of an image is U(x) (arXiv 1406.5298, eq. 7; --beta weighs its KL) plus, for the labelled images, GAMMA times
their mean L(x, y) (eq. 6) and ALPHA times their mean classifier loss (eq. 9). Test losses and nll bound -log p(x|y).
"""

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import train
from data import ImageData
from experiments.conditional import ConditionalVAE
from model import Encoder
from options import Options
from utils import UserError

LABELS = 10  # labelled images of each class
ALPHA = 32.0  # weight of the classifier's loss
GAMMA = 0.25  # weight of the labelled images' loss


class SemiSupervisedVAE(ConditionalVAE):
    """A ConditionalVAE with a classifier q(y|x), and the first LABELS images (uint8) of each class, sorted by class."""

    def __init__(self, input_size: int = 784, num_classes: int = 10, **sizes: int | str):
        super().__init__(input_size, num_classes, **sizes)
        hidden_size = self.config["hidden_size"]
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Dropout(0.2),
            Encoder(input_size, hidden_size, self.config["encoder_layers"], self.config["activation"]),
            nn.Dropout(),
            nn.Linear(hidden_size, num_classes),
        )
        self.register_buffer("labels", torch.arange(num_classes).repeat_interleave(LABELS))
        self.register_buffer("labelled", torch.zeros(num_classes * LABELS, input_size, dtype=torch.uint8))

    @classmethod
    def for_data(cls, dataset: ImageData, options: Options) -> "SemiSupervisedVAE":
        if (
            options.objective != "elbo"
            or options.likelihood != "bernoulli"
            or options.binarize not in (None, "dynamic")
        ):
            raise UserError("semi_supervised.py is for --objective elbo, --likelihood bernoulli and --binarize dynamic")
        num_classes = len(dataset.classes)
        y = dataset.train_labels
        if num_classes < 2 or y.bincount(minlength=num_classes).min() < LABELS:
            raise UserError(f"semi_supervised.py needs two or more classes, with {LABELS} or more images of each")
        model = super().for_data(dataset, options)
        images = dataset.train_images.flatten(1)
        model.labelled.copy_(torch.cat([images[y == i][:LABELS] for i in range(num_classes)]))
        return model

    def loss(
        self, inputs: Tensor, targets: Tensor, y: Tensor | None = None, kl_weight: float | Tensor = 1.0
    ) -> tuple[Tensor, Tensor]:
        """The loss above, and U(x), each (B,). The labels y are not used."""
        reconstruction, kl = self.unlabelled_terms(inputs, targets)
        labelled = torch.bernoulli(self.labelled / 255)
        with_label = sum(self.elbo_terms(labelled, labelled, self.labels)).mean()
        classification = F.cross_entropy(self.classifier(labelled).float(), self.labels)
        loss = reconstruction + kl_weight * kl + GAMMA * with_label + ALPHA * classification
        return loss, reconstruction + kl

    def unlabelled_terms(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The two terms of U(x), each (B,): means over q(y|x), and the KL also of q(y|x) to a uniform p(y)."""
        log_q = self.classifier(inputs).float().log_softmax(-1)  # (B, C)
        q = log_q.exp()
        num_classes = log_q.shape[1]
        every_y = torch.arange(num_classes, device=inputs.device).repeat(len(inputs))
        inputs = inputs.repeat_interleave(num_classes, 0)
        targets = targets.repeat_interleave(num_classes, 0)
        reconstruction, kl = (term.view_as(log_q) for term in self.elbo_terms(inputs, targets, every_y))
        return (q * reconstruction).sum(1), (q * (kl + log_q + math.log(num_classes))).sum(1)


def report(model: SemiSupervisedVAE, dataset: ImageData) -> None:
    """Prints the classifier's error on gray images, beside that of one trained on the labelled images alone."""
    device = model.labelled.device
    alone = SemiSupervisedVAE(**model.config).to(device)
    adam = torch.optim.Adam(alone.classifier.parameters())
    for _ in range(300):
        adam.zero_grad()
        F.cross_entropy(alone.classifier(torch.bernoulli(model.labelled / 255)), model.labels).backward()
        adam.step()
    x = dataset.test_images.to(device) / 255
    y = dataset.test_labels.to(device)
    error, error_alone = ((each.eval().classifier(x).argmax(-1) != y).float().mean() for each in (model, alone))
    print(f"error on {len(y):,} test images: {error:.2%}; of a classifier on the labels alone: {error_alone:.2%}")


if __name__ == "__main__":
    train.main(
        SemiSupervisedVAE, __doc__, report, hidden_size=256, latent_size=10, activation="silu", lr=3e-3, beta=3.0
    )
