"""Makes a web page to explore a latent space in. It needs no network, because it runs the models itself.

    python docs/make.py                               # docs/index.html, from the models in weights/
    python docs/make.py runs/001-mnist-z20            # explorer.html in the run folder, from its model
    python docs/make.py --emoji data/emoji.npz        # assets/emoji.png, the emoji in docs/index.html

For a checkpoint FILE.pt, explorer.html is written into a folder FILE.
"""

import copy
import json
import re
import sys
from base64 import b64encode
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import runs
import utils
from data import ImageData, load_dataset
from evaluate import open_run
from experiments.convolutional import Activation, Block, ConvDecoder
from experiments.flow_prior import Coupling, Flow
from measure import check_images
from model import VAE, Decoder, Encoder, LatentZ, kl_by_latent
from pictures import class_colors, describe, one_of_each_class, tile
from utils import UserError

ROOT = Path(__file__).parent.parent
EMOJI, EMOJI_ROWS, EMOJI_COLUMNS, EMOJI_SIZE = ROOT / "assets" / "emoji.png", 8, 12, 32
MODELS = {
    "main": ("default", "Draw, Erase, Mix and Loss"),
    "map": ("2d", "The map"),
    "vamp": ("vampprior", "The VampPrior"),
}
STARTS = {"from": 29, "to": 51}  # the emoji mixed at first: a peach and a heart
ABOUT = (
    "A variational autoencoder squeezes an image into a few numbers, the latents, and draws the image again from them. "
    "All of it runs here, in your browser."
)
NOTES = [
    "A drawing becomes what MNIST's digits are: 28 x 28 gray pixels with lines of the same width, in a box of 20 "
    "pixels whose centre of mass is in the middle. Training shows the networks a binary sample of the pixels. Here "
    "they read the gray values, so reconstructions are closer. The five nearest of 2,000 digits in latent space vote "
    "on what a drawing looks like.",
    "The digits shown are from MNIST's test set. The 2,000 are its first 1,000 digits and 1,000 of the training set. "
    "BCE is taken of the gray pixels, which gives its mean over binary samples, and averaged over four draws of z.",
    "To fill in what is erased, the seen pixels count as black or white. The first 20 of the 60 steps accept every "
    "proposal (Rezende et al. 2014, arXiv 1401.4082, appendix F), and the others accept by the ratio of Mattei and "
    "Frellsen (arXiv 1802.04826).",
]


def make_index(weights: Path) -> str:
    """The page of default, 2d, vampprior and emoji.pt in the folder of weights. Raises UserError if one is missing."""
    digits, models, notes = load_dataset("mnist-5k"), {}, []
    images = torch.cat([digits.test_images, digits.train_images])
    labels = torch.cat([digits.test_labels, digits.train_labels])
    digits = replace(digits, name="mnist", test_images=images, test_labels=labels)
    for role, (name, what) in MODELS.items():
        models[role], checkpoint = runs.load_checkpoint(weights / f"{name}.pt")
        caption = describe(models[role], "mnist", checkpoint["options"]["binarize"], checkpoint["epoch"])
        notes.append(f"{what}: {caption}.")
    emoji, (model, checkpoint) = read_emoji(), runs.load_checkpoint(weights / "emoji.pt")
    caption = describe(model, emoji.name, checkpoint["options"]["binarize"], checkpoint["epoch"])
    notes.append(f"Emoji: {caption}. They are those of Noto Color Emoji, under the SIL Open Font License 1.1.")
    return make_page("A latent space to touch", [*NOTES, *notes], models, digits, (model, emoji))


def draw_emoji(dataset: ImageData) -> Image.Image:
    """The first 96 test images as one picture, with which the page can be made where the font is missing.

    Raises UserError for fewer images, or images that are not 32 x 32 and in colour.
    """
    shown = dataset.test_images[: EMOJI_ROWS * EMOJI_COLUMNS]
    if len(shown) < EMOJI_ROWS * EMOJI_COLUMNS or dataset.shape != (3, EMOJI_SIZE, EMOJI_SIZE):
        raise UserError(f"the page needs 96 test images of shape (3, 32, 32), not {len(shown)} of {dataset.shape}")
    return Image.fromarray(tile(shown, EMOJI_ROWS, dataset.shape).byte().numpy())


def read_emoji() -> ImageData:
    """The emoji of assets/emoji.png, as test images."""
    sheet = torch.from_numpy(np.array(Image.open(EMOJI)))
    sheet = sheet.view(EMOJI_ROWS, EMOJI_SIZE, EMOJI_COLUMNS, EMOJI_SIZE, 3)
    images = sheet.permute(0, 2, 4, 1, 3).flatten(0, 1)
    labels = torch.zeros(len(images), dtype=torch.int64)
    return ImageData("emoji", ["emoji"], images, labels, images, labels)


