"""Each experiment against closed forms, and as the command that it is."""

import copy
import json
import math
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributions import Categorical, ContinuousBernoulli, Independent, MixtureSameFamily, Normal

import data
import train
import utils
from data import ImageData, binarize_test_set
from experiments import conditional, convolutional, gray, vampprior
from tests.conftest import run_ranks, thinned

ROOT = Path(__file__).parent.parent
SMALL = ["--dataset=mnist-5k", "--epochs=1", "--hidden-size=16", "--latent-size=2", "--batch-size=100", "--device=cpu"]


@pytest.fixture(autouse=True)
def small_data(digits: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    few = thinned(digits, 10)
    for module in (train, train.evaluate, data):
        monkeypatch.setattr(module, "load_dataset", lambda *args: few)


# ---------------------------------------------------------------------------------------------------------------------
# What each one changes


def test_the_vampprior_is_the_mixture_of_posteriors():
    torch.manual_seed(0)
    model = vampprior.VampVAE(30, num_pseudo_inputs=7, hidden_size=16, latent_size=3)
    model.latent_z.mu.weight.data *= 20
    logvar, mu = model.components()
    components = Independent(Normal(mu, torch.exp(0.5 * logvar)), 1)
    mixture = MixtureSameFamily(Categorical(torch.ones(7)), components)
    z = 2 * torch.randn(4, 5, 3)
    torch.testing.assert_close(model.log_prior(z), mixture.log_prob(z), rtol=1e-4, atol=1e-4)
    narrow = copy.deepcopy(model).requires_grad_(False)
    narrow.latent_z.logvar.bias -= 6
    with utils.matmul_precision("medium", "cpu"):  # whose rounded factors would show here
        logvar, mu = narrow.components()
        components = Independent(Normal(mu, torch.exp(0.5 * logvar)), 1)
        expected = MixtureSameFamily(Categorical(torch.ones(7)), components).log_prob(z)
        torch.testing.assert_close(narrow.log_prior(z), expected, rtol=1e-4, atol=1e-2)
    draws = model.sample_prior(20_000)
    torch.testing.assert_close(draws.mean(0), mixture.mean, atol=0.05, rtol=0)
    torch.testing.assert_close(draws.var(0), mixture.variance, rtol=0.05, atol=0)
    model.log_prior(z).sum().backward()
    assert model.pseudo_inputs.grad.abs().sum() > 0


def test_pseudo_inputs_start_as_training_images(digits: ImageData):
    model = vampprior.make_model(digits, train.Options(hidden_size=8))
    images = {tuple(image) for image in (digits.train_images.flatten(1) / 255).tolist()}
    assert model.pseudo_inputs.shape == (500, 784)
    assert all(tuple(image) in images for image in model.pseudo_inputs.tolist())


def test_gray_levels_have_the_continuous_bernoullis_probabilities():
    """Its integral over each level, from torch.distributions where that is stable; and everywhere they sum to 1."""
    levels = torch.arange(256, dtype=torch.float64)
    model = gray.GrayVAE(1, 8, 2)
    for logit in (-8.0, -1.5, -0.051, -0.049, 0.0, 1e-4, 0.049, 0.051, 2.0, 8.0):
        outputs = torch.full((256, 1), logit, dtype=torch.float64)
        probability = model.log_likelihood(outputs, levels[:, None] / 255).exp()
        reference = ContinuousBernoulli(logits=outputs[0])
        edges = reference.cdf(torch.arange(257, dtype=torch.float64) / 256)
        torch.testing.assert_close(probability, edges.diff(), rtol=1e-3, atol=1e-7)
        assert probability.sum().item() == pytest.approx(1, abs=1e-7)
        torch.testing.assert_close(model.mean(outputs[0]), reference.mean, rtol=1e-3, atol=0)
    for logit in (-1e4, -300.0, -0.05, 0.0, 0.05, 30.0, 1e4):
        outputs = torch.full((256, 1), logit)
        log_probability = model.log_likelihood(outputs, levels[:, None].float() / 255)
        assert log_probability.exp().sum().item() == pytest.approx(1, abs=1e-4), logit
        assert log_probability.max() <= 0


def test_gray_likelihood_sums_over_pixels():
    model = gray.GrayVAE(5, 8, 2)
    outputs, x = 6 * torch.rand(3, 4, 5) - 3, torch.rand(4, 5)
    each = [gray.GrayVAE(1, 8, 2).log_likelihood(outputs[..., i : i + 1], x[:, i : i + 1]) for i in range(5)]
    torch.testing.assert_close(model.log_likelihood(outputs, x), sum(each))


@pytest.mark.parametrize("logit", [-1e4, -0.05, 0.0, 1e-6, 0.05, 1e4])
def test_gray_gradients_are_finite(logit: float):
    outputs = torch.full((3, 5), logit, requires_grad=True)
    model = gray.GrayVAE(5, 8, 2)
    (model.log_likelihood(outputs, torch.rand(3, 5)).sum() + model.mean(outputs).sum()).backward()
    assert torch.isfinite(outputs.grad).all()


def test_convolutions_take_z_of_any_shape():
    model = convolutional.ConvVAE(12, 16, channels=2, hidden_size=8, latent_size=3).eval()
    x, z = torch.rand(5, 12 * 16).round(), torch.randn(4, 5, 3)
    assert model(x)[0].shape == (5, 192)
    outputs = model.outputs(z)
    assert outputs.shape == (4, 5, 192)
    torch.testing.assert_close(outputs[2, 3], model.outputs(z[2, 3:4])[0])


def test_the_conditional_model_hears_its_labels():
    model = conditional.ConditionalVAE(10, 784, 16, 3)
    x, z, labels = torch.rand(6, 784), torch.randn(4, 6, 3), torch.tensor([1, 2, 1, 5, 9, 0])
    mu, outputs = model.given(labels).encode(x)[2], model.outputs(z)
    for i, label in enumerate(labels):  # one label for all, or one for each
        torch.testing.assert_close(model.given(label[None]).encode(x)[2][i], mu[i])
        torch.testing.assert_close(model.outputs(z)[:, i], outputs[:, i])
    assert not torch.allclose(model.given(torch.tensor([3])).encode(x)[2][0], mu[0])
    assert not torch.allclose(model.outputs(z)[:, 0], outputs[:, 0])


# ---------------------------------------------------------------------------------------------------------------------
# The commands


def run_file(name: str, *args: str) -> None:
    """python experiments/NAME.py, in this process."""
    path = str(ROOT / "experiments" / f"{name}.py")
    sys.argv = [path, *args]
    runpy.run_path(path, run_name="__main__")


def call(monkeypatch: pytest.MonkeyPatch, name: str, *args: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)  # and back, after the test
    run_file(name, *map(str, args))


@pytest.mark.parametrize("name", ["convolutional", "gray", "vampprior"])
def test_command(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    call(monkeypatch, name, *SMALL, "--out-dir", tmp_path, "--nll-samples=3")
    (run,) = tmp_path.iterdir()
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["nll_samples"] == 3
    assert math.isfinite(metrics["nll"])
    assert metrics["binarize"] == ("none" if name == "gray" else "dynamic")
    names = {"curves", "reconstructions", "prior_samples", "interpolations", "latent_space", "manifold"}
    names |= set() if name == "vampprior" else {"latent_usage"}
    assert {path.stem for path in run.glob("*.png")} == names
    assert " nll " in capsys.readouterr().out
    monkeypatch.setattr(train.evaluate, "save_figure", lambda *args: None)  # which takes most of the time
    call(monkeypatch, name, "--resume", run, "--epochs=2", "--nll-samples=2")
    assert utils.read_checkpoint(run)["epoch"] == 2
    call(monkeypatch, name, "--resume", run, "--nll-samples=4")  # finished: evaluated again
    assert json.loads((run / "metrics.json").read_text())["nll_samples"] == 4
    assert "written again" in capsys.readouterr().out


@pytest.mark.parametrize("mode", ["dynamic", "none"])
def test_conditional_command(mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    call(monkeypatch, "conditional", *SMALL, f"--binarize={mode}", "--out-dir", tmp_path, "--nll-samples=3")
    (run,) = tmp_path.iterdir()
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["neg_elbo"] == pytest.approx(metrics["bce"] + metrics["kl"])
    assert ("nll" in metrics) == (mode == "dynamic")
    assert {path.name for path in run.iterdir()} >= {"checkpoint.pt", "metrics.json", "samples_by_class.png"}


def test_conditional_leaves_nothing_of_a_first_epoch_that_fails(tmp_path: Path, fails: Callable):
    error = fails(conditional.main, *SMALL, "--lr=1e30", "--out-dir", tmp_path)
    assert "not finite in epoch 1" in error
    assert not list(tmp_path.iterdir())


def test_the_right_labels_say_more_than_wrong_ones(digits: ImageData, tmp_path: Path):
    torch.manual_seed(0)
    options = train.Options(epochs=4, batch_size=50, lr=3e-3)
    model = conditional.fit(conditional.ConditionalVAE(10, 784, 64, 4), thinned(digits, 2), options, tmp_path)
    inputs, targets = binarize_test_set(digits.test_images, "dynamic")
    losses = []
    for labels in (digits.test_labels, (digits.test_labels + 1) % 10):
        with torch.no_grad():
            losses.append(sum(model.given(labels).elbo_terms(inputs, targets)).mean().item())
    assert losses[1] > losses[0] + 20


def test_gray_values_have_a_likelihood_and_black_and_white_ones_none(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train.evaluate, "save_figure", lambda *args: None)
    call(monkeypatch, "gray", *SMALL, "--binarize=dynamic", "--out-dir", tmp_path, "--nll-samples=1")
    assert json.loads((tmp_path / "001-mnist-5k-z2" / "metrics.json").read_text())["nll"] is None
    assert "not likelihoods" in capsys.readouterr().out


def test_evaluate_names_the_class_of_an_experiments_run(tmp_path: Path, monkeypatch, fails: Callable):
    monkeypatch.setattr(train.evaluate, "save_figure", lambda *args: None)
    call(monkeypatch, "gray", *SMALL, "--out-dir", tmp_path, "--nll-samples=1")
    assert "GrayVAE" in fails(train.evaluate.main, tmp_path)
    assert "GrayVAE" in fails(train.main, "--resume", tmp_path / "001-mnist-5k-z2", "--epochs=2")


def test_two_processes(few_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Training is shared, and one process evaluates when the others are done."""
    monkeypatch.chdir(tmp_path)
    args = [*SMALL, f"--dataset={few_digits}", "--nll-samples=1"]
    printed = run_ranks(2, run_file, "vampprior", *args)
    assert [text.count("active_units") for text in printed] == [1, 0]
    assert (tmp_path / "runs" / "001-few-z2" / "metrics.json").exists()


@pytest.mark.parametrize(("name", "option"), [("conditional", "--resume=x"), ("vampprior", "--epochs=0")])
def test_bad_options(name: str, option: str, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, name, *SMALL, option, "--out-dir", tmp_path / "runs")
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "runs").exists()
