"""--hold-out: the last training images in the test set's place, from loading to a run's figures."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import data
import evaluate
import train
import utils
from data import ImageData, load_dataset
from model import VAE
from tests.conftest import thinned
from tests.test_data import lay_out

QUICK = {"epochs": 1, "hidden_size": 8, "latent_size": 2}


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "draw", lambda *args: None)
    monkeypatch.setattr(evaluate, "draw_all", lambda *args: ())


def test_the_last_training_images_and_not_the_test_set(tmp_path: Path):
    images = lay_out(tmp_path, "mnist", num_train=30)["train"]
    for file in (tmp_path / "MNIST" / "raw").glob("t10k*"):
        file.write_bytes(b"not to be read")
    held = load_dataset("auto", tmp_path, hold_out=4)
    assert (held.name, held.num_held_out) == ("mnist", 4)
    assert torch.equal(held.train_images, torch.from_numpy(images[:26]))
    assert torch.equal(held.test_images, torch.from_numpy(images[26:]))
    assert held.train_labels.tolist() == [i % 10 for i in range(26)]
    assert held.test_labels.tolist() == [6, 7, 8, 9]


def test_of_images_stored_class_by_class_some_of_each(digits: ImageData):
    held = load_dataset("mnist-5k", hold_out=500)
    assert held.test_labels.bincount().min() > 30  # of 50 on average: below in one draw of a thousand
    parts = [*held.train_images, *held.test_images]
    assert sorted(bytes(i.numpy()) for i in parts) == sorted(bytes(i.numpy()) for i in digits.train_images)
    for images, labels in ((held.train_images, held.train_labels), (held.test_images, held.test_labels)):
        label_of = {bytes(i.numpy()): label for i, label in zip(digits.train_images, digits.train_labels, strict=True)}
        assert labels.tolist() == [label_of[bytes(image.numpy())] for image in images]
    assert torch.equal(load_dataset("mnist-5k", hold_out=500).test_images, held.test_images)


def test_a_run_is_resumed_and_evaluated_on_what_it_held_out(digits: ImageData, tmp_path: Path, capsys, monkeypatch):
    few = thinned(digits, 25)  # 180 for training
    no_test_set = replace(few, test_images=torch.zeros_like(few.test_images))
    held = few.hold_out(60)
    monkeypatch.setattr(data, "_load_mnist_5k", lambda: no_test_set)
    model, history, run = train.train("mnist-5k", out_dir=tmp_path, hold_out=60, **QUICK)
    assert "120 training images, 60 others held out to test on" in capsys.readouterr().out
    _, expected, _ = train.train(held, out_dir=tmp_path, **QUICK)
    assert [history[0][name] for name in train.COLUMNS[:5]] == [expected[0][name] for name in train.COLUMNS[:5]]
    train.resume(run, epochs=2)

    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(run), "--nll-samples", "1"])
    evaluate.main()
    assert "tested on 60 held-out training images; 60 held-out images" in capsys.readouterr().out
    metrics = json.loads((run / "metrics.json").read_text())
    model, _ = utils.load_checkpoint(run)
    expected = evaluate.evaluate(model, held.test_images, nll_samples=1)
    assert metrics == expected | {"dataset": "mnist-5k", "hold_out": 60, "binarize": "dynamic"}

    metrics = evaluate.evaluate_run(run, nll_samples=1, hold_out=0)  # the test set after all
    assert metrics["hold_out"] == 0
    assert metrics["neg_elbo"] == evaluate.evaluate(model, no_test_set.test_images, nll_samples=1)["neg_elbo"]
    metrics = evaluate.evaluate_run(run, nll_samples=1, dataset="mnist-5k")  # so too where the data set is named
    assert metrics["num_images"] == 20


def test_images_of_ones_own(digits: ImageData, tmp_path: Path):
    mine = replace(thinned(digits, 25), name="mine")
    _, _, run = train.train(mine, out_dir=tmp_path, hold_out=60, **QUICK)
    train.resume(run, dataset=mine, epochs=2)
    train.resume(run, dataset=mine.hold_out(60), epochs=3)
    assert evaluate.evaluate_run(run, dataset=mine, nll_samples=1)["hold_out"] == 60
    held = mine.hold_out(60)
    _, _, run = train.train(held, out_dir=tmp_path, **QUICK)
    assert utils.read_checkpoint(run)["options"]["hold_out"] == 60
    assert train.resume(run, dataset=held, epochs=2)[2] == run


@pytest.mark.parametrize("n", ["1", "4499", "-2", "x"])
def test_bad_sizes(n: str, tmp_path: Path, fails: Callable):
    options = ("--dataset", "mnist-5k", "--hold-out", n)
    assert "--hold-out" in fails(train.main, *options, "--out-dir", tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
    utils.save_checkpoint(
        tmp_path / "x.pt", {"model": VAE().config, "model_state_dict": VAE().state_dict(), "options": {}}
    )
    assert "--hold-out" in fails(evaluate.main, tmp_path / "x.pt", *options)
