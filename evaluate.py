"""Measures a trained VAE and draws what it learned.

    python evaluate.py                                # the newest run in runs/
    python evaluate.py runs/001-mnist-z20
    python evaluate.py somewhere/checkpoint.pt --dataset mnist --binarize threshold

Writes metrics.json and the pictures into the run folder, or for FILE.pt into a folder FILE. All losses are in nats per
image.
"""

import io
import json
import math
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

import runs
import utils
from data import (
    BINARIZE,
    DATASETS,
    ImageData,
    inputs_and_targets,
    load_dataset,
    read_pictures,
    to_channels,
)
from measure import (
    NLL_SAMPLES,
    check_images,
    encode,
    evaluate,
    in_eval_mode,
    make_test_set,
    to_test_set,
    usual_binarize,
)
from model import VAE, DiagonalNormal
from pictures import describe, draw_all, draw_comparison, save_figure
from utils import UserError

FEW_IMAGES = 200  # with fewer test images, training images are shown beside them


@dataclass(frozen=True)
class OpenedRun:
    """A run or a checkpoint file."""

    path: Path  # of the checkpoint
    checkpoint: dict[str, Any]
    model: VAE
    binarize: str
    out_dir: Path

    @property
    def options(self) -> dict[str, Any]:
        """The options of the run, without places. A checkpoint of the original repository has none."""
        return self.checkpoint.get("options", {})

    def test_data(
        self, dataset: str | Path | ImageData | None = None, data_dir: str | Path = "data", hold_out: int | None = None
    ) -> ImageData:
        """The data set to evaluate on: by default the run's own, with the images that it held out.

        Raises UserError if the images do not fit the model, or the run's own have changed.
        """
        is_the_runs = dataset is None and hold_out is None
        if hold_out is None:
            hold_out = 0 if isinstance(dataset, str | Path) else self.options.get("hold_out", 0)
        if isinstance(dataset, ImageData):
            data = dataset.hold_out(hold_out or dataset.num_held_out)
        else:
            name = self.options.get("dataset", "auto") if dataset is None else dataset
            if dataset is None:
                runs.check_place(name, self.path)
            is_folder = isinstance(name, str | Path) and name not in DATASETS and Path(name).is_dir()
            image_size = self.image_size if is_folder else None
            data = load_dataset(name, data_dir, image_size, hold_out, self.model.config["channels"])
        check_images(self.model, data)
        if is_the_runs:
            runs.check_same_images(self.checkpoint, data, self.path)
        return data

    @property
    def image_size(self) -> int:
        """The width and height of the model's images, if they are square."""
        return math.isqrt(self.model.config["input_size"] // self.model.config["channels"])

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the model's images, which are taken for square in a checkpoint that does not say."""
        square = self.model.config["channels"], self.image_size, self.image_size
        return tuple(self.checkpoint.get("shape") or self.model.config.get("shape") or square)

    @property
    def classes(self) -> list[str]:
        """The names of the labels, which are numbers in a checkpoint that does not say."""
        return self.checkpoint.get("classes") or list(map(str, range(self.model.config.get("num_classes", 1))))


def open_run(
    run: str | Path,
    model: VAE | type[VAE] | None = None,
    binarize: str | None = None,
    device: str = "auto",
    out_dir: str | Path | None = None,
) -> OpenedRun:
    """Loads a run or a checkpoint file. Arguments and errors are evaluate_run's."""
    device = utils.choose_device(device)
    path = runs.checkpoint_path(run)
    model, checkpoint = runs.load_checkpoint(path, model)
    model = model.to(device)
    binarize = binarize or checkpoint.get("options", {}).get("binarize") or usual_binarize(model)
    if out_dir is None:
        # FILE.pt gets a folder of its own, because several may lie in one folder, such as weights/
        out_dir = path.parent if path.name == "checkpoint.pt" else path.with_suffix("")
    return OpenedRun(path, checkpoint, model, binarize, Path(out_dir))


def evaluate_run(
    run: str | Path,
    model: VAE | type[VAE] | None = None,
    dataset: str | Path | ImageData | None = None,
    data_dir: str | Path = "data",
    binarize: str | None = None,
    nll_samples: int = NLL_SAMPLES,
    device: str = "auto",
    out_dir: str | Path | None = None,
    seed: int = 0,
    hold_out: int | None = None,
) -> dict[str, Any]:
    """Evaluates a run or a checkpoint file, writes metrics.json and the pictures, and prints and returns the metrics.

    A checkpoint of a subclass of your own needs `model`, that class or an instance. Defaults are the run's own, and its
    images must not have changed. Naming a data set selects its test set; so does hold_out=0. out_dir is the run folder,
    or a folder FILE for FILE.pt. Reseeds PyTorch. Raises UserError for a bad value or file, and OSError.
    """
    opened = open_run(run, model, binarize, device, out_dir)
    model = opened.model
    data = opened.test_data(dataset, data_dir, hold_out)
    device = next(model.parameters()).device
    test_set = make_test_set(data, opened.binarize, device)
    epoch = opened.checkpoint.get("epoch")
    caption = describe(model, data.name, opened.binarize, epoch, data.num_held_out)
    opened.out_dir.mkdir(parents=True, exist_ok=True)
    metrics = evaluate(model, test_set, nll_samples=nll_samples, seed=seed)
    metrics |= {"dataset": data.name, "hold_out": data.num_held_out, "binarize": opened.binarize}
    print_metrics(metrics, f"{opened.path}: {caption}")
    written = {name: value for name, value in metrics.items() if name != "per_image"}
    runs.write_atomically(opened.out_dir / "metrics.json", (json.dumps(written, indent=2) + "\n").encode())
    training = None
    if len(data.test_images) < FEW_IMAGES:  # too few to show a latent space
        chosen = slice(10 * FEW_IMAGES)
        images = data.train_images[chosen].to(device)
        labels = data.train_labels[chosen].to(device)
        training = labels, encode(model, to_test_set(images, labels, opened.binarize)).mu
    for name, figure in draw_all(model, test_set, metrics["per_image"], caption, training):
        save_figure(figure, opened.out_dir / name)
        print(f"wrote {opened.out_dir / name}")
    return metrics


def print_metrics(metrics: dict[str, Any], title: str) -> None:
    """Prints what evaluate returns."""
    print(f"{title}; {metrics['num_images']:,} {'held-out' if metrics.get('hold_out') else 'test'} images")
    if metrics["nll"] is None:
        print(
            "These figures are not likelihoods: p(x|z) is a density, or some targets (gray, say) are not in its support"
        )
    print(f"  neg_elbo        {metrics['neg_elbo']:8.2f} nats per image, standard error {metrics['neg_elbo_se']:.2f}")
    print(f"    reconstruction {metrics['reconstruction']:7.2f}")
    kls = sorted(metrics["kl_per_latent"] or [], reverse=True)
    by_latent = "by latent, sorted:" if kls else "estimated from one draw per image (no closed form available)"
    print(f"    kl            {metrics['kl']:8.2f}, {by_latent}")
    for start in range(0, len(kls), 10):
        print(" " * 18 + " ".join(f"{kl:5.2f}" for kl in kls[start : start + 10]))
    if metrics["nll"] is not None:
        print(
            f"  nll             {metrics['nll']:8.2f} nats per image, standard error {metrics['nll_se']:.2f}, "
            f"{metrics['nll_samples']:,} importance samples, {metrics['effective_samples']:.1f} of them effective"
        )
    if metrics["bits_per_dim"] is not None:
        print(f"  bits_per_dim    {metrics['bits_per_dim']:8.3f}, of nll")
    print(f"  active_units    {metrics['active_units']:8d} of {metrics['latent_size']} latents")
    if metrics["kl"] < 0.1 and metrics["nll"] is not None:
        print("The posterior has collapsed: z says nothing about an image. nll is then lower than neg_elbo, because it")
        print("averages likelihoods over draws of z, where neg_elbo averages their logarithms.")


def save_encoded(
    path: Path,
    opened: OpenedRun,
    dataset: str | None = None,
    data_dir: str = "data",
    hold_out: int | None = None,
    nll_samples: int = NLL_SAMPLES,
    seed: int = 0,
) -> int:
    """Writes an .npz file of what the model says about each test image, or each image at a path -> their number.

    The file also has the label of each image, and the names of images from a path. Raises UserError if it exists, or
    for bad images, and OSError.
    """
    if path.exists() or path.suffix != ".npz":
        raise UserError(f"--save {path} {'exists' if path.exists() else 'must end in .npz'}: name another file")
    model = opened.model
    if dataset is None or dataset in DATASETS:
        data = opened.test_data(dataset, data_dir, hold_out)
        images = data.test_images
        y = data.test_labels
        classes = data.classes
        names = data.test_names
    else:
        pictures = read_pictures(Path(dataset), opened.image_size)
        images = to_channels(pictures.images, model.config["channels"])
        y = pictures.labels
        classes = pictures.classes
        names = pictures.names
    found = evaluate(model, images, opened.binarize, nll_samples, seed, y)["per_image"]
    arrays = {
        "mu": found.mu,
        "logvar": found.logvar,
        "neg_elbo": found.neg_elbo,
        "nll": found.nll,
        "effective_samples": found.effective_samples,
    }
    arrays = {name: values.float().cpu().numpy() for name, values in arrays.items() if values is not None}
    arrays["label"] = np.array([classes[i] for i in y])
    if names:
        arrays["name"] = np.array(names)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    path.parent.mkdir(parents=True, exist_ok=True)
    runs.write_atomically(path, buffer.getbuffer())
    return len(images)


@in_eval_mode
def sample_images(model: VAE, y: Tensor, temperature: float = 1.0, draw_pixels: bool = False, seed: int = 0) -> Tensor:
    """One image for each label y (n,), of a draw of the prior: the pixels' means, or drawn pixels, (n, D) in [0, 1].

    temperature scales the standard deviation of a normal prior; below 1, samples are plainer and vary less. Raises
    UserError for another prior. Reseeds PyTorch.
    """
    torch.manual_seed(seed)
    p = model.prior(y)
    if temperature != 1:
        if not isinstance(p, DiagonalNormal):
            raise UserError(f"--temperature is for a normal prior, which {type(model).__name__} lacks")
        p = DiagonalNormal(p.mu, p.logvar + 2 * math.log(temperature))
    likelihood = model.likelihood(p.sample(() if p.batch_shape else y.shape), y)
    return likelihood.sample() if draw_pixels else likelihood.mean


def write_samples(opened: OpenedRun, n: int, label: str | None = None, **draws: Any) -> Path:
    """Writes n images from the prior into a new folder `samples`. `draws` are sample_images' other arguments.

    They are of one class, by its name, or of all in turn. Errors are those of choose_labels and write_images.
    """
    y = choose_labels(opened, n, label)
    return write_images(opened, "samples", sample_images(opened.model, y, **draws))


def write_completions(
    opened: OpenedRun, path: str | Path, n: int, label: str | None = None, draw_pixels: bool = False, seed: int = 0
) -> Path:
    """Writes a picture, whose transparent pixels are filled in, n times into a new folder `completions`.

    The picture is cropped at the centre to the shape of the model's images, and gets their size and colours. Errors are
    write_images', and UserError for a picture that cannot be read or has nothing to fill in.
    """
    channels, height, width = opened.shape
    try:
        with Image.open(path) as picture:
            upright = ImageOps.exif_transpose(picture).convert("RGBA")
        rgba = np.array(ImageOps.fit(upright, (width, height)))
    except OSError as error:
        utils.raise_unless_damaged(error)
        raise UserError(f"{path} is damaged or not a picture") from error
    seen = torch.from_numpy(rgba[..., 3] > 127)
    if seen.all():
        raise UserError(f"{path} has no transparent pixels to fill in")
    pixels = to_channels(torch.from_numpy(rgba[..., :3]).permute(2, 0, 1)[None], channels)
    _, x = inputs_and_targets(pixels, "none" if opened.binarize == "none" else "threshold")
    torch.manual_seed(seed)
    y = choose_labels(opened, n, label)
    x = x.expand(n, -1, -1, -1).to(y.device)
    try:
        images = opened.model.complete(x, seen.to(y.device), y, draw_pixels=draw_pixels)
    except NotImplementedError as error:
        raise UserError(f"{type(opened.model).__name__} cannot fill in pixels") from error
    return write_images(opened, "completions", images)


def choose_labels(opened: OpenedRun, n: int, label: str | None) -> Tensor:
    """n labels: all of the class of that name, or all classes in turn. Raises UserError for an unknown one."""
    classes = opened.classes
    device = next(opened.model.parameters()).device
    if label is None:
        return torch.arange(n, device=device) % len(classes)
    if not is_conditional(opened.model, len(classes)):
        raise UserError("--label is for a conditional model, which this is not")
    if label not in classes:
        raise UserError(f"--label must be one of {', '.join(classes)}, not {label}")
    return torch.full((n,), classes.index(label), device=device)


@in_eval_mode
def is_conditional(model: VAE, num_classes: int) -> bool:
    """Whether p(z) or p(x|z) depends on the label."""
    y = torch.tensor([0, num_classes - 1], device=next(model.parameters()).device)
    z = torch.zeros(2, model.config["latent_size"], device=y.device)
    first, last = model.decode(z, y)
    return bool(model.prior(y).batch_shape) or not torch.equal(first, last)


def write_images(opened: OpenedRun, name: str, images: Tensor) -> Path:
    """Writes images (N, ...) in [0, 1] into a new folder, as 00000.png and so on. Raises UserError if it exists."""
    folder = opened.out_dir / name
    if folder.exists():
        raise UserError(f"{folder} exists: delete it, or name another --out-dir")
    pixels = (255 * images.float().cpu()).round().byte().view(-1, *opened.shape).permute(0, 2, 3, 1)
    folder.mkdir(parents=True)
    for i, image in enumerate(pixels.numpy()):
        buffer = io.BytesIO()
        Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(buffer, "png")
        runs.write_atomically(folder / f"{i:05d}.png", buffer.getbuffer())
    return folder


def compare_runs(folders: list[str], out_dir: str | Path) -> Path:
    """Writes compared.png, with the runs' test losses. Each has its folder's name and the options in which they differ.

    Raises UserError for a file that is not a run, and OSError.
    """
    paths = [runs.checkpoint_path(folder) for folder in folders]
    checkpoints = [runs.read_checkpoint(path) for path in paths]
    options = [
        checkpoint.get("options", {}) | {"class": checkpoint.get("class", "VAE").rpartition(".")[2]}
        for checkpoint in checkpoints
    ]
    names = dict.fromkeys(name for given in options for name in given)
    different = [name for name in names if any(given.get(name) != options[0].get(name) for given in options)]
    histories = []
    for path, checkpoint, given in zip(paths, checkpoints, options, strict=True):
        if not checkpoint.get("history"):
            raise UserError(f"{path} has no history of a training run")
        options_of_run = ", ".join(f"{name} {given.get(name)}" for name in different)
        note = "" if checkpoint.get("is_likelihood", True) else " (not likelihoods)"
        histories.append((textwrap.fill(f"{path.parent.name}{note}: {options_of_run}", 110), checkpoint["history"]))
    path = Path(out_dir) / "compared.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(draw_comparison(histories), path)
    return path


def add_nll_samples(parser: utils.ArgumentParser) -> None:
    """Adds the option --nll-samples to a command."""
    help = "importance samples for each image"
    parser.add_argument("--nll-samples", type=utils.count, default=NLL_SAMPLES, help=help)


def make_parser() -> utils.ArgumentParser:
    """The command line."""
    parser = utils.ArgumentParser(description=__doc__)
    parser.add_argument("run", nargs="?", default="runs", help="run folder, checkpoint file, or folder of runs")
    parser.add_argument("--model", metavar="FILE.py:CLASS", help="class of a model of your own, from a file of yours")
    parser.add_argument("--dataset", help="test set: a name or path, as for train.py (default: the run's, else auto)")
    parser.add_argument("--data-dir", default="data", help="where data sets are read and downloaded")
    parser.add_argument(
        "--binarize", choices=BINARIZE, help="input and target (default: the run's, else the model's usual)"
    )
    hold_out = "test on the last N training images, or with 0 on the test set (default: as in training)"
    parser.add_argument("--hold-out", type=utils.number(int, 0, 2**31), help=hold_out)
    add_nll_samples(parser)
    parser.add_argument("--device", choices=utils.DEVICES, default="auto", help="where to compute")
    parser.add_argument("--out-dir", help="where to write (default: the run folder, or FILE/ for FILE.pt)")
    parser.add_argument("--seed", type=utils.number(int, 0, 2**40), default=0, help="of the draws of z")
    group = parser.add_argument_group("instead of metrics and pictures")
    instead = group.add_mutually_exclusive_group()
    instead.add_argument(
        "--save",
        metavar="FILE.npz",
        type=Path,
        help="write mu, logvar, neg_elbo, nll, effective_samples and label of each test image, or of all images if "
        "--dataset is a path",
    )
    instead.add_argument(
        "--samples", type=utils.count, help="write as many images from the prior into a folder called samples"
    )
    instead.add_argument(
        "--compare", nargs="+", metavar="RUN", help="draw these runs' test losses into one picture, compared.png"
    )
    add = group.add_argument
    add("--complete", metavar="PICTURE", help="with --samples: fill in this picture's transparent pixels instead")
    add("--label", help="of the samples, for a conditional model (default: all in turn)")
    add("--temperature", type=utils.number(float, 1e-3, 1e3), help="scale of the prior's deviation, for the samples")
    add("--draw-pixels", action="store_true", help="draw the samples' pixels too, instead of showing their means")
    return parser


@utils.command
def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    draws = {name: value for name in ("label", "temperature", "draw_pixels") if (value := getattr(args, name))}
    if draws and not args.samples:
        parser.error("--label, --temperature and --draw-pixels are for --samples")
    if args.complete and not args.samples:
        parser.error("--complete needs --samples, the number of completions")
    if args.complete and args.temperature:
        parser.error("--complete takes no --temperature")
    if args.compare:
        print(f"wrote {compare_runs(args.compare, args.out_dir or '.')}")
        return
    model = runs.import_class(args.model) if args.model else None
    if args.save or args.samples:
        opened = open_run(args.run, model, args.binarize, args.device, args.out_dir)
        if args.save:
            data = args.dataset, args.data_dir, args.hold_out
            number = save_encoded(args.save, opened, *data, args.nll_samples, args.seed)
            print(f"wrote {args.save}: {number:,} images")
        elif args.complete:
            print(f"wrote {write_completions(opened, args.complete, args.samples, seed=args.seed, **draws)}")
        else:
            print(f"wrote {write_samples(opened, args.samples, seed=args.seed, **draws)}")
    else:
        data = args.dataset, args.data_dir, args.binarize
        evaluate_run(
            args.run, model, *data, args.nll_samples, args.device, args.out_dir, seed=args.seed, hold_out=args.hold_out
        )


if __name__ == "__main__":
    main()