def explore(path: Path, data_dir: str) -> str:
    """The page of a checkpoint file and its run's test images. Raises UserError as make_explorer does."""
    opened = open_run(path, device="cpu")
    dataset = opened.test_data(data_dir=data_dir)
    epoch = opened.checkpoint.get("epoch")
    caption = describe(opened.model, dataset.name, opened.binarize, epoch, dataset.num_held_out)
    return make_explorer(opened.model, dataset, caption)


def make_explorer(model: VAE, dataset: ImageData, caption: str) -> str:
    """The page of one model and a data set's test images. Raises UserError if the page could not show them."""
    check_images(model, dataset)
    is_own = [getattr(type(model), name) is getattr(VAE, name) for name in ("posterior", "prior", "likelihood")]
    is_own += [type(model.latent_z) is LatentZ, type(model.decoder) is Decoder]
    if not all(is_own) or model.config["likelihood"] != "bernoulli":
        raise UserError("the explorer needs the VAE's own posterior, prior, decoder and Bernoulli likelihood")
    if dataset.shape[0] != 1:
        raise UserError(f"the explorer shows gray images only, but those of {dataset.name} are in colour")
    if sum(weight.numel() for weight in model.parameters()) > 4_000_000:
        raise UserError("the model has more than 4 million weights, too many for a web page")
    if model.config["latent_size"] < 2:
        raise UserError("the explorer needs two latents or more")
    return make_page("Latent explorer", [caption], {"main": model}, dataset)


