"""assets/: the README's pictures, which are of the models in weights/."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import rgb_to_hsv, to_rgb
from PIL import Image

import evaluate
from assets import diagrams, make
from data import ImageData
from docs.make import MODELS
from model import VAE
from pictures import class_colors
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


def test_arrows_lead_from_box_to_box():
    figure = diagrams.draw_architecture(VAE())
    figure.draw_without_rendering()
    texts = figure.axes[0].texts
    boxes = [text.get_bbox_patch().get_window_extent() for text in texts if text.get_bbox_patch()]
    arrows = [text.arrow_patch for text in texts if getattr(text, "arrow_patch", None)]
    assert len(arrows) == 10
    for arrow in arrows:
        start, _, end = arrow.get_path().vertices[:3]
        near = [[box.padded(3).contains(*place) for box in boxes] for place in (start, end)]
        inside = [[box.padded(-3).contains(*place) for box in boxes] for place in (start, end)]
        assert np.sum(near, axis=1).tolist() == [1, 1]
        assert near[0] != near[1]
        assert not np.any(inside)


def test_no_two_of_ten_classes_are_gray():
    assert all(rgb_to_hsv(to_rgb(color))[1] > 0.25 for color in class_colors(10))
