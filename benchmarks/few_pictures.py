"""How good experiments/conv_flow.py becomes on few pictures, with recipes/pictures.txt.

    python benchmarks/few_pictures.py 60 300 --dataset data/emoji.npz
    python benchmarks/few_pictures.py 300 --epochs 60 --dataset data/emoji.npz

Trains on the first 60 pictures of the training set, then on the first 300, and tests each on the whole test set.
"""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import evaluate
import utils
from data import load_dataset
from experiments.conv_flow import ConvFlowVAE
from experiments.convolutional import SIZES
from options import make_parser, parse_given
from train import train

RECIPE = Path(__file__).parent.parent / "recipes" / "pictures.txt"


@utils.command
def main() -> None:
    parser = utils.ArgumentParser(description=__doc__)
    parser.add_argument("counts", nargs="+", type=utils.count, metavar="N", help="pictures to train on")
    parser.add_argument("--dataset", required=True, help="as for train.py")
    parser.add_argument("--epochs", type=utils.count, help="passes over them (default: the recipe's)")
    parser.add_argument("--out-dir", default="runs", help="where run folders are created")
    args = parser.parse_args()
    dataset = load_dataset(args.dataset)
    options = SIZES | parse_given(make_parser(None), [f"@{RECIPE}"]) | {"out_dir": args.out_dir}
    if args.epochs:
        options["epochs"] = args.epochs
    rows = ["| pictures | epochs | bits per dimension, training | test | lowest test loss |", "|" + " --- |" * 5]
    for count in args.counts:
        few = replace(dataset, train_images=dataset.train_images[:count], train_labels=dataset.train_labels[:count])
        model, history, _ = train(few, ConvFlowVAE, **options)
        found = [evaluate.evaluate(model, images)["bits_per_dim"] for images in (few.train_images, few.test_images)]
        best = min(history, key=lambda row: row["test_loss"])
        rows.append(f"| {count:,} | {len(history)} | {found[0]:.3f} | {found[1]:.3f} | after epoch {best['epoch']} |")
    print(*rows, sep="\n")


if __name__ == "__main__":
    main()
