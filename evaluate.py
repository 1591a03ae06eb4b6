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
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import runs
import utils
from data import BINARIZE, DATASETS, ImageData, check_kind, load_dataset, read_pictures
from measure import (
    NLL_SAMPLES,
    check_images,
    compute_metrics,
    encode_images,
    in_eval_mode,
    make_test_set,
    usual_binarization,
)
from measure import evaluate as evaluate
from model import VAE, DiagonalNormal
from pictures import describe, draw_all, draw_comparison, save_figure
from utils import UserError


def evaluate_run(
    run: str | Path,
    model: VAE | None = None,
    dataset: str | ImageData | None = None,
    data_dir: str | Path = "data",
    binarize: str | None = None,
    nll_samples: int = NLL_SAMPLES,
    device: str = "auto",
    out_dir: str | Path | None = None,
    seed: int = 0,
    hold_out: int | None = None,
) -> dict[str, Any]:
    """Evaluates a run or a checkpoint file, writes metrics.json and the pictures, and prints and returns the metrics.

    A checkpoint of a subclass of your own needs a `model` of that class. dataset, binarize and hold_out (0: the test
    set) default to the run's, whose images must not have changed; hold_out to 0 if a data set is named. out_dir is the
    run folder, or a folder FILE for FILE.pt. Raises UserError for a bad value or file, and OSError.
    """
    opened = open_run(run, model, binarize, device, out_dir)
    model, binarize = opened.model, opened.binarize
    dataset = open_test_data(model, opened.checkpoint, opened.path, data_dir, dataset, hold_out)
    caption = describe(dataset, binarize, model, opened.checkpoint.get("epoch"))
    opened.out_dir.mkdir(parents=True, exist_ok=True)
    test_set = make_test_set(dataset, binarize, utils.choose_device(device))
    metrics = compute_metrics(model, test_set, binarize, nll_samples, seed)
    metrics |= {"dataset": dataset.name, "hold_out": dataset.num_held_out, "binarize": binarize}
    print_metrics(metrics, f"{opened.path}: {caption}")
    written = {name: value for name, value in metrics.items() if name != "nll_per_image"}
    runs.write_atomically(opened.out_dir / "metrics.json", (json.dumps(written, indent=2) + "\n").encode())
    for name, figure in draw_all(model, dataset, test_set, caption, metrics["nll_per_image"]):
        save_figure(figure, opened.out_dir / name)
        print(f"wrote {opened.out_dir / name}")
    return metrics


class OpenedRun(NamedTuple):
    """A run or a checkpoint file."""

    path: Path
    checkpoint: dict[str, Any]
    model: VAE
    binarize: str
    out_dir: Path


def open_run(
    run: str | Path,
    model: VAE | None = None,
    binarize: str | None = None,
    device: str = "auto",
    out_dir: str | Path | None = None,
) -> OpenedRun:
    """Loads a run or a checkpoint file. Arguments and errors are evaluate_run's."""
    device, path = utils.choose_device(device), runs.checkpoint_path(run)
    model, checkpoint = runs.load_checkpoint(path, model)
    model = model.to(device)
    options = checkpoint.get("options", {})  # a checkpoint of the original repository has none
    binarize = binarize or options.get("binarize") or usual_binarization(model)
    if binarize not in BINARIZE:
        raise UserError(f"binarize must be one of {', '.join(BINARIZE)}, not {binarize}")
    # FILE.pt gets a folder of its own, because several may lie in one folder, such as weights/
    out_dir = Path(out_dir or (path.parent if path.name == "checkpoint.pt" else path.with_suffix("")))
    return OpenedRun(path, checkpoint, model, binarize, out_dir)


