"""assets/: the README's pictures, which are of the models in weights/."""

from pathlib import Path

import pytest
from PIL import Image

import evaluate
from assets import make
from data import ImageData
from docs.make import MODELS
from tests.conftest import thinned


def weights_of(picture: Path) -> str:
    return Image.open(picture).info["Weights"]


def test_pictures_are_of_the_weights_that_are_here():
    """Otherwise python assets/make.py draws them anew."""
    for name, pictures in make.PICTURES.items():
        for picture in pictures:
            assert weights_of(make.ASSETS / f"{picture}.png") == make.fingerprint([name]), picture
    film = Image.open(make.ASSETS / "page.gif")
    assert film.info["comment"].decode() == make.fingerprint([name for name, _ in MODELS.values()])


def test_every_picture_is_drawn_or_said_to_be_left_out():
    drawn = {"architecture.png", "latent.png", "page.gif"}
    drawn |= {f"{picture}.png" for pictures in make.PICTURES.values() for picture in pictures}
    there = {path.name for path in make.ASSETS.iterdir() if path.suffix in (".png", ".gif")}
    assert drawn <= there
    assert [name for name in there - drawn if name not in make.__doc__] == []


def test_draws_a_models_pictures(digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(evaluate.OpenedRun, "test_data", lambda *_, **__: thinned(digits, 20))
    monkeypatch.setattr(make, "ASSETS", tmp_path)
    make.draw_model("flow_prior", "data")
    expected = {f"{picture}.png": make.fingerprint(["flow_prior"]) for picture in make.PICTURES["flow_prior"]}
    assert {path.name: weights_of(path) for path in tmp_path.iterdir()} == expected
