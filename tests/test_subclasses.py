"""What overrides posterior, prior or likelihood is trained, resumed, measured and drawn as the VAE is."""

import copy
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Distribution, Laplace

import evaluate
import measure
import pictures
import runs
import train
from data import ImageData
from model import VAE, LatentZ
from tests.conftest import same_weights
from tests.kinds import (
    IN_GRAY,
    KINDS,
    Conditional,
    FlowPosterior,
    FlowPrior,
    Gray,
    Logistic,
    MixturePrior,
    Normalized,
    SmallVAE,
    TwoLayers,
)
from utils import UserError

OPTIONS = {"batch_size": 200, "lr": 1e-2, "device": "cpu", "precision": "highest"}
WITHOUT_CLOSED_FORM = (FlowPosterior, FlowPrior, MixturePrior, TwoLayers)


def each(*kinds: type[VAE]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("kind", kinds, ids=lambda kind: kind.__name__)


kinds = each(*KINDS)
pytestmark = pytest.mark.usefixtures("no_pictures")


def fit(kind: type[VAE], data: ImageData, out_dir: Path, epochs: int, **options: object) -> tuple[VAE, Path]:
    torch.manual_seed(1)
    options = OPTIONS | {"binarize": "none" if kind in IN_GRAY else "dynamic"} | options
    model, _, run = train.train(data, kind(), **options, epochs=epochs, out_dir=out_dir)
    return model, run


def state(run: Path) -> dict[str, Tensor]:
    checkpoint = runs.read_checkpoint(run)
    parts = ("model_state_dict", "training_weights")
    return {f"{part}.{name}": value for part in parts for name, value in checkpoint[part].items()}


@each(Logistic, Normalized)  # test_experiments.py resumes experiments, and the others have no state of their own
def test_resumed_is_bit_identical_to_straight(kind: type[VAE], small: ImageData, tmp_path: Path):
    _, straight = fit(kind, small, tmp_path, 4)
    _, run = fit(kind, small, tmp_path, 2)
    assert not same_weights(run, straight)
    train.resume(run, kind(), small, epochs=4)
    assert same_weights(run, straight)


@pytest.mark.slow
@kinds
def test_compiled_is_eager_to_rounding(kind: type[VAE], small: ImageData, tmp_path: Path):
    check_compiled(kind, small, tmp_path)


@each(TwoLayers, Conditional)
def test_traced_is_eager_to_rounding(kind: type[VAE], small: ImageData, tmp_path: Path, quick_compiler: None):
    check_compiled(kind, small, tmp_path)


def check_compiled(kind: type[VAE], small: ImageData, tmp_path: Path) -> None:
    options = {"objective": "iwae", "importance_samples": 3} if kind is TwoLayers else {}
    (_, eager), (_, compiled) = (fit(kind, small, tmp_path, 2, compile=c, **options) for c in (False, True))
    assert runs.read_checkpoint(compiled)["options"]["compile"]
    found, expected = state(compiled), state(eager)
    for name, value in expected.items():  # Adam makes whole steps of tiny gradients, which are rounding
        assert (found[name] - value).norm() <= 0.02 * value.norm() + 1e-3, name


def integral(model: VAE, test_set: measure.TestSet) -> Tensor:
    """-log p(x) of each image, summed over a grid of both latents: (N,)."""
    model, step = copy.deepcopy(model).double().eval(), 0.08
    axis = torch.arange(-7, 7, step, dtype=torch.float64)
    z = torch.cartesian_prod(axis, axis)[:, None]  # (points, 1, 2)
    nll = []
    with torch.no_grad():
        for x, y in zip(test_set.targets.double().flatten(1), test_set.labels[:, None], strict=True):
            log_prior = model.prior(y).log_prob(z)
            assert log_prior.exp().sum() * step**2 == pytest.approx(1, abs=1e-3)
            log_joint = model.likelihood(z, y).log_prob(x) + log_prior
            nll.append(-log_joint.logsumexp(0).squeeze() - 2 * math.log(step))
    return torch.stack(nll)


@kinds
def test_nll_is_the_integral_over_the_latents(kind: type[VAE], small: ImageData, tmp_path: Path, capsys):
    model, _ = fit(kind, small, tmp_path, 3)
    before = copy.deepcopy(model.state_dict())
    model.train()  # as in a loop of somebody's own
    binarize, images, labels = "none" if kind in IN_GRAY else "dynamic", small.test_images[:5], small.test_labels[:5]
    metrics = evaluate.evaluate(model, images, binarize, nll_samples=5_000, labels=labels)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    few = ImageData("few", small.classes, images, labels, images, labels)
    test_set = measure.make_test_set(few, binarize)
    exact = integral(model, test_set).mean().item()
    nll = metrics["nll"]
    if kind is Gray:  # which has a density, so this is no likelihood
        assert nll is None
        nll = measure.estimate_nll(model, test_set, 5_000)[0].mean().item()
    assert nll == pytest.approx(exact, abs=0.1)
    assert metrics["neg_elbo"] > nll
    assert (metrics["kl_per_latent"] is None) == (kind in WITHOUT_CLOSED_FORM)
    evaluate.print_metrics(metrics, "title")
    assert ("no closed form" in capsys.readouterr().out) == (kind in WITHOUT_CLOSED_FORM)


@each(Conditional, Logistic)
def test_nll_compiled_is_nll(kind: type[VAE], small: ImageData, monkeypatch: pytest.MonkeyPatch, quick_compiler: None):
    """Long estimates are compiled: with the same draws, and without the blocks of other sizes."""
    torch.manual_seed(1)
    model, binarize = kind(), "none" if kind in IN_GRAY else "dynamic"
    few = ImageData("few", small.classes, *[part[:120] for part in (small.train_images, small.train_labels)] * 2)
    test_set = measure.make_test_set(few, binarize)
    calls, expected = [], measure.estimate_nll(model, test_set, 45)[0]
    compile_checked = measure.compile_checked

    def recorded(weigh: Callable, *args: object, **how: object) -> Callable:
        program = compile_checked(weigh, *args, **how)
        assert program is not weigh
        return lambda *block: calls.append(program(*block)) or calls[-1]

    monkeypatch.setattr(measure, "is_worth_compiling", lambda *_: True)
    monkeypatch.setattr(measure, "compile_checked", recorded)
    torch.testing.assert_close(measure.estimate_nll(model, test_set, 45)[0], expected, rtol=1e-5, atol=1e-3)
    assert [value.shape for value in calls] == [(2, 50)] * 4  # of 50 + 50 + 20 images and 20 + 20 + 5 samples


@each(MixturePrior, Conditional, Logistic)
@pytest.mark.usefixtures("short_chains")
def test_pictures_and_loading(kind: type[VAE], small: ImageData, tmp_path: Path):
    model, run = fit(kind, small, tmp_path, 1)
    test_set = measure.make_test_set(small, "none" if kind in IN_GRAY else "dynamic")
    names = {name for name, _ in pictures.draw_all(model, test_set, measure.encode(model, test_set), "caption")}
    expected = {"reconstructions.png", "prior_samples.png", "interpolations.png", "latent_space.png", "manifold.png"}
    expected |= {"traversals.png", "completions.png"}
    assert names == expected | (set() if kind in WITHOUT_CLOSED_FORM else {"latent_usage.png"})
    loaded, checkpoint = runs.load_checkpoint(run, kind())
    assert not loaded.training
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
    assert checkpoint["class"] == f"{kind.__module__}.{kind.__name__}"
    for wrong in (None, SmallVAE()):
        with pytest.raises(UserError, match=rf"{run}.*{kind.__name__}"):
            runs.load_checkpoint(run, wrong)


@each(FlowPosterior, Conditional)
def test_iwae_of_one_sample_has_the_elbos_expected_gradient(kind: type[VAE], small: ImageData):
    """On average over draws of z: as both objectives of training have it."""
    torch.manual_seed(1)
    model, draws = kind().double().eval(), 10_000
    images, y = small.test_images[:4].flatten(1) / 255, small.test_labels[:4]
    x, y = (images if kind in IN_GRAY else images.round()).double().repeat(draws, 1), y.repeat(draws)

    def gradients(num_samples: int | None) -> Tensor:
        loss, _ = model.iwae_loss(x, x, y, num_samples) if num_samples else model.loss(x, x, y)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss.sum() / draws, model.parameters())])

    iwae, elbo = gradients(1), gradients(None)
    assert (iwae - elbo).norm() < 0.05 * elbo.norm()


