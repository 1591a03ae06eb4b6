"""Trains recipes and prints a row of the README's results table for each.

    python benchmarks/likelihood.py original five-minutes
    python benchmarks/likelihood.py burda2016 --epochs 364 --after 40 121   # a row after each of these epochs too

Other options than those below go to train.py.
"""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import evaluate
import train
import utils
from data import load_dataset
from model import VAE

RECIPES = Path(__file__).parent.parent / "recipes"


@utils.command
def main() -> None:
    parser = utils.ArgumentParser(description=__doc__)
    parser.add_argument("recipes", nargs="+", metavar="RECIPE", choices=sorted(path.stem for path in RECIPES.iterdir()))
    parser.add_argument("--after", nargs="+", type=utils.count, default=[], metavar="EPOCH", help="rows on the way too")
    parser.add_argument("--nll-samples", type=utils.count, default=5000, metavar="K", help="(default: %(default)s)")
    args, others = parser.parse_known_args()
    rows = [
        "| recipe | epochs | training time | neg_elbo | nll | active units |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for recipe in args.recipes:
        given = vars(train.parse_args([f"@{RECIPES / recipe}.txt", "--dataset=mnist", *others]))
        options = train.Options(**given)
        rows += train_recipe(recipe, options, args.after, args.nll_samples)
        print(*rows, sep="\n")


def train_recipe(recipe: str, options: train.Options, after: list[int], nll_samples: int) -> list[str]:
    """Trains with a recipe's options -> a row for the last epoch, and for each of those in `after` before it."""
    rows = []
    dataset = load_dataset(options.dataset, options.data_dir, options.image_size, options.hold_out)

    def add_row(model: VAE, history: list[dict[str, Any]]) -> None:
        if len(history) not in (*after, options.epochs):
            return
        metrics = evaluate.evaluate(model, dataset.test_images, options.binarize, nll_samples)
        minutes = sum(row["seconds"] for row in history) / 60  # of training: without tests, checkpoints and pictures
        nll = "" if metrics["nll"] is None else f"{metrics['nll']:.2f} ({nll_samples:,} samples)"
        figures = (f"{minutes:.1f} min", f"{metrics['neg_elbo']:.2f}", nll, str(metrics["active_units"]))
        rows.append(f"| {' | '.join((recipe, str(len(history)), *figures))} |")

    train.train(**asdict(options) | {"dataset": dataset}, on_epoch=add_row)
    return rows


if __name__ == "__main__":
    main()
