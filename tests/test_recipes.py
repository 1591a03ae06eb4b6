"""Every recipe is a set of options that train accepts, and a comment is no option."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

import train
from data import ImageData
from model import VAE

RECIPES = sorted((Path(__file__).parent.parent / "recipes").iterdir())


def options_of(*words: str) -> train.Options:
    return train.make_options(**train.parse_given(train.make_parser(None), list(words)))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_accepted(recipe: Path, digits: ImageData):
    options = options_of(f"@{recipe}")
    VAE.for_data(digits, options.resolve(digits))
    assert options_of(f"@{recipe}", "--epochs", "3") == dataclasses.replace(options, epochs=3)


def test_published_recipes_are_what_was_published():
    """Each one's sizes, batch, Adam, epochs and targets are those of its repository; weights are not averaged."""
    published = {
        "original": {"hidden_size": 512, "latent_size": 20, "encoder_layers": 2, "decoder_layers": 1}
        | {"activation": "relu", "binarize": "threshold", "batch_size": 64, "lr": 1e-3, "lr_schedule": "constant"}
        | {"adam_eps": 1e-8, "epochs": 20},
        "pytorch-example": {"hidden_size": 400, "latent_size": 20, "encoder_layers": 1, "decoder_layers": 1}
        | {"activation": "relu", "binarize": "none", "batch_size": 128, "lr": 1e-3, "lr_schedule": "constant"}
        | {"adam_eps": 1e-8, "epochs": 10},
    }
    for name, expected in published.items():
        options = options_of(f"@{RECIPES[0].parent / name}.txt")
        assert {option: getattr(options, option) for option in expected} == expected, name
        assert (options.average, options.beta, options.kl_warmup) == (False, 1, 0), name


def test_argument_file(tmp_path: Path, fails: Callable):
    path = tmp_path / "mine.txt"
    path.write_text("# a comment\n--epochs 7 --lr 1e-4   # another\n\n--out-dir 'a folder' --data-dir C:\\new\n")
    given = train.parse_given(train.make_parser(None), [f"@{path}", "--lr=1"])
    assert given == {"epochs": 7, "lr": 1.0, "out_dir": "a folder", "data_dir": "C:\\new"}
    assert "missing.txt" in fails(train.main, f"@{tmp_path / 'missing.txt'}")
    for content, says in ((b"--dataset=my digit's", "No closing quotation"), (b"\xff\xfe\x00", "decode")):
        path.write_bytes(content)
        assert says in fails(train.main, f"@{path}")