# ---------------------------------------------------------------------------------------------------------------------
# Other objectives


class Capacity(SmallVAE):
    """Holds the KL at a capacity, for which --beta stands (Burgess et al. 2018, arXiv 1804.03599, eq. 8)."""

    def loss(
        self, inputs: Tensor, targets: Tensor, y: Tensor | None = None, kl_weight: float | Tensor = 1.0
    ) -> tuple[Tensor, Tensor]:
        reconstruction, kl = self.elbo_terms(inputs, targets, y)
        return reconstruction + 10 * (kl - kl_weight).abs(), reconstruction + kl


def test_another_loss_is_minimized_and_the_elbo_is_printed(small: ImageData, tmp_path: Path):
    """With one step an epoch, the first train loss is that of the weights at the start, whatever the loss."""
    options = OPTIONS | {"batch_size": len(small.train_images), "epochs": 50, "beta": 3.0}
    histories = []
    for kind in (Capacity, SmallVAE):
        torch.manual_seed(1)
        histories.append(train.train(small, kind(), **options, out_dir=tmp_path)[1])
    ours, plain = histories
    assert ours[0]["train_loss"] == plain[0]["train_loss"]
    assert ours[0]["test_kl"] < 0.5
    assert ours[-1]["test_kl"] == pytest.approx(3, rel=0.1)
    assert plain[-1]["test_kl"] < 0.5
    assert ours[-1]["train_loss"] == pytest.approx(ours[-1]["test_loss"], rel=0.1)


