"""Each experiment against closed forms, and as the command that it is."""

import copy
import json
import math
import re
import runpy
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributions import Bernoulli, Categorical, Independent, MixtureSameFamily, Normal

import data
import evaluate
import pictures
import runs
import train
import utils
from data import ImageData
from experiments import conditional, convolutional, vampprior
from experiments.autoregressive import AutoregressivePixels, AutoregressiveVAE
from experiments.burda2016 import BurdaVAE
from experiments.burda2016_two_layers import BurdaTwoLayerVAE
from experiments.conv_flow import ConvFlowVAE
from experiments.flow_posterior import FlowPosteriorVAE
from experiments.flow_prior import FlowPriorVAE
from experiments.semi_supervised import SemiSupervisedVAE
from experiments.two_layers import TwoLayerVAE
from experiments.two_layers_vampprior import TwoLayerVampVAE
from model import DiscretizedLogistic
from step import matmul_precision
from tests.conftest import not_windows, run_ranks, thinned

ROOT = Path(__file__).parent.parent
MODELS = {
    "autoregressive": AutoregressiveVAE,
    "burda2016": BurdaVAE,
    "burda2016_two_layers": BurdaTwoLayerVAE,
    "conditional": conditional.ConditionalVAE,
    "conv_flow": ConvFlowVAE,
    "convolutional": convolutional.ConvVAE,
    "flow_posterior": FlowPosteriorVAE,
    "flow_prior": FlowPriorVAE,
    "semi_supervised": SemiSupervisedVAE,
    "two_layers": TwoLayerVAE,
    "two_layers_vampprior": TwoLayerVampVAE,
    "vampprior": vampprior.VampVAE,
}
WITH_CLOSED_FORM = ("burda2016", "conditional", "convolutional", "semi_supervised")  # of the KL
SMALL = ["--dataset=mnist-5k", "--epochs=1", "--hidden-size=16", "--latent-size=2", "--batch-size=100", "--device=cpu"]


