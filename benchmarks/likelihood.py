"""Trains recipes and prints a row of the README's results table for each.

    python benchmarks/likelihood.py original five-minutes
    python benchmarks/likelihood.py burda2016 --epochs 121 --after 1 4 13 40      # a row after each of these epochs too

Other options than those below go to train.py.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import evaluate
import train
import utils
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
        options = vars(train.parse_args([f"@{RECIPES / recipe}.txt", "--dataset=mnist", *others]))
        rows += train_recipe(recipe, options, args.after, args.nll_samples)
        print(*rows, sep="\n")


def train_recipe(recipe: str, options: dict[str, Any], after: list[int], nll_samples: int) -> list[str]:
    """Trains with a recipe's options -> a row for the last epoch, and for each of those in `after` before it."""
    rows = []
    data = utils.load_dataset(options["dataset"], options.get("data_dir", "data"))
    binarize = options.get("binarize", "dynamic")
    is_likelihood = binarize != "none"  # gray targets have none

    def add_row(model: VAE, history: list[dict[str, Any]]) -> None:
        if len(history) not in (*after, options["epochs"]):
            return
        images = data.test_images.to(next(model.parameters()).device)
        metrics = evaluate.evaluate(model, images, binarize, nll_samples if is_likelihood else 1)
        minutes = sum(row["seconds"] for row in history) / 60  # of training: without tests, checkpoints and pictures
        nll = f"{metrics['nll']:.2f} ({nll_samples:,} samples)" if is_likelihood else ""
        figures = (f"{minutes:.1f} min", f"{metrics['neg_elbo']:.2f}", nll, str(metrics["active_units"]))
        rows.append(f"| {' | '.join((recipe, str(len(history)), *figures))} |")

    train.train(**options | {"dataset": data}, on_epoch=add_row)
    return rows


if __name__ == "__main__":
    main()
