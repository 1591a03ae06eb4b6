"""Models, loops and files of a user's own: what is right with them, and what is refused in one line."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.distributions import (
    Beta,
    ContinuousBernoulli,
    Distribution,
    Independent,
    Laplace,
    MultivariateNormal,
    Normal,
)

import evaluate
import measure
import runs
import train
from data import ImageData
from model import VAE
from tests.conftest import SIZE, thinned
from utils import UserError

OWN = """
import torch
from torch.distributions import Independent, Laplace
from model import VAE

assert __name__ != "__main__"


class HeavyVAE(VAE):
    def prior(self, y=None):
        zeros = next(self.parameters()).new_zeros(self.config["latent_size"])
        return Independent(Laplace(zeros, 1.0), 1)
"""


@pytest.fixture
def few(digits: ImageData) -> ImageData:
    return thinned(digits, 50)  # 100 and 20 digits


@pytest.fixture
def options(tmp_path: Path, no_pictures: None) -> dict:
    return {"epochs": 1, "compile": False, "hidden_size": 16, "latent_size": 2, "out_dir": str(tmp_path / "runs")}


# ---------------------------------------------------------------------------------------------------------------------
# Densities and masses


def densities(logits: Tensor) -> dict[str, Distribution]:
    """Distributions of a value in [0, 1] that a student may try, none of which gives masses."""
    return {
        "normal": Normal(logits.sigmoid(), 0.1),
        "narrow normal": Normal(logits.sigmoid(), 1e-3),
        "laplace": Laplace(logits.sigmoid(), 0.1),
        "beta": Beta(1 + logits.exp(), 1 + (-logits).exp()),
        "continuous bernoulli": ContinuousBernoulli(logits=logits),
    }


@pytest.mark.parametrize("name", densities(torch.zeros(1)))
def test_a_density_is_never_called_a_likelihood_or_bits(name: str, few: ImageData, capsys):
    class DensityVAE(VAE):
        def likelihood(self, z: Tensor, y: Tensor | None = None) -> Distribution:
            return Independent(densities(self.decoder.logits(z))[name], 1, validate_args=False)

    for binarize in ("none", "dynamic"):
        metrics = measure.evaluate(DensityVAE(784, 16, 2), few.test_images, binarize, nll_samples=2)
        assert metrics["nll"] is metrics["bits_per_dim"] is None
        evaluate.print_metrics(metrics, "a title")
        printed = capsys.readouterr().out
        assert "not likelihoods" in printed
        assert "bits" not in printed


def test_training_with_a_density_or_gray_targets_says_so(
    few: ImageData, options: dict, capsys, monkeypatch: pytest.MonkeyPatch
):
    class GaussVAE(VAE):
        def __init__(self, *args: int, **sizes: int):
            super().__init__(*args, **sizes)
            self.log_sigma = nn.Parameter(torch.zeros(()))

        def likelihood(self, z: Tensor, y: Tensor | None = None) -> Distribution:
            return Independent(Normal(self.decoder(z), self.log_sigma.exp()), 1)

    _, _, density = train.train(few, GaussVAE, **options, binarize="none")
    _, _, gray = train.train(few, **options, binarize="none")
    _, _, other = train.train(few, **options)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert ["no likelihood" in line for line in lines] == [True, True, False]
    assert not any("bits" in line for line in lines)
    shown = []
    monkeypatch.setattr(evaluate, "save_figure", lambda figure, _: shown.append(figure))
    evaluate.compare_runs([density, gray, other], options["out_dir"])
    labels = [text.get_text() for text in shown[0].legends[0].get_texts()]
    assert ["not likelihoods" in label for label in labels] == [True, True, False]


# ---------------------------------------------------------------------------------------------------------------------
# How far an estimate of nll can be trusted


def test_few_effective_samples_mark_an_nll_that_is_too_high(small: ImageData):
    """Against a sum over a fine grid: a posterior that is too narrow, and one that is too wide."""
    torch.manual_seed(0)
    model = VAE(SIZE, 16, 2)
    nn.init.normal_(model.decoder.fc1.weight)
    test_set = measure.make_test_set(small, "dynamic").take(slice(8))
    axis = torch.linspace(-7, 7, 281)
    z = torch.cartesian_prod(axis, axis)[:, None]
    log_joint = model.likelihood(z).log_prob(test_set.targets.flatten(1)) + model.prior().log_prob(z)
    exact = -log_joint.detach().logsumexp(0) - 2 * math.log(axis[1] - axis[0])
    found = {}
    for name, logvar in (("narrow", -4.0), ("wide", 0.5)):
        nn.init.zeros_(model.latent_z.logvar.weight)
        nn.init.constant_(model.latent_z.logvar.bias, logvar)
        nll, effective_samples = measure.estimate_nll(model, test_set, 10_000)
        found[name] = nll - exact, effective_samples
    error, effective_samples = found["narrow"]
    assert error.mean() > 1
    assert effective_samples.median() < 100
    error, effective_samples = found["wide"]
    assert error.abs().max() < 0.05
    assert effective_samples.min() > 1000


def test_effective_samples_are_those_of_the_weights(few: ImageData, monkeypatch: pytest.MonkeyPatch):
    """(sum w)^2 / sum w^2 of all weights, however many blocks they come in."""
    model = VAE(784, 16, 2)
    drawn = []

    def log_weight(q, p, z: Tensor, targets: Tensor, y: Tensor) -> Tensor:
        drawn.append(torch.randn(z.shape[:-1], dtype=torch.float64))
        return drawn[-1]

    monkeypatch.setattr(model, "log_weight", log_weight)
    nll, effective_samples = measure.estimate_nll(model, measure.make_test_set(few, "dynamic"), 45)
    weights = torch.cat(drawn).exp()
    assert torch.allclose(nll, -weights.mean(0).log())
    assert torch.allclose(effective_samples, weights.sum(0) ** 2 / (weights**2).sum(0))


def test_a_model_is_measured_without_dropout_and_goes_on_with_it(few: ImageData):
    model = VAE(784, 16, 2)
    model.encoder = nn.Sequential(model.encoder, nn.Dropout())
    found = [measure.evaluate(model.train(mode), few.test_images, nll_samples=2) for mode in (False, True)]
    for name in ("neg_elbo", "nll"):
        assert found[0][name] == found[1][name]
    assert model.encoder[1].training


# ---------------------------------------------------------------------------------------------------------------------
# State


class SpectralVAE(VAE):
    """Its encoder's layers have norm 1."""

    def __init__(self, *args: int, **sizes: int):
        super().__init__(*args, **sizes)
        for layer in self.encoder.children():
            nn.utils.parametrizations.spectral_norm(layer)