@pytest.fixture(autouse=True)
def small_data(digits: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    few = thinned(digits, 20)
    for module in (train, evaluate, data):
        monkeypatch.setattr(module, "load_dataset", lambda *args: few)


# ---------------------------------------------------------------------------------------------------------------------
# What each one changes


def test_the_vampprior_is_the_mixture_of_posteriors():
    torch.manual_seed(0)
    model = vampprior.VampVAE(30, num_pseudo_inputs=7, hidden_size=16, latent_size=3)
    model.latent_z.mu.weight.data *= 20

    def reference(model: vampprior.VampVAE) -> MixtureSameFamily:
        q = model.posterior(model.pseudo_inputs)
        return MixtureSameFamily(Categorical(torch.ones(7)), Independent(Normal(q.mu, torch.exp(0.5 * q.logvar)), 1))

    z = 2 * torch.randn(4, 5, 3)
    torch.testing.assert_close(model.prior().log_prob(z), reference(model).log_prob(z), rtol=1e-4, atol=1e-4)
    draws = model.prior().sample((20_000,))
    torch.testing.assert_close(draws.mean(0), reference(model).mean, atol=0.05, rtol=0)
    torch.testing.assert_close(draws.var(0), reference(model).variance, rtol=0.05, atol=0)
    narrow = copy.deepcopy(model).requires_grad_(False)
    narrow.latent_z.logvar.bias -= 6
    with matmul_precision("medium", "cpu"):  # whose rounded factors would show here
        expected = reference(narrow).log_prob(z)
        torch.testing.assert_close(narrow.prior().log_prob(z), expected, rtol=1e-4, atol=1e-2)
    model.prior().log_prob(z).sum().backward()
    assert model.pseudo_inputs.grad.abs().sum() > 0


def test_pseudo_inputs_start_as_training_images(digits: ImageData):
    model = vampprior.VampVAE.for_data(digits, train.make_options(hidden_size=8))
    images = {tuple(image) for image in (digits.train_images.flatten(1) / 255).tolist()}
    assert model.pseudo_inputs.shape == (500, 784)
    assert all(tuple(image) in images for image in model.pseudo_inputs.tolist())


def test_pseudo_inputs_are_images_however_far_they_are_learned():
    model = vampprior.VampVAE(30, num_pseudo_inputs=7, hidden_size=16, latent_size=3)
    z = torch.randn(4, 3)
    model.pseudo_inputs.data = 3 * torch.randn(7, 30)
    found = model.prior().log_prob(z)
    model.pseudo_inputs.data.clamp_(0, 1)
    torch.testing.assert_close(found, model.prior().log_prob(z))


def test_a_convolutional_model_starts_as_a_shallow_one_with_narrow_posteriors():
    """Blocks add nothing, and log-variances are around -4, with means that He's uniform law spreads (2015, eq. 10)."""
    model = convolutional.ConvVAE(64, (1, 8, 8), width=4, hidden_size=200, latent_size=30)
    block = convolutional.Block(4, "relu")
    x = torch.rand(5, 4, 6, 6)
    torch.testing.assert_close(block(x), x)
    q = model.posterior(torch.rand(50, 1, 8, 8))
    assert q.logvar.mean().item() == pytest.approx(-4, abs=0.1)
    bound = math.sqrt(6 / 200)
    assert 0.98 * bound < model.latent_z.mu.weight.abs().max() <= bound


@pytest.mark.parametrize("shape", [(1, 12, 16), (3, 8, 12), (1, 7, 7), (3, 9, 14), (1, 1, 1)])
def test_convolutions_take_images_and_z_of_any_shape(shape: tuple[int, int, int]):
    sizes = {"width": 2, "hidden_size": 8, "latent_size": 3, "encoder_layers": 2, "decoder_layers": 3}
    model = convolutional.ConvVAE(math.prod(shape), shape, channels=shape[0], **sizes).eval()
    x, z, size = torch.rand(5, *shape).round(), torch.randn(4, 5, 3), math.prod(shape)
    assert model(x)[0].shape == (5, size)
    torch.testing.assert_close(model.reconstruct(x).flatten(1), model.reconstruct(x.flatten(1)))
    torch.testing.assert_close(model.encoder(x.flatten(1)), model.encoder[1:](x))  # rows are rows
    pictures = model.decoder(z[0])[..., : shape[1], : shape[2]]
    torch.testing.assert_close(model.decoder.logits(z[0]).view(5, *shape), pictures)
    means = model.decode(z)
    assert means.shape == (4, 5, size)
    torch.testing.assert_close(means[2, 3], model.decode(z[2, 3:4])[0])
    assert model.decode(z[2, 3]).shape == (size,)
    twin = convolutional.ConvVAE(**model.config).eval()
    twin.load_state_dict(model.state_dict())
    torch.testing.assert_close(twin.decode(z), means)


@pytest.mark.parametrize(
    ("shape", "grid", "latents"),
    [((1, 28, 28), (64, 7, 7), 50), ((3, 32, 32), (64, 8, 8), 99), ((3, 64, 48), (128, 8, 6), 171)],
)
def test_sizes_of_convolutions_follow_from_the_pictures(shape: tuple, grid: tuple, latents: int):
    images = torch.zeros(2, *shape, dtype=torch.uint8)
    labels = torch.zeros(2, dtype=torch.int64)
    pictures = ImageData("mine", ["all"], images, labels, images, labels)
    for given, expected in ((None, latents), (7, 7)):
        model = ConvFlowVAE.for_data(pictures, train.make_options(latent_size=given, hidden_size=8))
        assert model.config["latent_size"] == expected
        assert model.prior().sample().shape == (expected,)
        assert model.decoder[1].unflattened_size == grid
        assert model.reconstruct(torch.rand(2, *shape)).shape == (2, *shape)


@pytest.mark.parametrize("red", [0.4, 1.0, 1.3])  # the last is always 1
def test_the_masses_of_dependent_colours_add_up_to_one_and_are_those_of_samples(red: float):
    """Two colours of one pixel, summed over all 256 x 256 pairs."""
    loc, log_scale, weights = (torch.tensor(values)[:, None] for values in ([red, 0.6], [-4.0, -4.5], [0.9]))
    colors = convolutional.DependentColors(loc, log_scale, weights)
    levels = torch.arange(256) / 255
    pairs = torch.cartesian_prod(levels, levels)
    mass = colors.log_prob(pairs).double().exp()
    assert mass.sum().item() == pytest.approx(1, abs=1e-5)
    drawn = colors.sample((20_000,))
    exact = torch.cov(pairs.T, correction=0, aweights=mass)
    torch.testing.assert_close(torch.cov(drawn.T).double(), exact, rtol=0.05, atol=1e-6)
    torch.testing.assert_close(colors.mean, mass.float() @ pairs, atol=1e-3, rtol=0)


def test_each_colour_depends_on_those_before_it():
    """As a chain of discretized logistics has it (Salimans et al. 2017, section 2.2)."""
    torch.manual_seed(0)
    loc, log_scale, weights = torch.rand(5, 3, 4), torch.randn(5, 3, 4) - 3, torch.randn(5, 3, 4)
    x = (255 * torch.rand(5, 3, 4)).round() / 255
    means = DiscretizedLogistic(loc, log_scale).mean
    (red, green, _), (a, b, c) = (x - means).unbind(1), weights.unbind(1)
    expected = sum(
        DiscretizedLogistic(loc[:, i] + move, log_scale[:, i]).log_prob(x[:, i]).sum(-1)
        for i, move in enumerate((0 * red, a * red, b * red + c * green))
    )
    found = convolutional.DependentColors(loc, log_scale, weights).log_prob(x.flatten(1))
    torch.testing.assert_close(found, expected)


def all_images(num_pixels: int) -> torch.Tensor:
    """(2 ** num_pixels, num_pixels): every image of pixels that are 0 or 1."""
    return torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * num_pixels)


