"""Every recipe is a set of options that train accepts, and a comment is no option."""

from collections.abc import Callable
from pathlib import Path

import pytest

import train
from model import VAE

RECIPES = sorted((Path(__file__).parent.parent / "recipes").iterdir())


def options_of(*args: str) -> dict:
    defaults = {name: parameter.default for name, parameter in train.inspect.signature(train.train).parameters.items()}
    return defaults | vars(train.parse_args(list(args)))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_accepted(recipe: Path):
    options = options_of(f"@{recipe}")
    train.check_options(options)
    VAE(
        784,
        *(options[name] for name in ("hidden_size", "latent_size", "encoder_layers", "decoder_layers", "activation")),
    )
    assert options_of(f"@{recipe}", "--epochs", "3") == options | {"epochs": 3}


def test_burda2016_is_the_papers_protocol():
    options = options_of(f"@{RECIPES[0].parent / 'burda2016.txt'}")
    assert options["epochs"] == sum(3**i for i in range(8)) == 3280
    assert (options["batch_size"], options["latent_size"], options["activation"]) == (20, 50, "tanh")


def test_argument_file(tmp_path: Path, fails: Callable):
    path = tmp_path / "mine.txt"
    path.write_text("# a comment\n--epochs 7 --lr 1e-4   # another\n\n--out-dir 'a folder'\n")
    assert vars(train.parse_args([f"@{path}", "--lr=1"])) == {"epochs": 7, "lr": 1.0, "out_dir": "a folder"}
    assert "missing.txt" in fails(train.main, f"@{tmp_path / 'missing.txt'}")