def test_the_averaged_model_keeps_what_its_layers_promise(few: ImageData, options: dict):
    many = replace(few, train_images=few.train_images.repeat(20, 1, 1, 1), train_labels=few.train_labels.repeat(20))
    model, _, _ = train.train(many, SpectralVAE, **options | {"epochs": 4}, lr=1e-2)
    for layer in model.encoder.children():
        assert torch.linalg.matrix_norm(layer.weight.detach(), 2).item() == pytest.approx(1, abs=1e-3)


def test_a_count_in_a_buffer_is_the_trained_models(few: ImageData, options: dict):
    class CountingVAE(SpectralVAE):
        def __init__(self, *args: int, **sizes: int):
            super().__init__(*args, **sizes)
            self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

        def posterior(self, x: Tensor, y: Tensor | None = None) -> Distribution:
            self.batches += self.training
            return super().posterior(x, y)

    model, _, _ = train.train(few, CountingVAE, **options, batch_size=25)
    assert model.batches == 4


def test_a_history_with_other_types_is_read_again(few: ImageData, options: dict):
    extra = {"a": np.float64(3), "b": np.int64(3), "c": np.arange(2), "d": np.str_("x"), "e": Path("x"), "f": np.True_}
    expected = {"a": 3.0, "b": 3, "c": [0, 1], "d": "x", "e": "x", "f": True}
    _, _, run = train.train(few, on_epoch=lambda _, history: history[-1].update(extra), **options | {"epochs": 2})
    _, history, _ = train.resume(run, dataset=few, epochs=3)
    found = {name: history[0][name] for name in expected}
    assert found == expected
    assert list(map(type, found.values())) == list(map(type, expected.values()))
    evaluate.evaluate_run(run, dataset=few, nll_samples=1)


