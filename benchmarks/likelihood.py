"""Trains recipes and prints a row of the results in docs/likelihoods.md for each.

    python benchmarks/likelihood.py original five-minutes
    python benchmarks/likelihood.py five-minutes --hold-out 5000 --nll-samples 100

train.py's options come after the recipe's, so they win.
"""

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import evaluate
import train
import utils
from data import load_dataset
from options import Options, make_options, make_parser, parse_given

RECIPES = Path(__file__).parent.parent / "recipes"


@utils.command
def main() -> None:
    parser = make_parser(__doc__, dataset="mnist")
    own, recipes = parser.add_argument_group("recipes"), sorted(RECIPES.iterdir())
    choices = [path.stem for path in recipes if "experiments/" not in path.read_text(encoding="utf-8")]
    own.add_argument("recipes", nargs="+", metavar="RECIPE", choices=choices)
    own.add_argument("--nll-samples", type=utils.count, default=5000, metavar="K", help="importance samples")
    args = parser.parse_args()
    rows = [
        "| recipe | epochs | training time | neg_elbo | nll | active units |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for recipe in args.recipes:
        given = {"dataset": "mnist"} | parse_given(parser, [f"@{RECIPES / recipe}.txt", *sys.argv[1:]])
        options = {name: value for name, value in given.items() if name not in ("recipes", "nll_samples")}
        rows.append(train_recipe(recipe, make_options(**options), args.nll_samples))
        print(*rows, sep="\n")


def train_recipe(recipe: str, options: Options, nll_samples: int) -> str:
    """Trains with a recipe's options and returns its row."""
    dataset = load_dataset(options.dataset, options.data_dir, options.image_size, options.hold_out)
    model, history, _ = train.train(**dataclasses.asdict(options) | {"dataset": dataset})
    metrics = evaluate.evaluate(model, dataset.test_images, options.binarize, nll_samples)
    minutes = sum(row["seconds"] for row in history) / 60  # of training: without tests, checkpoints and pictures
    nll = "" if metrics["nll"] is None else f"{metrics['nll']:.2f} ({nll_samples:,} samples)"
    neg_elbo = f"{metrics['neg_elbo']:.2f}"
    return f"| {recipe} | {len(history)} | {minutes:.1f} min | {neg_elbo} | {nll} | {metrics['active_units']} |"


if __name__ == "__main__":
    main()