def open_test_data(
    model: VAE,
    checkpoint: dict[str, Any],
    path: Path,
    data_dir: str | Path = "data",
    dataset: str | ImageData | None = None,
    hold_out: int | None = None,
) -> ImageData:
    """The data set to evaluate a checkpoint on: by default the run's own, with the images that it held out.

    Raises UserError if the images do not fit the model, or the run's own have changed.
    """
    check_kind("auto" if dataset is None else dataset)
    options, is_the_runs = checkpoint.get("options", {}), dataset is None and hold_out is None
    if hold_out is None:
        hold_out = 0 if isinstance(dataset, str | Path) else options.get("hold_out", 0)
    if isinstance(dataset, ImageData):
        dataset = dataset.hold_out(hold_out or dataset.num_held_out)
    else:
        name = str(dataset or options.get("dataset", "auto"))
        image_size = image_size_of(model) if name not in DATASETS and Path(name).is_dir() else None
        how = data_dir, image_size, hold_out, model.config["channels"]
        if dataset is None:
            runs.check_place(name, path)
        dataset = load_dataset(name, *how)
    check_images(model, dataset)
    if is_the_runs:
        runs.check_same_images(checkpoint, dataset, path)
    return dataset


def image_size_of(model: VAE) -> int:
    """The width and height of a model's images, if they are square."""
    return math.isqrt(model.config["input_size"] // model.config["channels"])


def print_metrics(metrics: dict[str, Any], title: str) -> None:
    """Prints what evaluate returns."""
    print(f"{title}; {metrics['num_images']:,} {'held-out' if metrics.get('hold_out') else 'test'} images")
    if metrics["nll"] is None:
        print("These figures are not likelihoods: some targets are outside the likelihood's support (gray pixels, say)")
    print(f"  neg_elbo        {metrics['neg_elbo']:8.2f} nats per image, standard error {metrics['neg_elbo_se']:.2f}")
    print(f"    reconstruction {metrics['reconstruction']:7.2f}")
    kls = sorted(metrics["kl_per_latent"] or [], reverse=True)
    how = "by latent, sorted:" if kls else "estimated from one draw per image (no closed form available)"
    print(f"    kl            {metrics['kl']:8.2f}, {how}")
    for start in range(0, len(kls), 10):
        print(" " * 18 + " ".join(f"{kl:5.2f}" for kl in kls[start : start + 10]))
    if metrics["nll"] is not None:
        how = f"standard error {metrics['nll_se']:.2f}, {metrics['nll_samples']:,} importance samples"
        print(f"  nll             {metrics['nll']:8.2f} nats per image, {how}")
    if metrics["bits_per_dim"] is not None:
        print(f"  bits_per_dim    {metrics['bits_per_dim']:8.3f}, of nll")
    print(f"  active_units    {metrics['active_units']:8d} of {metrics['latent_size']} latents")


def save_encoded(
    path: Path,
    opened: OpenedRun,
    dataset: str | None = None,
    data_dir: str = "data",
    hold_out: int | None = None,
    nll_samples: int = NLL_SAMPLES,
    seed: int = 0,
) -> int:
    """Writes an .npz file of encode_images of the test images, or of all images at a path -> their number.

    The file also has the label of each image, and the names of images from a path. Raises UserError if it exists, or
    for bad images, and OSError.
    """
    if path.exists() or path.suffix != ".npz":
        raise UserError(f"--save {path} {'exists' if path.exists() else 'must end in .npz'}: name another file")
    model, arrays = opened.model, {}
    if dataset is None or dataset in DATASETS:
        data = open_test_data(model, opened.checkpoint, opened.path, data_dir, dataset, hold_out)
        images, y, classes = data.test_images, data.test_labels, data.classes
        arrays |= {"name": np.array(data.test_names)} if data.test_names else {}
    else:
        pictures = read_pictures(Path(dataset), image_size_of(model), model.config["channels"])
        classes, y = np.unique(pictures.labels, return_inverse=True)
        images, y, arrays["name"] = pictures.images, torch.from_numpy(y).long(), np.array(pictures.names)
        if images[0].numel() != model.config["input_size"]:
            raise UserError(f"the model is for images of {model.config['input_size']} values, not {images[0].numel()}")
    arrays["label"] = np.array([str(classes[i]) for i in y.tolist()])
    encoded = encode_images(model, images, y, opened.binarize, nll_samples, seed)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays, **{name: values.float().numpy() for name, values in encoded.items()})
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


