"""How well nll tells other images from those that a model was trained on: the area under the ROC curve.

    python benchmarks/outliers.py weights/default.pt

The others are the same test images turned, mirrored, inverted, blurred and blank. 1 means that nll tells all of them,
0.5 that it tells nothing, and less than 0.5 that the model finds the others likelier than its own kind. That happens:
see Nalisnick et al. 2019, arXiv 1810.09136.
"""

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

import evaluate
import utils

CHANGES: dict[str, Callable[[Tensor], Tensor]] = {  # of images (N, C, H, W) uint8
    "turned by 90 degrees": lambda images: images.rot90(1, (2, 3)),
    "turned by 180 degrees": lambda images: images.rot90(2, (2, 3)),
    "mirrored": lambda images: images.flip(3),
    "inverted": lambda images: 255 - images,
    "blurred": lambda images: gaussian_blur(images, 7, 2.0),
    "blank": torch.zeros_like,
}


def area_under_roc(usual: Tensor, others: Tensor) -> float:
    """P(other > usual) + P(other = usual) / 2 of two draws, which is the area (Mann & Whitney 1947)."""
    usual = usual.sort().values
    less = torch.searchsorted(usual, others) + torch.searchsorted(usual, others, right=True)
    return (less.double().mean() / (2 * len(usual))).item()


@utils.command
def main() -> None:
    parser = utils.ArgumentParser(description=__doc__)
    parser.add_argument("run", nargs="?", default="runs", help="run folder, checkpoint file, or folder of runs")
    parser.add_argument("--images", type=utils.count, default=1000, metavar="N", help="test images")
    evaluate.add_nll_samples(parser)
    parser.add_argument("--data-dir", default="data", metavar="DIR", help="where data sets are read and downloaded")
    args = parser.parse_args()
    opened = evaluate.open_run(args.run)
    dataset = opened.test_data(data_dir=args.data_dir)
    images, labels = dataset.test_images[: args.images], dataset.test_labels[: args.images]
    if images.shape[2] != images.shape[3]:
        raise utils.UserError("the images must be square, so that they can be turned")

    def nll_of(images: Tensor) -> Tensor:
        metrics = evaluate.evaluate(opened.model, images, opened.binarize, args.nll_samples, labels=labels)
        if metrics["nll"] is None:
            raise utils.UserError("the model has no likelihood of the targets that it was trained on")
        return metrics["per_image"].nll

    usual = nll_of(images)
    print(f"{opened.path}: {len(images):,} test images, nll {usual.mean():.2f}")
    print("| the same images | nll | area under the ROC curve |\n| --- | --- | --- |")
    for name, change in CHANGES.items():
        others = nll_of(change(images))
        print(f"| {name} | {others.mean():.2f} | {area_under_roc(usual, others):.3f} |")


if __name__ == "__main__":
    main()