# ---------------------------------------------------------------------------------------------------------------------
# Other networks


# ---------------------------------------------------------------------------------------------------------------------
# What is refused before the first step


class Summed:
    """A distribution whose log_prob is whatever a function makes of another's."""

    def __init__(self, base: Distribution, change):
        self.base, self.change = base, change

    def __getattr__(self, name: str):
        return getattr(self.base, name)

    def log_prob(self, value: Tensor) -> Tensor:
        return self.change(self.base.log_prob(value))


def broken(method: str, change) -> type[VAE]:
    def override(self, *args):
        return Summed(getattr(SmallVAE, method)(self, *args), change)

    return type("Broken", (SmallVAE,), {method: override})


def laplace(self, y=None):
    return Laplace(torch.zeros(2), torch.ones(2))


def pixels(self, z, y=None):
    return Bernoulli(logits=self.decoder.logits(z))


class Tripled(LatentZ):
    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z, logvar, mu = super().forward(hidden)
        return 3 * z, logvar, mu


class TripledVAE(SmallVAE):
    def __init__(self):
        super().__init__()
        self.latent_z = Tripled(16, 2)


class NoMean(FlowPosterior):
    def posterior(self, x, y=None):
        q = super().posterior(x, y)
        q.__class__ = type("Meanless", (type(q),), {"mean": Distribution.mean})
        return q


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (broken("posterior", torch.mean), r"posterior.*log_prob.*\(\), not \(3, 2\)"),
        (type("Broken", (SmallVAE,), {"prior": laplace}), r"prior.*log_prob.*\(3, 2, 2\), not \(3, 2\)"),
        (type("Broken", (SmallVAE,), {"likelihood": pixels}), r"likelihood.*log_prob.*\(3, 2, 49\), not \(3, 2\)"),
        (TripledVAE, r"TripledVAE.*latent_z\.forward"),
        (NoMean, "NoMean"),
    ],
)
def test_a_distribution_of_the_wrong_shape_is_refused(kind: type[VAE], says: str, small: ImageData, tmp_path: Path):
    with pytest.raises(UserError, match=says) as error:
        train.train(small, kind(), **OPTIONS, epochs=1, out_dir=tmp_path / "runs")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "runs").exists()


def test_a_model_for_other_images_is_refused(small: ImageData, tmp_path: Path):
    for model, options, says in (
        (VAE(9, 16, 2), {}, "other images"),
        (SmallVAE(), {"hidden_size": 16}, "--hidden-size"),
    ):
        with pytest.raises(UserError, match=says):
            train.train(small, model, **OPTIONS, **options, epochs=1, out_dir=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
