"""A subclass that changes one thing, networks, prior or likelihood, is trained and measured as the VAE is."""

import copy
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Laplace, MixtureSameFamily, Normal, constraints
from torch.distributions import Categorical as Choice

import evaluate
import train
import utils
from data import ImageData, binarize_test_set
from model import VAE
from tests.conftest import SIZE, run_ranks
from utils import UserError

OPTIONS = {"batch_size": 100, "lr": 1e-2, "device": "cpu"}


class OtherNetworks(VAE):
    """Plain modules for encoder and decoder, with normalizations: buffers, which only training changes."""

    def __init__(self):
        super().__init__(SIZE, 16, 2)
        self.encoder = nn.Sequential(nn.Linear(SIZE, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.1))
        self.decoder = nn.Sequential(nn.Linear(2, 16), Normalization(16), nn.Tanh(), nn.Linear(16, SIZE))


class Normalization(nn.BatchNorm1d):
    """Batch normalization of (..., features)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, -2)).view(x.shape)


class OtherPrior(VAE):
    """A learned mixture of three normal distributions."""

    def __init__(self):
        super().__init__(SIZE, 16, 2)
        self.centres = nn.Parameter(torch.tensor([[1.0, 0.0], [-1.0, 1.0], [0.0, -1.5]]))

    def mixture(self) -> MixtureSameFamily:
        components = torch.distributions.Independent(Normal(self.centres, 0.7), 1)
        return MixtureSameFamily(Choice(torch.full((3,), 1 / 3)), components)

    def log_prior(self, z: Tensor) -> Tensor:
        return self.mixture().log_prob(z)

    def sample_prior(self, n: int) -> Tensor:
        return self.mixture().sample((n,))


class OtherLikelihood(VAE):
    """Laplace's distribution around the sigmoid of the outputs, with a learned scale: any gray values will do."""

    support = constraints.real

    def __init__(self):
        super().__init__(SIZE, 16, 2)
        self.log_scale = nn.Parameter(torch.tensor(-1.0))

    def log_likelihood(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return Laplace(self.mean(outputs), self.log_scale.exp()).log_prob(targets).sum(-1)


SUBCLASSES = [OtherNetworks, OtherPrior, OtherLikelihood]
BINARIZE = {OtherNetworks: "dynamic", OtherPrior: "dynamic", OtherLikelihood: "none"}


@pytest.fixture(params=SUBCLASSES)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type[VAE]:
    monkeypatch.setattr(train, "draw", lambda *args: None)
    torch.manual_seed(1)
    return request.param


def state(run: Path) -> dict[str, Tensor]:
    checkpoint = torch.load(run / "checkpoint.pt", weights_only=True)
    parts = ("model_state_dict", "training_weights")
    return {f"{part}.{name}": value for part in parts for name, value in checkpoint[part].items()}


def trained(kind: type[VAE], small: ImageData, out_dir: Path, epochs: int) -> tuple[VAE, Path]:
    torch.manual_seed(1)
    options = OPTIONS | {"binarize": BINARIZE[kind], "epochs": epochs, "out_dir": str(out_dir)}
    model, _, run = train.train(small, kind(), **options)
    return model, run


def test_resumed_is_bit_identical_to_straight(kind: type[VAE], small: ImageData, tmp_path: Path):
    _, straight = trained(kind, small, tmp_path, 4)
    _, run = trained(kind, small, tmp_path, 2)
    half = state(run)
    train.resume(run, kind(), small, epochs=4)
    resumed, expected = state(run), state(straight)
    assert expected.keys() == half.keys() == resumed.keys()
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
    assert not all(torch.equal(half[name], expected[name]) for name in expected)
    assert (run / "metrics.csv").read_text().count("\n") == 5


def test_loads_into_the_model_given_and_names_its_class_else(kind: type[VAE], small: ImageData, tmp_path: Path):
    model, run = trained(kind, small, tmp_path, 1)
    loaded, checkpoint = utils.load_checkpoint(run, kind())
    assert not loaded.training
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True)
    )
    assert checkpoint["class"] == f"{__name__}.{kind.__name__}"
    others = [other() for other in SUBCLASSES if other is not kind]
    for wrong in (None, VAE(SIZE, 16, 2), *others):
        with pytest.raises(UserError, match=rf"{run}.*{kind.__name__}") as error:
            utils.load_checkpoint(run, wrong)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=kind.__name__):
        train.resume(run, dataset=small, epochs=2)
    with pytest.raises(UserError, match=kind.__name__):
        evaluate.evaluate_run(run, dataset="mnist-5k")
    assert "sub" not in sys.modules  # no class is imported because a file names it
    utils.save_checkpoint(run / "checkpoint.pt", checkpoint | {"class": "sub.Class"})
    with pytest.raises(UserError, match=r"sub\.Class"):
        utils.load_checkpoint(run)
    elsewhere = f"__main__.{kind.__name__}"
    utils.save_checkpoint(run / "checkpoint.pt", checkpoint | {"class": elsewhere})
    utils.load_checkpoint(run, kind())