def make_page(
    title: str,
    notes: list[str],
    models: dict[str, VAE],
    dataset: ImageData,
    emoji: tuple[VAE, ImageData] | None = None,
) -> str:
    """Fills in docs/page.html with the models and up to 2,000 test images, placed at their posterior means.

    models: "main"; perhaps "map", with two latents; and perhaps "vamp", a VampVAE that is only sampled from. emoji: a
    ConvVAE, whose prior may be a flow, and the images to mix with it. Computes in float64, so that every machine makes
    the same page of the same weights.
    """
    from matplotlib.colors import to_hex

    chosen = one_of_each_class(dataset.test_labels.tolist(), 2000)
    images, labels = dataset.test_images[chosen], dataset.test_labels[chosen]
    content = {
        "title": title,
        "about": [ABOUT],
        "notes": notes,
        "colors": [to_hex(color) for color in class_colors(len(dataset.classes))],
        "pictures": _pictures(dataset, images[: max(10, min(100, 400_000 // dataset.input_size))], labels),
        "models": {role: _page_model(model, images, labels) for role, model in models.items()},
    }
    if emoji:
        model, shown = emoji
        pictures = _pictures(shown, shown.test_images, shown.test_labels) | {"starts": STARTS}
        content["emoji"] = {"pictures": pictures, "model": _page_model(model, shown.test_images, shown.test_labels)}
    names = ("page.html", "page.css", "networks.js", "page.js")
    parts = {f"@{name}@": (ROOT / "docs" / name).read_text(encoding="utf-8") for name in names}
    parts["@data@"] = json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")  # ends no script element
    page = parts.pop("@page.html@")
    return re.sub("|".join(parts), lambda match: parts[match[0]], page)


def _pictures(dataset: ImageData, images: Tensor, labels: Tensor) -> dict[str, Any]:
    """What docs/page.js makes pictures of: bytes, with the channels of a pixel together."""
    return {
        "classes": dataset.classes,
        **dict(zip(("channels", "height", "width"), dataset.shape, strict=True)),
        "images": b64encode(images.permute(0, 2, 3, 1).contiguous().numpy()).decode(),
        "labels": labels.tolist(),
    }


def most_typical(points: Tensor, labels: Tensor) -> list[int]:
    """The index of a point for each class in turn: where the class is dense, and has the place mostly to itself.

    points: (N, latent_size), in the prior's standard deviations. labels: (N). A class may be densest where it overlaps
    others, and its share of all density is highest at outliers. The share is squared, because it says more about what
    the decoder draws there.
    """
    squared_distances = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist") ** 2
    nearness = torch.exp(-squared_distances / (0.06 * points.shape[1]))
    typical = []
    for label in labels.unique():
        own = (labels == label).nonzero().flatten()
        density = nearness[own][:, own].sum(1)
        share = density / nearness[own].sum(1)
        typical.append(own[(density * share**2).argmax()].item())
    return typical


def _page_model(model: VAE, images: Tensor, labels: Tensor) -> dict[str, Any]:
    """What docs/networks.js makes a model of. Without an Encoder, the page omits the sections that need one."""
    model = copy.deepcopy(model).cpu().double().requires_grad_(False)
    size, activation = model.config["latent_size"], model.config["activation"]
    content = {"size": size, "activation": activation}
    content["decoder"] = (_convolutional if type(model.decoder) is ConvDecoder else _layers)(model.decoder)
    p = model.prior()
    is_flow = type(p) is Flow
    if is_flow:
        content["flow"] = [_coupling(layer) for layer in p.layers]
    elif type(model).prior is not VAE.prior:
        mixture = p.components
        return content | {"prior": {"mu": _matrix(mixture.mu, 16), "std": _matrix(torch.exp(0.5 * mixture.logvar), 16)}}
    q = model.posterior(images.double() / 255)
    weights = q.mu.var(0) if is_flow else kl_by_latent(q, p).mean(0)
    order = [0, 1] if size == 2 else weights.argsort(descending=True).tolist()
    content |= {"order": order, "points": _matrix(q.mu, 16), "typical": most_typical(q.mu, labels)}
    if model.config["likelihood"] == "logistic":
        scales, stds = torch.exp(model.log_scale), torch.exp(0.5 * q.logvar)
        content |= {"scales": _floats(scales), "stds": _matrix(stds, 16)}
    if type(model.encoder) is Encoder:
        mu, logvar = _layers(model.latent_z)
        content |= {"encoder": _layers(model.encoder), "mu": mu, "logvar": logvar}
    return content


def _layers(module: nn.Module) -> list[dict[str, Any]]:
    return [{"weight": _weight(layer.weight.T), "bias": _floats(layer.bias)} for layer in module.children()]


def _convolutional(decoder: ConvDecoder) -> dict[str, Any]:
    """The decoder for pictures whose pixels have their channels together, (H, W, C)."""
    linear, unflatten, _, *layers = decoder
    channels, rows, columns = unflatten.unflattened_size
    weight, bias = (part.unflatten(0, (channels, -1)).transpose(0, 1).flatten(0, 1) for part in linear.parameters())
    return {
        "input": {"weight": _weight(weight.T), "bias": _floats(bias)},
        "rows": rows,
        "columns": columns,
        "layers": [_convolutional_layer(layer) for layer in layers],
    }


def _convolutional_layer(layer: nn.Module) -> dict[str, Any]:
    if type(layer) is Block:
        return {"block": [_convolution(layer.conv1), _convolution(layer.conv2)]}
    return {"activation": True} if type(layer) is Activation else _convolution(layer)


def _coupling(layer: Coupling) -> list[dict[str, Any]]:
    return _layers(nn.Sequential(layer.first, *layer.rest[1::2]))


def _convolution(layer: nn.Conv2d | nn.ConvTranspose2d) -> dict[str, Any]:
    """As what each input pixel adds to the pixels around it: the weight is (inputs, kernel * kernel * outputs)."""
    weight = layer.weight if type(layer) is nn.ConvTranspose2d else layer.weight.transpose(0, 1).flip(2, 3)
    weight = weight.permute(0, 2, 3, 1).flatten(1)
    size = {"kernel": layer.kernel_size[0], "stride": layer.stride[0]}
    return {"weight": _weight(weight), "bias": _floats(layer.bias)} | size


def _weight(weight: Tensor) -> dict[str, Any]:
    """In 8 bits if it is large, which costs default.pt 0.02 nats and 2d.pt 0.01. Small matrices cost more than that."""
    return _matrix(weight, 8 if weight.numel() > 4096 else 16)


def _matrix(values: Tensor, bits: int) -> dict[str, Any]:
    """(rows, columns) as integers of 8 or 16 bits with a scale for each row."""
    scales = (values.abs().amax(1) / (2 ** (bits - 1) - 1)).clamp(min=1e-30)
    integers = (values / scales[:, None]).round().numpy().astype(f"<i{bits // 8}")
    return {"bits": bits, "scales": _floats(scales), "values": b64encode(integers.tobytes()).decode()}


def _floats(values: Tensor) -> str:
    return b64encode(values.numpy().astype("<f4").tobytes()).decode()


@utils.command
def main() -> None:
    parser = utils.ArgumentParser(description=__doc__)
    parser.add_argument("run", nargs="?", help="run folder or checkpoint file (default: the models in weights/)")
    parser.add_argument("--data-dir", default="data", metavar="DIR", help="where data sets are read and downloaded")
    parser.add_argument("--emoji", metavar="FILE", help="data set of emoji to draw assets/emoji.png of, and no page")
    args = parser.parse_args()
    if args.emoji:
        draw_emoji(load_dataset(args.emoji)).save(EMOJI, optimize=True)
        print(f"wrote {EMOJI}")
        return
    if args.run:
        checkpoint = runs.checkpoint_path(args.run)
        folder = checkpoint.parent if checkpoint.name == "checkpoint.pt" else checkpoint.with_suffix("")
        page, path = explore(checkpoint, args.data_dir), folder / "explorer.html"
        folder.mkdir(exist_ok=True)
    else:
        page, path = make_index(ROOT / "weights"), ROOT / "docs" / "index.html"
    runs.write_atomically(path, page.encode())
    print(f"wrote {path} ({len(page) / 1e6:.1f} MB): open it in a browser")


if __name__ == "__main__":
    main()