def test_the_masses_of_autoregressive_pixels_are_products_of_bernoullis_that_add_up_to_one():
    torch.manual_seed(0)
    logits, weight = torch.randn(2, 7), 2 * torch.randn(7, 7)
    x = all_images(7)
    found = AutoregressivePixels(logits[:, None], weight).log_prob(x)
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(2))
    for k in range(2):
        expected = 0
        for i in range(7):
            moved = logits[k, i] + sum(weight[i, j] * (x[:, j] - 0.5) for j in range(i))
            expected = expected + Bernoulli(logits=moved).log_prob(x[:, i])
        torch.testing.assert_close(found[k], expected, rtol=1e-4, atol=1e-4)


def test_draws_of_autoregressive_pixels_have_their_masses():
    torch.manual_seed(0)
    likelihood = AutoregressivePixels(torch.randn(2, 1, 3), 3 * torch.randn(3, 3))
    x = all_images(3)
    draws = likelihood.sample((20_000,))  # (20,000, 2, 1, 3)
    found = (draws == x).all(-1).float().mean(0)
    torch.testing.assert_close(found, likelihood.log_prob(x).exp(), rtol=0, atol=0.015)


def test_the_mean_of_autoregressive_pixels_is_exact_where_those_before_are_certain():
    torch.manual_seed(0)
    weight = 2 * torch.randn(4, 4)
    likelihood = AutoregressivePixels(torch.tensor([40.0, -40.0, 40.0, 0.3]), weight)
    x = all_images(4)
    expected = (likelihood.log_prob(x).exp()[:, None] * x).sum(0)
    torch.testing.assert_close(likelihood.mean, expected, rtol=1e-4, atol=1e-5)
    assert 0.05 < likelihood.mean[3] < 0.95


def test_autoregressive_pixels_are_of_0_and_1_and_cannot_be_filled_in(digits: ImageData):
    with pytest.raises(utils.UserError, match="--likelihood bernoulli"):
        AutoregressiveVAE.for_data(digits, train.make_options(likelihood="logistic"))
    model = AutoregressiveVAE(4, hidden_size=3, latent_size=2)
    with pytest.raises(NotImplementedError):
        model.complete(torch.ones(1, 4), torch.tensor([True, True, False, False]))


def test_the_conditional_model_hears_its_labels():
    model = conditional.ConditionalVAE(784, 10, hidden_size=16, latent_size=3)
    x, z, y = torch.rand(6, 784), torch.randn(4, 6, 3), torch.tensor([1, 2, 1, 5, 9, 0])
    mu, means = model.posterior(x, y).mean, model.decode(z, y)
    for i in range(6):
        torch.testing.assert_close(model.posterior(x[i : i + 1], y[i : i + 1]).mean[0], mu[i])
        torch.testing.assert_close(model.decode(z[:, i : i + 1], y[i : i + 1])[:, 0], means[:, i])
    other = (y + 1) % 10
    assert not torch.allclose(model.posterior(x, other).mean, mu)
    assert not torch.allclose(model.decode(z, other), means)
    assert model.sample(6, y).shape == (6, 784)
    with pytest.raises(ValueError, match="labels"):
        model(x)


def test_the_conditional_model_has_the_classes_of_its_data(digits: ImageData):
    twelve = replace(digits, classes=list("abcdefghijkl"))
    model = conditional.ConditionalVAE.for_data(twelve, train.make_options(hidden_size=8, latent_size=2))
    assert model.sample(12, torch.arange(12)).shape == (12, 784)
    assert model.config["num_classes"] == 12


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