def test_another_class_called_vae_is_not_taken_for_it(small: ImageData, tmp_path: Path):
    other = type("VAE", (VAE,), {})(SIZE, 16, 2)
    (tmp_path / "a").mkdir()
    checkpoint = {"model": other.config, "model_state_dict": other.state_dict(), "class": utils.class_name(other)}
    utils.save_checkpoint(tmp_path / "a" / "checkpoint.pt", checkpoint)
    utils.load_checkpoint(tmp_path / "a", other)
    with pytest.raises(UserError, match="class"):
        utils.load_checkpoint(tmp_path / "a")


def integral(model: VAE, targets: Tensor) -> Tensor:
    """-log p(x) of targets (N, D) by summing p(x|z) p(z) over a grid of two latents."""
    model, step = copy.deepcopy(model).double(), 0.08
    axis = torch.arange(-6, 6, step, dtype=torch.float64)
    z = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        if isinstance(model, OtherPrior):
            log_prior = torch.stack([Normal(c, 0.7).log_prob(z).sum(1) for c in model.centres]).logsumexp(0) - math.log(
                3
            )
        else:
            log_prior = Normal(0.0, 1.0).log_prob(z).sum(1)
        logits = getattr(model.decoder, "logits", model.decoder)(z)
        if isinstance(model, OtherLikelihood):
            p = Laplace(logits.sigmoid(), model.log_scale.exp())
        else:
            p = Bernoulli(logits=logits)
        return torch.stack([-(p.log_prob(x).sum(1) + log_prior).logsumexp(0) for x in targets.double()]) - 2 * math.log(
            step
        )


def test_metrics_and_the_nll_equals_the_integral(kind: type[VAE], small: ImageData, tmp_path: Path):
    model, _ = trained(kind, small, tmp_path, 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()  # as in a loop of somebody's own
    metrics = evaluate.evaluate(model, small.test_images[:30], BINARIZE[kind], nll_samples=3000)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    _, targets = binarize_test_set(small.test_images[:30], BINARIZE[kind])
    exact = integral(model.eval(), targets)
    assert metrics["nll"] == pytest.approx(exact.mean().item(), abs=0.1)
    assert metrics["neg_elbo"] > metrics["nll"]
    assert (metrics["kl_per_latent"] is None) == (kind is OtherPrior)
    assert 0 <= metrics["active_units"] <= metrics["latent_size"] == 2


def test_iwae_of_one_sample_has_the_elbos_expected_gradient(kind: type[VAE], small: ImageData):
    """On average over draws of z: as both objectives of training have it."""
    torch.manual_seed(1)
    model = kind().double().eval()
    inputs, targets = (x.double() for x in binarize_test_set(small.test_images[:4], BINARIZE[kind]))
    draws = 20_000
    inputs, targets = inputs.repeat(draws, 1), targets.repeat(draws, 1)

    def gradients(loss: Tensor) -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss / draws, model.parameters())])

    iwae, elbo = (
        gradients(train.Objective(model, train.Options(objective=name))(inputs, targets, torch.tensor(1.0))[0])
        for name in ("iwae", "elbo")
    )
    assert (iwae - elbo).norm() < 0.03 * elbo.norm()


