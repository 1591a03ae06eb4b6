"""Draws the README's pictures anew, from the models in weights/: python assets/make.py

Each picture of a model names its weights and their checksum, so that a test notices one that is out of date. The last,
page.gif, needs Chromium. Left out are those that show no model in weights/:

    curves.png, samples_by_class.png       training runs: python train.py and python experiments/conditional.py
    manifold.gif                           a training run: python assets/animation.py
    throughput.png                         measured on one CPU: python benchmarks/throughput.py, with --picture
    emoji.png                              data, drawn with a font: python docs/make.py --emoji data/emoji.npz
"""

import sys
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import utils
from assets import diagrams, page
from docs.make import MODELS, read_emoji
from evaluate import open_run
from measure import encode, make_test_set
from model import VAE
from pictures import describe, draw_all, save_figure

ASSETS = Path(__file__).parent
WEIGHTS = ASSETS.parent / "weights"
PICTURES = {  # by the model that they show
    "default": ["reconstructions", "prior_samples", "interpolations", "traversals", "latent_usage"],
    "2d": ["latent_space", "manifold"],
    "flow_prior": ["flow_prior_samples", "flow_completions"],
    "conv_flow": ["conv_flow_prior_samples"],
    "emoji": ["emoji_reconstructions", "emoji_prior_samples", "emoji_interpolations"],
}
# Before the names that evaluate.py gives the pictures
PREFIXES = {"flow_prior": "flow_", "conv_flow": "conv_flow_", "emoji": "emoji_"}


def fingerprint(names: list[str]) -> str:
    """The files weights/NAME.pt, each with the CRC-32 of its bytes."""
    paths = [WEIGHTS / f"{name}.pt" for name in names]
    return ", ".join(f"{path.name} {zlib.crc32(path.read_bytes()):08x}" for path in paths)


def draw_model(name: str, data_dir: str) -> None:
    """Draws the pictures of weights/NAME.pt. Raises UserError if its data set is not there."""
    opened = open_run(WEIGHTS / f"{name}.pt", device="cpu")
    dataset = read_emoji() if name == "emoji" else opened.test_data(data_dir=data_dir)
    test_set = make_test_set(dataset, opened.binarize)
    caption = describe(opened.model, dataset.name, opened.binarize, opened.checkpoint["epoch"])
    for file_name, figure in draw_all(opened.model, test_set, encode(opened.model, test_set), caption):
        picture = ASSETS / f"{PREFIXES.get(name, '')}{file_name}"
        if picture.stem in PICTURES[name]:
            save_figure(figure, picture, {"Weights": fingerprint([name])})
            print(f"wrote {picture}")


@utils.command
def main() -> None:
    parser = utils.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", default="data", metavar="DIR", help="where data sets are read and downloaded")
    args = parser.parse_args()
    for name in PICTURES:
        draw_model(name, args.data_dir)
    torch.manual_seed(0)
    save_figure(diagrams.draw_architecture(VAE()), ASSETS / "architecture.png")
    save_figure(diagrams.draw_latent_variable(), ASSETS / "latent.png")
    page.draw(ASSETS / "page.gif", fingerprint([name for name, _ in MODELS.values()]))
    print(f"wrote architecture.png, latent.png and page.gif into {ASSETS}")


if __name__ == "__main__":
    main()
