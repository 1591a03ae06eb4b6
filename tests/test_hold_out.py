"""--hold-out: the last training images stand in the test set's place, from loading to a run's figures."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import evaluate
import runs
import train
from data import ImageData, load_dataset
from tests.conftest import thinned
from tests.test_data import lay_out

QUICK = {"epochs": 1, "hidden_size": 8, "latent_size": 2}
pytestmark = pytest.mark.usefixtures("no_pictures")


def test_the_last_training_images_and_not_the_test_set(tmp_path: Path):
    images = torch.from_numpy(lay_out(tmp_path, "mnist", num_train=30)["train"])[:, None]
    for file in (tmp_path / "MNIST" / "raw").glob("t10k*"):
        file.write_bytes(b"not to be read")
    held = load_dataset("auto", tmp_path, hold_out=4)
    assert (held.name, held.num_held_out) == ("mnist", 4)
    assert torch.equal(held.train_images, images[:26])
    assert torch.equal(held.test_images, images[26:])
    assert held.train_labels.tolist() == [i % 10 for i in range(26)]
    assert held.test_labels.tolist() == [6, 7, 8, 9]


def test_some_of_each_class_if_images_are_stored_class_by_class(digits: ImageData):
    order = digits.train_labels.argsort(stable=True)
    images, labels = digits.train_images[order], digits.train_labels[order]
    images[:, 0, 0, 0], images[:, 0, 0, 1] = torch.arange(5000) // 256, torch.arange(5000) % 256  # each one's number
    dataset = ImageData("mine", digits.classes, images, labels, digits.test_images, digits.test_labels)
    held = dataset.hold_out(500)
    assert held.test_labels.bincount().min() > 30  # of 50 on average
    numbers = [256 * part[:, 0, 0, 0].long() + part[:, 0, 0, 1] for part in (held.train_images, held.test_images)]
    assert torch.cat(numbers).sort().values.tolist() == list(range(5000))
    assert torch.equal(labels[torch.cat(numbers)], torch.cat([held.train_labels, held.test_labels]))
    assert torch.equal(dataset.hold_out(500).test_images, held.test_images)


def test_a_run_is_resumed_and_evaluated_on_what_it_held_out(few_digits: Path, tmp_path: Path, capsys, call: Callable):
    few = load_dataset(str(few_digits))
    held = few.hold_out(60)
    _, history, run = train.train(few_digits, out_dir=tmp_path, hold_out=60, **QUICK)
    assert "452 training images of 1 x 28 x 28, 60 others held out to test on" in capsys.readouterr().out
    _, expected, _ = train.train(held, out_dir=tmp_path, **QUICK)
    assert [history[0][name] for name in train.COLUMNS[:5]] == [expected[0][name] for name in train.COLUMNS[:5]]
    train.resume(run, epochs=2)

    call(evaluate.main, run, "--nll-samples", 1)
    assert "tested on 60 held-out training images; 60 held-out images" in capsys.readouterr().out
    metrics = json.loads((run / "metrics.json").read_text())
    model, _ = runs.load_checkpoint(run)
    expected = evaluate.evaluate(model, held.test_images, nll_samples=1)
    del expected["per_image"]
    assert metrics == expected | {"dataset": "few", "hold_out": 60, "binarize": "none"}

    on_test_set = evaluate.evaluate(model, few.test_images, nll_samples=1)["neg_elbo"]
    for how in ({"hold_out": 0}, {"dataset": few_digits}):  # asked for, or a data set named
        metrics = evaluate.evaluate_run(run, nll_samples=1, **how)
        assert (metrics["hold_out"], metrics["neg_elbo"]) == (0, on_test_set)


def test_images_of_ones_own(digits: ImageData, tmp_path: Path):
    mine = thinned(digits, 25)
    _, _, run = train.train(mine, out_dir=tmp_path, hold_out=60, **QUICK)
    train.resume(run, dataset=mine, epochs=2)
    train.resume(run, dataset=mine.hold_out(60), epochs=3)
    assert evaluate.evaluate_run(run, dataset=mine, nll_samples=1)["hold_out"] == 60


@pytest.mark.parametrize("n", ["1", "4999", "-2", "x"])
def test_bad_sizes(n: str, tmp_path: Path, fails: Callable):
    options = ("--dataset", "mnist-5k", "--hold-out", n)
    assert "--hold-out" in fails(train.main, *options, "--out-dir", tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
    weights = Path(train.__file__).parent / "weights" / "2d.pt"
    assert "--hold-out" in fails(evaluate.main, weights, *options, "--out-dir", tmp_path)
