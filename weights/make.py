"""Makes weights/NAME.pt from a run, in half precision: python weights/make.py runs/001-mnist-z20 default

Prints what half precision costs, and refuses if that is more than 0.01 nats (or 0.01 %, if that is more).
"""

import copy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import runs
import utils
from evaluate import evaluate, open_run

ROOT = Path(__file__).resolve().parent.parent
KEPT = ("model", "class", "shape", "classes", "options", "checksum", "labels_checksum", "epoch")


@utils.command
def main() -> None:
    parser = utils.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="run folder, checkpoint file, or folder of runs")
    parser.add_argument("name", help="of the file to make, which must not exist")
    parser.add_argument("--data-dir", default="data", metavar="DIR", help="where data sets are read and downloaded")
    args = parser.parse_args()
    path = Path(__file__).parent / f"{args.name}.pt"
    if path.exists():
        raise utils.UserError(f"{path} exists: delete it first")
    opened = open_run(args.run, device="cpu")
    whole, checkpoint = opened.model, opened.checkpoint
    if missing := [name for name in KEPT if name not in checkpoint]:
        raise utils.UserError(f"{args.run} is not a run of train.py: it lacks {', '.join(missing)}")
    options, halved = checkpoint["options"], copy.deepcopy(whole)
    half = {name: tensor.half() for name, tensor in checkpoint["model_state_dict"].items()}
    halved.load_state_dict(half)
    dataset = opened.test_data(data_dir=args.data_dir)
    before, after = (
        evaluate(model, dataset.test_images, options["binarize"], labels=dataset.test_labels)
        for model in (whole, halved)
    )
    loss = "neg_elbo" if after["nll"] is None else "nll"  # gray targets have no likelihood
    cost = abs(after[loss] - before[loss])
    if not cost <= max(0.01, 1e-4 * before[loss]):
        raise utils.UserError(f"half precision moves {loss} by {cost:.4f} nats, which is too much: {path} is not made")
    place = Path(options["dataset"])  # of images of one's own; not where this machine keeps the repository
    if place.is_relative_to(ROOT):
        options["dataset"] = place.relative_to(ROOT).as_posix()
    runs.save_checkpoint(path, {name: checkpoint[name] for name in KEPT} | {"model_state_dict": half})
    figures = ", ".join(f"{name} {after[name]:.2f}" for name in dict.fromkeys(("neg_elbo", loss)))
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, {figures}; half precision moves {loss} by {cost:.4f} nats")


if __name__ == "__main__":
    main()