def weights(run: Path) -> dict[str, torch.Tensor]:
    return runs.read_checkpoint(run)["training_weights"]


@pytest.mark.parametrize(("name", "latents"), [("burda2016", 50), ("burda2016_two_layers", 150)])
def test_the_experiments_of_burda_2016_train_as_in_the_paper(name: str, latents: int, monkeypatch: pytest.MonkeyPatch):
    """Batches of 20, 3,280 epochs, a rate of 0.001 that falls in eight stages, and an epsilon of 10^-4 (section 5)."""
    given = {}
    monkeypatch.setattr(train, "main", lambda model, description, **how: given.update(how))
    call(monkeypatch, name)
    rate = given.pop("learning_rate")
    options = train.make_options(**given)
    found = [rate(done, options) for done in (0, 0.9, 1, 3.9, 4, 12.9, 13, 3279.9)]
    assert found == pytest.approx([1e-3 * 10 ** (-stage / 7) for stage in (0, 0, 1, 1, 2, 2, 3, 7)])
    assert (options.batch_size, options.epochs, options.adam_eps, options.average) == (20, 3280, 1e-4, False)
    assert (options.hidden_size, options.latent_size, options.activation) == (200, latents, "tanh")


def test_help_of_an_experiment_has_its_own_defaults(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, "convolutional", "--help")
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for option, default in (("--lr", 0.002), ("--kl-warmup", 5), ("--hidden-size", 256), ("--batch-size", 128)):
        assert re.search(rf"{option} [A-Z_]+ [^(]*\(default: {default}", text.partition("data:")[2]), option


@pytest.mark.usefixtures("short_chains")
@pytest.mark.parametrize("name", MODELS)
def test_command(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Trains, evaluates, and resumes from the first epoch to the weights of the run that went on."""
    drawn = set()
    save = runs.save_checkpoint
    interrupted = tmp_path / "interrupted"

    def save_and_copy(path: Path, checkpoint: dict) -> None:
        save(path, checkpoint)
        if checkpoint["epoch"] == 1:
            interrupted.mkdir()
            shutil.copy(path, interrupted)

    monkeypatch.setattr(runs, "save_checkpoint", save_and_copy)
    for module in (evaluate, pictures):  # saving a figure takes most of the time
        monkeypatch.setattr(module, "save_figure", lambda figure, path: drawn.add(path.stem))
    call(monkeypatch, name, *SMALL, "--epochs=2", "--out-dir", tmp_path / "runs", "--nll-samples=3")
    (run,) = (tmp_path / "runs").iterdir()
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["nll_samples"] == 3
    assert math.isfinite(metrics["nll"])
    assert metrics["binarize"] == "dynamic"
    names = {"curves", "reconstructions", "prior_samples", "interpolations", "latent_space", "manifold"}
    names |= {"traversals", "least_likely"}
    names |= {"completions"} if name != "autoregressive" else set()
    names |= {"latent_usage"} if name in WITH_CLOSED_FORM else set()
    assert drawn == names
    assert " nll " in capsys.readouterr().out
    assert type(runs.load_checkpoint(run)[0]).__module__ == f"experiments.{name}"  # as evaluate.py loads it
    monkeypatch.setattr(evaluate, "draw_all", lambda *args: ())
    call(monkeypatch, name, "--resume", interrupted, "--nll-samples=1")
    straight = weights(run)
    assert all(torch.equal(value, straight[key]) for key, value in weights(interrupted).items())


@pytest.mark.slow  # test_subclasses.py traces the relatives of some
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("quick_compiler")
def test_is_compiled(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(train, "draw", lambda *args: None)
    options = {"epochs": 1, "hidden_size": 16, "latent_size": 2, "batch_size": 100, "out_dir": tmp_path}
    train.train("mnist-5k", MODELS[name], **options, compile=True)
    assert runs.read_checkpoint(tmp_path)["options"]["compile"], capsys.readouterr().err


def run_file_without_pictures(name: str, *args: str) -> None:
    train.draw = lambda *args: None
    evaluate.draw_all = lambda *args: ()
    run_file(name, *args)


@not_windows
def test_two_processes(few_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Training is shared, and one process evaluates when the others are done."""
    monkeypatch.chdir(tmp_path)
    args = [*SMALL, f"--dataset={few_digits}", "--nll-samples=1"]
    printed = run_ranks(2, run_file_without_pictures, "conditional", *args)
    assert [text.count("active_units") for text in printed] == [1, 0]
    assert (tmp_path / "runs" / "001-few-z2" / "metrics.json").exists()