def test_iwae_objective(kind: type[VAE], small: ImageData, tmp_path: Path):
    options = OPTIONS | {"binarize": BINARIZE[kind], "epochs": 2, "out_dir": tmp_path}
    _, history, _ = train.train(small, kind(), **options, objective="iwae", importance_samples=3)
    assert all(math.isfinite(value) for row in history for value in row.values())
    assert history[1]["train_loss"] < 49 * math.log(2) + 5  # of a model that has learned nothing


def test_buffers_are_averaged_as_the_weights_are():
    """A t-th update of weight 10 / (t + 9); a mask of -inf stays, and counts are copied."""
    average, model = OtherNetworks(), OtherNetworks()
    for vae in (average, model):
        vae.register_buffer("mask", torch.tensor([0.0, -math.inf]))
    norm, mean = model.encoder[1], average.encoder[1]
    values = torch.randn(3, 16)
    for count, value in enumerate(values):
        norm.running_mean.copy_(value)
        norm.num_batches_tracked.fill_(count)
        train.update_average(average, model, count)
    expected = values[0]
    expected = expected + 10 / 11 * (values[1] - expected)
    expected = expected + 10 / 12 * (values[2] - expected)
    torch.testing.assert_close(mean.running_mean, expected)
    assert mean.num_batches_tracked == 2
    assert average.mask.tolist() == [0, -math.inf]
    utils.check_tensors(average.state_dict(), model.state_dict())


def test_pictures_of_every_kind(kind: type[VAE], small: ImageData, tmp_path: Path, capsys: pytest.CaptureFixture):
    model, _ = trained(kind, small, tmp_path, 1)
    inputs, _ = binarize_test_set(small.test_images, BINARIZE[kind])
    names = [name for name, _ in evaluate.draw_all(model, small, inputs, "caption")]
    expected = {"reconstructions", "prior_samples", "interpolations", "latent_space", "manifold"}
    assert set(names) == {
        f"{name}.png" for name in expected | ({"latent_usage"} - ({"latent_usage"} if kind is OtherPrior else set()))
    }
    evaluate.print_metrics(
        evaluate.evaluate(model, small.test_images, BINARIZE[kind], 2), "title", evaluate.bce_label(model)
    )
    printed = capsys.readouterr().out
    assert ("no KL by latent" in printed) == (kind is OtherPrior)
    assert ("-log p(x|z)" in printed) == (kind is OtherLikelihood)
    assert " nll " in printed


def train_each(small: ImageData) -> None:
    train.draw = lambda *args: None
    with utils.process_group():
        for kind in SUBCLASSES:
            model, _ = trained(kind, small, Path(kind.__name__), 2)
            torch.save(model.state_dict(), f"{kind.__name__}-{utils.rank_and_ranks()[0]}.pt")


def test_two_processes(small: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """They follow one process, end with the same weights and buffers, and a single process goes on from them."""
    monkeypatch.setattr(train, "draw", lambda *args: None)
    monkeypatch.chdir(tmp_path)
    run_ranks(2, train_each, small)
    for kind in SUBCLASSES:
        a, b = (torch.load(tmp_path / f"{kind.__name__}-{rank}.pt", weights_only=True) for rank in range(2))
        assert all(torch.equal(a[name], b[name]) for name in a)
        (two,) = (tmp_path / kind.__name__).iterdir()
        _, one = trained(kind, small, tmp_path / "one" / kind.__name__, 2)
        _, history, _ = train.resume(two, kind(), small, epochs=3)
        losses = [row["test_loss"] for row in history]
        expected = [row["test_loss"] for row in torch.load(one / "checkpoint.pt", weights_only=True)["history"]]
        assert losses[0] == pytest.approx(expected[0], rel=0.15)  # with other noise
        assert len(losses) == 3


def test_manifold_of_another_prior_is_its_quantiles(small: ImageData):
    model = OtherPrior()
    _, (x, y) = evaluate.decode_manifold(model, steps=5)
    draws = model.sample_prior(100_000)
    for values, latent in ((x, 0), (y[::-1], 1)):
        shares = [(draws[:, latent] < value).float().mean().item() for value in values]
        assert shares == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9], abs=0.03)