def test_a_history_that_no_file_can_hold_is_named(few: ImageData, options: dict):
    def on_epoch(model: VAE, history: train.History) -> None:
        history[-1]["figure"] = object()

    with pytest.raises(UserError, match="figure"):
        train.train(few, on_epoch=on_epoch, **options | {"epochs": 2})


class LazyVAE(VAE):
    def __init__(self, *args: int, **sizes: int):
        super().__init__(*args, **sizes)
        self.encoder = nn.Sequential(nn.Flatten(), nn.LazyLinear(self.config["hidden_size"]))


@pytest.mark.parametrize(
    "model",
    [
        LazyVAE,
        torch.compile(VAE(784, 16, 2)),
        nn.DataParallel(VAE(784, 16, 2)),
        VAE(784, 16, 2).half(),
    ],
    ids=["lazy", "compiled", "parallel", "half"],
)
def test_a_model_that_cannot_be_saved_or_trained_is_refused_before_the_first_step(model, few, options: dict):
    if isinstance(model, nn.Module):
        del options["hidden_size"], options["latent_size"]
    with pytest.raises(UserError):
        train.train(few, model, **options)
    assert not list(Path(options["out_dir"]).glob("*"))


# ---------------------------------------------------------------------------------------------------------------------
# Types


class CorrelatedVAE(VAE):
    """Its posterior has no kernels for bfloat16."""

    def __init__(self, *args: int, **sizes: int):
        super().__init__(*args, **sizes)
        self.tril = nn.Linear(self.config["hidden_size"], self.config["latent_size"] ** 2)

    def posterior(self, x: Tensor, y: Tensor | None = None) -> Distribution:
        hidden = self.encoder(x.flatten(1))
        mu = self.latent_z.mu(hidden)
        below = self.tril(hidden).view(*mu.shape, mu.shape[-1]).tril(-1)
        return MultivariateNormal(mu, scale_tril=below + torch.eye(mu.shape[-1], dtype=below.dtype))


def test_trying_out_bfloat16_leaves_batch_statistics_alone(few):
    model = VAE(784, 8, 2)
    model.encoder = torch.nn.Sequential(model.encoder, torch.nn.BatchNorm1d(8))
    model.train()
    measure.possible_precision(model, measure.example(few, "dynamic"), "bfloat16")
    assert model.training
    assert model.encoder[1].num_batches_tracked == 0


def test_a_distribution_without_bfloat16_is_trained_and_measured_in_another(few, options: dict, monkeypatch, capsys):
    monkeypatch.setattr(measure, "choose_precision", lambda *_, **__: "bfloat16")  # as on a CPU that has its units
    _, _, run = train.train(few, CorrelatedVAE, **options, precision="bfloat16")
    assert runs.read_checkpoint(run)["options"]["precision"] != "bfloat16"
    assert "bfloat16" in capsys.readouterr().err
    evaluate.evaluate_run(run, CorrelatedVAE, few, nll_samples=2)


# ---------------------------------------------------------------------------------------------------------------------
# The command evaluate.py with models of one's own, and without data


@pytest.fixture
def own_run(few: ImageData, options: dict, tmp_path: Path) -> tuple[Path, str]:
    """A run of a class in a file, and FILE.py:CLASS."""
    (tmp_path / "mine.py").write_text(OWN)
    place = f"{tmp_path / 'mine.py'}:HeavyVAE"
    np.savez(tmp_path / "few.npz", images=few.train_images[:, 0].numpy())
    _, _, run = train.train(str(tmp_path / "few.npz"), runs.import_class(place), **options, binarize="dynamic")
    return run, place


