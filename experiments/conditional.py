"""Labels: a conditional VAE (Sohn et al. 2015, NeurIPS 28): encoder and decoder are told the class, y, of each image.

    python experiments/conditional.py                 # train.py's options, but for --resume, --init and --objective

The shared loop knows no labels: this is a loop of its own, and the example of one. Given a label, the model is a VAE
like any other, which evaluate.py measures and draws: nll is the mean of -log p(x|y).
"""

import copy
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import evaluate
import train
import utils
from data import ImageData, binarize, load_dataset
from model import VAE, Decoder, Encoder


class ConditionalVAE(VAE):
    """A VAE that is told the labels by `given`: they are appended to all that its encoder and decoder read."""

    def __init__(self, num_classes: int, input_size: int = 784, hidden_size: int = 512, latent_size: int = 20):
        super().__init__(input_size, hidden_size, latent_size)
        self.encoder = Encoder(input_size + num_classes, hidden_size)
        self.decoder = Decoder(latent_size + num_classes, hidden_size, input_size)
        self.num_classes = num_classes

    def given(self, labels: Tensor) -> "ConditionalVAE":
        """Takes labels (B,), one per image of the next batch, or (1,), one for all images to come."""
        self.labels = F.one_hot(labels, self.num_classes).float()
        return self

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.latent_z(self.encoder(torch.cat([x.flatten(1), self.labels.expand(len(x), -1)], 1)))

    def outputs(self, z: Tensor) -> Tensor:
        return super().outputs(torch.cat([z, self.labels.expand(*z.shape[:-1], -1)], -1))


@utils.interrupts_held()
def fit(model: ConditionalVAE, dataset: ImageData, options: train.Options, run: Path) -> ConditionalVAE:
    """Trains the model -> the running average of its weights, which is saved after each epoch."""
    device = next(model.parameters()).device
    images, labels = dataset.train_images.flatten(1).to(device), dataset.train_labels.to(device)
    average, history = copy.deepcopy(model).eval() if options.average else model, []
    adam = torch.optim.Adam(model.parameters(), eps=options.adam_eps, fused=True)

    def step(batch: Tensor, rates: Tensor) -> Tensor:
        adam.param_groups[0]["lr"], kl_weight = rates
        inputs, targets = binarize(images[batch], options.binarize)
        bce, kl = model.given(labels[batch]).elbo_terms(inputs, targets)
        adam.zero_grad()
        (bce + kl_weight * kl).sum().backward()
        if options.clip_grad_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip_grad_norm)
        adam.step()
        return (bce + kl).sum().detach()

    for epoch in range(1, options.epochs + 1):
        with tqdm(total=len(images), unit=" images", leave=False, disable=None) as bar:
            neg_elbos = train.train_epoch(step, model, average, images, epoch, options, bar)
        history.append({"epoch": epoch, "train_loss": neg_elbos.sum().item() / len(images)})
        train.check_finite(neg_elbos, (history[-1]["train_loss"],), epoch, run)
        print(f"epoch {epoch}/{options.epochs}  train {history[-1]['train_loss']:7.2f}", flush=True)
        train.save(run, average, model, adam, options, history, dataset.checksum())
    return average.eval()


SIZES = ("encoder_layers", "decoder_layers", "activation")
LEFT_OUT = ("resume", "compile", "init", "objective", "importance_samples", "elbo_epochs", *SIZES)


@utils.command
def main() -> None:
    parser = train.make_parser(__doc__, {"epochs": 20}, LEFT_OUT)
    evaluate.add_nll_samples(parser)
    given = vars(parser.parse_args())
    nll_samples = given.pop("nll_samples")
    options = train.Options(**{"epochs": 20, "compile": False} | given)
    device = utils.choose_device(options.device)
    dataset = load_dataset(options.dataset, options.data_dir, options.image_size, options.hold_out)
    options = train.choose_how(options, len(dataset.train_images))
    utils.seed_epoch(options.seed, 0)
    train.flush_denormals()
    model = ConditionalVAE(len(dataset.classes), dataset.input_size, options.hidden_size, options.latent_size)
    run = utils.new_run_folder(options.out_dir, f"{dataset.name}-conditional", options.latent_size)
    try:
        model = fit(model.to(device), dataset, options, run)
    finally:
        if not (run / "checkpoint.pt").exists():  # no epoch came to its end
            utils.discard_run(run)

    # Metrics: of all test images, each given its class
    classes = [torch.tensor([label], device=device) for label in range(model.num_classes)]
    metrics = {"num_images": len(dataset.test_images), "nll_samples": nll_samples}
    for label in dataset.test_labels.unique():
        images = dataset.test_images[dataset.test_labels == label]
        given_class = evaluate.evaluate(model.given(classes[label]), images, options.binarize, nll_samples)
        for name in ("neg_elbo", "bce", "kl", "nll"):
            if given_class[name] is not None:
                metrics[name] = metrics.get(name, 0) + given_class[name] * len(images) / len(dataset.test_images)
    print(json.dumps(metrics, indent=2))
    utils.write_atomically(run / "metrics.json", json.dumps(metrics, indent=2).encode())

    # A picture: the same ten draws of z, given each class
    z = model.sample_prior(10)
    with torch.no_grad():
        images = torch.cat([model.given(label).decode(z) for label in classes])
    caption = evaluate.describe(dataset.name, options.binarize, model, options.epochs, dataset.num_held_out)
    title = f"Draws of each class\n{caption}"
    figure = evaluate.draw_tiles(images, len(classes), dataset.shape, title, dataset.classes)
    evaluate.save_figure(figure, run / "samples_by_class.png")
    print(f"wrote {run / 'samples_by_class.png'}")


if __name__ == "__main__":
    main()
