"""Makes weights/NAME.pt of a run, in half precision: python weights/make.py runs/001-mnist-z20 default

Prints what that costs, and refuses where it is more than 0.01 nats.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import hubconf
import utils
from data import load_dataset
from evaluate import evaluate

KEPT = ("model", "class", "options", "checksum", "epoch")


@utils.command
def main() -> None:
    parser = utils.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="run folder or checkpoint file")
    parser.add_argument("name", help="of the file to make, which must not be there")
    parser.add_argument("--data-dir", default="data", metavar="DIR", help="(default: %(default)s)")
    args = parser.parse_args()
    path = Path(__file__).parent / f"{args.name}.pt"
    if path.exists():
        raise utils.UserError(f"{path} is there: delete it first")
    whole, checkpoint = hubconf.load(args.run)
    half = {name: tensor.half() for name, tensor in checkpoint["model_state_dict"].items()}
    options = checkpoint["options"]
    dataset = load_dataset(options["dataset"], args.data_dir, hold_out=options.get("hold_out", 0))
    utils.save_checkpoint(path, {name: checkpoint[name] for name in KEPT} | {"model_state_dict": half})
    halved, _ = hubconf.load(path)
    before, after = (evaluate(model, dataset.test_images, options["binarize"]) for model in (whole, halved))
    cost = abs(after["nll"] - before["nll"])
    if cost > 0.01:
        path.unlink()
        raise utils.UserError(f"half precision moves nll by {cost:.4f} nats, by more than 0.01: {path} is not made")
    figures = f"neg_elbo {after['neg_elbo']:.2f}, nll {after['nll']:.2f} ({after['nll_samples']} samples)"
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, {figures}; half precision moves nll by {cost:.4f} nats")


if __name__ == "__main__":
    main()
