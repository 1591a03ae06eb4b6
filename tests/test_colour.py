"""Pictures in colour and of 8 bits: from files to pictures, with the likelihood of their 256 levels."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import measure
import runs
import train
import utils
from data import ImageData, load_dataset
from experiments.conditional import ConditionalVAE
from model import VAE

SMALL = ["--epochs=2", "--hidden-size=16", "--latent-size=3", "--batch-size=50", "--device=cpu"]
DRAWN = {"curves", "reconstructions", "prior_samples", "completions", "interpolations", "latent_space", "latent_usage"}
DRAWN |= {"traversals", "least_likely"}


def make_images(n: int, size: int) -> np.ndarray:
    """Squares of a random colour on a ground of another, (n, size, size, 3) uint8."""
    rng = np.random.default_rng(0)
    images = np.ones((n, size, size, 3)) * rng.integers(0, 256, (n, 1, 1, 3))
    images[:, size // 4 : -size // 4, size // 4 : -size // 4] = rng.integers(0, 256, (n, 1, 1, 3))
    return images.astype(np.uint8)


@pytest.fixture
def colours() -> ImageData:
    images, labels = torch.from_numpy(make_images(100, 8)).permute(0, 3, 1, 2), torch.arange(100) % 2
    return ImageData("colours", ["a", "b"], images[:80], labels[:80], images[80:], labels[80:])


@pytest.mark.usefixtures("short_chains")
def test_from_files_to_pictures(tmp_path: Path, call: Callable, capsys: pytest.CaptureFixture):
    for i, image in enumerate(make_images(150, 20)):
        path = tmp_path / "mine" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    arguments = ["--dataset", tmp_path / "mine", "--image-size=16", *SMALL, "--out-dir", tmp_path / "runs"]
    call(train.main, *arguments)
    assert "bits per dimension" in capsys.readouterr().out
    made = tmp_path / "runs" / "001-mine-z3"
    call(train.main, "--resume", made, "--epochs=3")
    call(evaluate.main, tmp_path / "runs", "--nll-samples=2")
    assert {path.stem for path in made.glob("*.png")} == DRAWN
    model, checkpoint = runs.load_checkpoint(made)
    config = {name: model.config[name] for name in ("input_size", "channels", "likelihood")}
    assert config == {"input_size": 3 * 16**2, "channels": 3, "likelihood": "logistic"}
    assert (checkpoint["epoch"], checkpoint["options"]["binarize"]) == (3, "none")
    metrics = json.loads((made / "metrics.json").read_text("utf-8"))
    assert metrics["bits_per_dim"] == pytest.approx(metrics["nll"] / (3 * 16**2) / math.log(2))
    assert f"{metrics['bits_per_dim']:.3f}" in capsys.readouterr().out


def test_a_gray_version_is_trained_and_tested_as_such(tmp_path: Path, call: Callable, no_pictures: None):
    np.savez(tmp_path / "mine.npz", images=make_images(60, 8))
    call(train.main, "--dataset", tmp_path / "mine.npz", "--grayscale", *SMALL, "--out-dir", tmp_path)
    made = tmp_path / "001-mine-z3"
    call(train.main, "--resume", made, "--epochs=3")
    call(evaluate.main, made, "--nll-samples=1")
    call(evaluate.main, made, "--nll-samples=1", "--dataset", tmp_path / "mine.npz")
    assert runs.load_checkpoint(made)[0].config["channels"] == 1


def test_a_colour_model_is_tested_on_gray_pictures(colours: ImageData, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(train, "draw", lambda *args: None)
    monkeypatch.setattr(evaluate, "draw_all", lambda *args: ())
    _, _, made = train.train(colours, epochs=1, hidden_size=8, latent_size=2, out_dir=tmp_path)
    np.savez(tmp_path / "gray.npz", images=make_images(60, 8)[..., 0])
    metrics = evaluate.evaluate_run(made, dataset=tmp_path / "gray.npz", nll_samples=1)
    assert metrics["bits_per_dim"] > 0
    gray = load_dataset(str(tmp_path / "gray.npz"))
    rgb = load_dataset(str(tmp_path / "gray.npz"), channels=3)
    for part in ("train_images", "test_images"):
        assert torch.equal(getattr(rgb, part), torch.cat([getattr(gray, part)] * 3, 1))


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("mnist-5k", {}, ("bernoulli", "dynamic")),
        ("mnist-5k", {"binarize": "none"}, ("bernoulli", "none")),
        ("mnist-5k", {"likelihood": "logistic"}, ("logistic", "none")),
        ("cifar10", {}, ("logistic", "none")),
        ("mine", {}, ("logistic", "none")),
        ("mine", {"binarize": "threshold"}, ("bernoulli", "threshold")),
        ("mine", {"likelihood": "bernoulli"}, ("bernoulli", "dynamic")),
        ("mine", {"likelihood": "bernoulli", "binarize": "none"}, ("bernoulli", "none")),
    ],
)
def test_defaults_follow_the_data(name: str, given: dict, expected: tuple, colours: ImageData, tmp_path, monkeypatch):
    data = replace(colours, name=name)
    monkeypatch.setattr(train, "draw", lambda *args: None)
    model, _, made = train.train(data, epochs=1, hidden_size=8, latent_size=2, out_dir=tmp_path, **given)
    options = runs.read_checkpoint(made)["options"]
    assert (options["likelihood"], options["binarize"]) == expected
    assert model.config["likelihood"] == expected[0]
    metrics = evaluate.evaluate(model, data.test_images, nll_samples=1)
    assert (metrics["bits_per_dim"] is None) == (expected[0] == "bernoulli")


def test_an_epoch_says_the_bits_of_its_test_loss(colours: ImageData, tmp_path: Path, monkeypatch, capsys):
    """For each value of an image of 3 x 8 x 8."""
    monkeypatch.setattr(train, "draw", lambda *args: None)
    _, (row,), _ = train.train(colours, epochs=1, hidden_size=8, latent_size=2, out_dir=tmp_path)
    bits = row["test_loss"] / 192 / math.log(2)
    assert f"({bits:.3f} bits per dimension)" in capsys.readouterr().out


def test_a_given_model_keeps_its_likelihood(colours: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(train, "draw", lambda *args: None)
    for likelihood, binarize in (("bernoulli", "dynamic"), ("logistic", "none")):
        model = VAE(192, 8, 2, likelihood=likelihood, channels=3)
        _, _, made = train.train(colours, model, epochs=1, out_dir=tmp_path)
        options = runs.read_checkpoint(made)["options"]
        assert (options["likelihood"], options["binarize"]) == (likelihood, binarize)
    with pytest.raises(utils.UserError, match="--likelihood"):
        train.train(colours, model, epochs=1, out_dir=tmp_path, likelihood="bernoulli")


def test_the_logistic_learns_in_bfloat16(colours: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(train, "draw", lambda *args: None)
    options = {"epochs": 75, "hidden_size": 64, "latent_size": 6, "batch_size": 20, "lr": 5e-3, "device": "cpu"}
    model, history, _ = train.train(colours, out_dir=tmp_path, precision="bfloat16", **options)
    bits = [measure.bits_per_dim(history[i]["test_loss"], 192) for i in (0, -1)]
    assert bits[0] > 7
    assert bits[1] < 6.5  # uniform noise has 8
    assert (model.log_scale < -2.05).all()  # where it started: the scales are learned


def test_mirrored_images_are_trained_on_too(colours: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An epoch with --mirror is one on the images and their mirror images, each with its label, which is heard."""
    monkeypatch.setattr(train, "draw", lambda *args: None)
    options = {"epochs": 2, "hidden_size": 8, "latent_size": 2, "out_dir": tmp_path, "device": "cpu"}
    images = torch.randint(0, 256, colours.train_images.shape, dtype=torch.uint8)  # which are not their mirror images
    colours = replace(colours, train_images=images)
    _, _, mirrored = train.train(colours, ConditionalVAE, **options, mirror=True)
    both = torch.cat([colours.train_images, colours.train_images.flip(3)])
    labels = torch.cat([colours.train_labels] * 2)
    twice = ImageData("twice", colours.classes, both, labels, colours.test_images, colours.test_labels)
    _, _, plain = train.train(twice, ConditionalVAE, **options)
    weights, expected = (runs.load_checkpoint(run)[0].state_dict() for run in (mirrored, plain))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    train.resume(mirrored, dataset=colours, epochs=3)  # its own images, without the copies