def write_samples(opened: OpenedRun, dataset: ImageData, n: int, label: str | None = None, **how: Any) -> Path:
    """Writes n images from the prior, 00000.png and so on, into a new folder `samples`. `how` is sample_images'.

    They are of one class, by its name, or of all in turn. Raises UserError for an unknown label or an existing folder,
    and OSError.
    """
    from PIL import Image

    classes, kind = dataset.classes, type(opened.model)
    if label is not None and kind.prior is VAE.prior and kind.likelihood is VAE.likelihood:
        raise UserError("--label is for a conditional model, which this is not")
    if label is not None and label not in classes:
        raise UserError(f"--label must be one of {', '.join(classes)}, not {label}")
    folder = opened.out_dir / "samples"
    if folder.exists():
        raise UserError(f"{folder} exists: delete it, or name another --out-dir")
    y = torch.arange(n) % len(classes) if label is None else torch.full((n,), classes.index(label))
    images = sample_images(opened.model, y.to(next(opened.model.parameters()).device), **how)
    pixels = (255 * images.float().cpu()).round().byte().view(n, *dataset.shape).permute(0, 2, 3, 1)
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
    different = [name for name in options[0] if any(other.get(name) != options[0][name] for other in options)]
    histories = []
    for path, checkpoint, given in zip(paths, checkpoints, options, strict=True):
        if not checkpoint.get("history"):
            raise UserError(f"{path} has no history of a training run")
        how = ", ".join(f"{name} {given.get(name)}" for name in different)
        histories.append((textwrap.fill(f"{path.parent.name}: {how}", 110), checkpoint["history"]))
    path = Path(out_dir) / "compared.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(draw_comparison(histories), path)
    return path


def add_nll_samples(parser: utils.ArgumentParser) -> None:
    """Adds the option --nll-samples to a command."""
    help = "importance samples for each image"
    parser.add_argument("--nll-samples", type=utils.count, default=NLL_SAMPLES, help=help)


@utils.command
def main() -> None:
    parser = utils.ArgumentParser(description=__doc__)
    parser.add_argument("run", nargs="?", default="runs", help="run folder, checkpoint file, or folder of runs")
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
    add = parser.add_argument_group("instead of metrics and pictures").add_argument
    add(
        "--save",
        metavar="FILE.npz",
        type=Path,
        help="write mu, logvar, label, neg_elbo and nll of each test image; of all images, if --dataset is a path",
    )
    add("--samples", type=utils.count, help="write as many images from the prior into a folder called samples")
    add("--label", help="of the samples, for a conditional model (default: all in turn)")
    add("--temperature", type=utils.number(float, 1e-3, 1e3), help="scale of the prior's deviation, for the samples")
    add("--draw-pixels", action="store_true", help="draw the samples' pixels too, instead of showing their means")
    add("--compare", nargs="+", metavar="RUN", help="draw these runs' test losses into one picture, compared.png")
    args = parser.parse_args()
    how = {name: value for name in ("label", "temperature", "draw_pixels") if (value := getattr(args, name))}
    if how and not args.samples:
        parser.error("--label, --temperature and --draw-pixels are for --samples")
    if args.compare:
        print(f"wrote {compare_runs(args.compare, args.out_dir or '.')}")
    elif args.save or args.samples:
        opened = open_run(args.run, None, args.binarize, args.device, args.out_dir)
        if args.save:
            images = args.dataset, args.data_dir, args.hold_out
            number = save_encoded(args.save, opened, *images, args.nll_samples, args.seed)
            print(f"wrote {args.save}: {number:,} images")
        if args.samples:
            images = args.data_dir, args.dataset, args.hold_out
            dataset = open_test_data(opened.model, opened.checkpoint, opened.path, *images)
            print(f"wrote {write_samples(opened, dataset, args.samples, seed=args.seed, **how)}")
    else:
        where = {"device": args.device, "out_dir": args.out_dir, "seed": args.seed, "hold_out": args.hold_out}
        evaluate_run(args.run, None, args.dataset, args.data_dir, args.binarize, args.nll_samples, **where)


if __name__ == "__main__":
    main()