def test_evaluate_does_everything_with_a_class_from_a_file(own_run: tuple[Path, str], call: Callable, tmp_path: Path):
    run, place = own_run
    for words in (["--nll-samples=2"], ["--samples=3"], [f"--save={tmp_path / 'codes.npz'}", "--nll-samples=2"]):
        call(evaluate.main, run, "--model", place, *words)
    assert json.loads((run / "metrics.json").read_text())["nll"] > 0
    assert len(list((run / "samples").glob("*.png"))) == 3
    assert np.load(tmp_path / "codes.npz")["effective_samples"].min() >= 1


def test_a_class_that_is_not_there_is_one_line(own_run: tuple[Path, str], fails: Callable, tmp_path: Path):
    run, place = own_run
    assert "--model" in fails(evaluate.main, run)  # which would load it
    for wrong in ("nothing", "mine.py", f"{tmp_path / 'no.py'}:HeavyVAE", place.replace("Heavy", "Light")):
        fails(evaluate.main, run, "--model", wrong)


@pytest.mark.parametrize(("name", "shape"), [("default", (28, 28)), ("emoji", (32, 32, 3))])
def test_samples_need_no_data(name: str, shape: tuple, call: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for module in (train, evaluate):
        monkeypatch.setattr(module, "load_dataset", lambda *_: pytest.fail("the data set was read"))
    weights = Path(evaluate.__file__).parent / "weights" / f"{name}.pt"
    call(evaluate.main, weights, "--samples=3", f"--out-dir={tmp_path}")
    assert np.array(Image.open(tmp_path / "samples" / "00002.png")).shape == shape


# ---------------------------------------------------------------------------------------------------------------------
# Data


def too_little_memory(*_: object, **__: object) -> None:
    raise MemoryError


def no_right(*_: object, **__: object) -> None:
    raise PermissionError(13, "Permission denied", "a file")


@pytest.mark.parametrize("problem", [too_little_memory, no_right])
def test_a_file_is_not_called_damaged_for_want_of_memory_or_of_a_right(problem, few, options, tmp_path, monkeypatch):
    _, _, run = train.train(few, **options)
    np.savez(tmp_path / "few.npz", images=few.train_images[:, 0].numpy())
    (tmp_path / "folder").mkdir()
    for i in range(4):
        Image.fromarray(few.train_images[i, 0].numpy()).save(tmp_path / "folder" / f"{i}.png")
    readers = {
        "torch.load": lambda: runs.read_checkpoint(run),
        "numpy.load": lambda: train.load_dataset(str(tmp_path / "few.npz")),
        "PIL.Image.open": lambda: train.load_dataset(str(tmp_path / "folder")),
    }
    for function, read in readers.items():
        with monkeypatch.context() as patched, pytest.raises((MemoryError, PermissionError)):
            patched.setattr(function, problem)
            read()


def test_few_test_images_are_shown_beside_training_images(few: ImageData, options: dict, monkeypatch):
    shown = {}
    monkeypatch.undo()  # of what keeps pictures from being drawn
    monkeypatch.setattr(train, "draw", lambda *_: None)
    monkeypatch.setattr(evaluate, "save_figure", lambda figure, path: shown.update({path.name: figure}))
    model, _, run = train.train(few, **options, binarize="threshold")
    evaluate.evaluate_run(run, dataset=few, nll_samples=1)
    axes = shown["latent_space.png"].axes[0]
    points = [len(points.get_offsets()) for points in axes.collections[:2]]
    assert points == [100, 20]
    assert axes.collections[1].get_sizes().min() > 20
    _, _, mu = model.requires_grad_(False).encode(few.train_images / 255)
    crosses = axes.collections[0]
    torch.testing.assert_close(torch.tensor(crosses.get_offsets().data).float(), mu, atol=1e-4, rtol=1e-4)
    colors = set(zip(few.train_labels.tolist(), map(tuple, crosses.get_facecolors()), strict=True))
    assert len(colors) == 10
