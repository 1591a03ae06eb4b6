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

LABELS, ALPHA, GAMMA = 10, 32.0, 0.25  # labelled images of each class, and the weights of their losses


class SemiSupervisedVAE(ConditionalVAE):
    """A ConditionalVAE with a classifier q(y|x), and the first LABELS images (uint8) of each class, sorted by class."""

    def __init__(self, input_size: int = 784, num_classes: int = 10, **sizes: int | str):
        super().__init__(input_size, num_classes, **sizes)
        hidden_size, *others = (self.config[name] for name in ("hidden_size", "encoder_layers", "activation"))
        layers = Encoder(input_size, hidden_size, *others), nn.Dropout(), nn.Linear(hidden_size, num_classes)
        self.classifier = nn.Sequential(nn.Flatten(), nn.Dropout(0.2), *layers)
        self.register_buffer("labels", torch.arange(num_classes).repeat_interleave(LABELS))
        self.register_buffer("labelled", torch.zeros(num_classes * LABELS, input_size, dtype=torch.uint8))

    @classmethod
    def for_data(cls, dataset: ImageData, options: Options) -> "SemiSupervisedVAE":
        num_classes = len(dataset.classes)
        images = dataset.train_images.flatten(1)
        y = dataset.train_labels
        if (options.objective, options.likelihood, options.binarize or "dynamic") != ("elbo", "bernoulli", "dynamic"):
            raise UserError("semi_supervised.py is for --objective elbo, --likelihood bernoulli and --binarize dynamic")
        if num_classes < 2 or y.bincount(minlength=num_classes).min() < LABELS:
            raise UserError(f"semi_supervised.py needs two or more classes, with {LABELS} or more images of each")
        model = super().for_data(dataset, options)
        model.labelled.copy_(torch.cat([images[y == i][:LABELS] for i in range(num_classes)]))
        return model

    def loss(
        self, inputs: Tensor, targets: Tensor, y: Tensor | None = None, kl_weight: float | Tensor = 1.0
    ) -> tuple[Tensor, Tensor]:
        """The loss above, and U(x), each (B,). The labels y are not used."""
        log_q = self.classifier(inputs).float().log_softmax(-1)  # (B, C)
        num_classes = log_q.shape[1]
        each = torch.arange(num_classes, device=inputs.device).repeat(len(inputs))
        x, x_targets = inputs.repeat_interleave(num_classes, 0), targets.repeat_interleave(num_classes, 0)
        reconstruction, kl = (term.view_as(log_q) for term in self.elbo_terms(x, x_targets, each))
        q = log_q.exp()
        reconstruction = (q * reconstruction).sum(1)
        kl = (q * (kl + log_q + math.log(num_classes))).sum(1)
        labelled = torch.bernoulli(self.labelled / 255)
        with_label = sum(self.elbo_terms(labelled, labelled, self.labels)).mean()
        classification = F.cross_entropy(self.classifier(labelled).float(), self.labels)
        return reconstruction + kl_weight * kl + GAMMA * with_label + ALPHA * classification, reconstruction + kl


def report(model: SemiSupervisedVAE, dataset: ImageData) -> None:
    """Prints the classifier's error on gray images, beside that of one trained on the labelled images alone."""
    alone = SemiSupervisedVAE(**model.config).to(model.labelled.device)
    adam = torch.optim.Adam(alone.classifier.parameters())
    for _ in range(300):
        adam.zero_grad()
        F.cross_entropy(alone.classifier(torch.bernoulli(model.labelled / 255)), model.labels).backward()
        adam.step()
    x, y = (values.to(model.labelled.device) for values in (dataset.test_images / 255, dataset.test_labels))
    errors = [(each.eval().classifier(x).argmax(-1) != y).float().mean() for each in (model, alone)]
    print("error on {:,} test images: {:.2%}; of a classifier on the labels alone: {:.2%}".format(len(y), *errors))


if __name__ == "__main__":
    train.main(
        SemiSupervisedVAE, __doc__, report, hidden_size=256, latent_size=10, activation="silu", lr=3e-3, beta=3.0
    )
