"""Trains recipes and prints a row of the README's results table for each.

    python benchmarks/likelihood.py original five-minutes
    python benchmarks/likelihood.py burda2016 --epochs 121

Other options than those below go to train.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import evaluate
import train
import utils

RECIPES = Path(__file__).parent.parent / "recipes"


@utils.command
def main() -> None:
    parser = utils.ArgumentParser(description=__doc__)
    parser.add_argument("recipes", nargs="+", metavar="RECIPE", choices=sorted(path.stem for path in RECIPES.iterdir()))
    parser.add_argument("--nll-samples", type=int, default=5000, metavar="K", help="(default: %(default)s)")
    args, others = parser.parse_known_args()
    rows = [
        "| recipe | epochs | training time | neg_elbo | nll | active units |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for recipe in args.recipes:
        options = vars(train.parse_args([f"@{RECIPES / recipe}.txt", "--dataset=mnist", *others]))
        model, history, run = train.train(**options)
        data = utils.load_dataset(options["dataset"], options.get("data_dir", "data")).to(
            next(model.parameters()).device
        )
        binarize = options.get("binarize", "dynamic")
        is_likelihood = binarize != "none"  # gray targets have none
        metrics = evaluate.evaluate(model, data.test_images, binarize, args.nll_samples if is_likelihood else 1)
        nll = f"{metrics['nll']:.2f} ({args.nll_samples:,} samples)" if is_likelihood else ""
        minutes = sum(row["seconds"] for row in history) / 60
        figures = (f"{minutes:.1f} min", f"{metrics['neg_elbo']:.2f}", nll, str(metrics["active_units"]))
        rows.append(f"| {' | '.join((recipe, str(len(history)), *figures))} |")
        print(f"{run}:", *rows, sep="\n")


if __name__ == "__main__":
    main()