def test_a_weight_that_takes_no_part_is_named(small: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(train, "draw", lambda *args: None)
    model = OtherPrior()
    model.forgotten = nn.Linear(3, 3)
    with pytest.raises(UserError, match=r"forgotten\.weight"):
        train.train(small, model, **OPTIONS, epochs=1, out_dir=str(tmp_path / "a"))
    model.forgotten.requires_grad_(False)
    model.encoder.fc1.requires_grad_(False)
    frozen = model.encoder.fc1.weight.clone()
    _, _, run = train.train(small, model, **OPTIONS, epochs=1, out_dir=str(tmp_path / "b"))
    again = OtherPrior()
    again.forgotten = nn.Linear(3, 3)
    for module in (again.forgotten, again.encoder.fc1):
        module.requires_grad_(False)
    model, _, _ = train.resume(run, again, small, epochs=2)
    assert torch.equal(model.encoder.fc1.weight, frozen)


@pytest.mark.parametrize("change", ["hidden_size", "latent_size", "input_size"])
def test_a_model_that_does_not_fit_is_refused_before_a_folder_is_made(change: str, small: ImageData, tmp_path: Path):
    sizes = {"input_size": SIZE, "hidden_size": 16, "latent_size": 2} | {change: 9}
    model = VAE(**sizes)
    options = {"hidden_size": 16, "latent_size": 2}
    with pytest.raises(UserError, match="other images" if change == "input_size" else change):
        train.train(small, model, **options, epochs=1, out_dir=str(tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()


def test_a_made_model_and_one_in_place_are_trained_alike(small: ImageData, tmp_path: Path, monkeypatch):
    """model may be a function of the data and the options; a model given is trained itself."""
    monkeypatch.setattr(train, "draw", lambda *args: None)
    seen = []

    def make(dataset: ImageData, options: train.Options) -> VAE:
        seen.append((dataset, options.hidden_size))
        return train.make_vae(dataset, options)

    options = OPTIONS | {"hidden_size": 16, "latent_size": 2, "epochs": 1, "out_dir": str(tmp_path)}
    _, _, a = train.train(small, make, **options)
    _, _, b = train.train(small, **options)
    assert seen == [(small, 16)]
    assert all(torch.equal(state(a)[name], value) for name, value in state(b).items())
    mine = VAE(SIZE, 16, 2)
    returned, _, c = train.train(small, mine, **OPTIONS, epochs=1, out_dir=str(tmp_path))
    assert returned is mine
    assert torch.load(c / "checkpoint.pt", weights_only=True)["options"]["hidden_size"] == 16
    with pytest.raises(UserError, match="--init"):
        train.train(small, mine, **OPTIONS, init="burda2016", out_dir=str(tmp_path))


def test_a_prior_may_bring_its_own_closed_form(small: ImageData):
    class Wide(VAE):
        """N(0, 4 I)."""

        def log_prior(self, z: Tensor) -> Tensor:
            return Normal(0.0, 2.0).log_prob(z).sum(-1)

        def kl_by_latent(self, logvar: Tensor, mu: Tensor) -> Tensor:
            posterior = Normal(mu, torch.exp(0.5 * logvar))
            return torch.distributions.kl_divergence(posterior, Normal(torch.zeros_like(mu), 2.0))

    torch.manual_seed(1)
    model = Wide(SIZE, 16, 2)
    inputs, _ = binarize_test_set(small.test_images, "dynamic")
    logvar, mu = evaluate.posteriors(model, inputs)
    eps = torch.randn(2000, *mu.shape)
    sampled = model.sampled_kl(mu + torch.exp(0.5 * logvar) * eps, logvar, eps).mean(0)
    assert (sampled - model.kl_by_latent(logvar, mu).sum(1)).abs().max() < 0.1
    metrics = evaluate.evaluate(model, small.test_images, nll_samples=2)
    assert metrics["kl"] == pytest.approx(sum(metrics["kl_per_latent"]), rel=1e-4)
    assert "latent_usage.png" in dict(evaluate.draw_all(model, small, inputs, ""))
