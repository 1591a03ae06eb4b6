"""benchmarks/ais.py: annealed importance sampling against an integral over two latents."""

import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Distribution, Normal

import measure
import runs
from benchmarks import ais
from model import VAE, DiagonalNormal
from tests.conftest import SIZE, as_test_set

PRIOR = Normal(torch.tensor([0.5, -0.3]), torch.tensor([1.2, 0.8]))


class OtherPrior(VAE):
    def prior(self, y: Tensor | None = None) -> Distribution:
        return DiagonalNormal(PRIOR.mean, PRIOR.variance.log())


@pytest.fixture
def model() -> VAE:
    """Its decoder says much about the two latents, and its q(z|x) is too narrow and far off."""
    torch.manual_seed(1)
    model = OtherPrior(SIZE, hidden_size=16, latent_size=2).eval().requires_grad_(False)
    for layer in model.decoder.children():
        torch.nn.init.normal_(layer.weight, std=2 / layer.in_features**0.5)
    torch.nn.init.constant_(model.latent_z.mu.bias, 1.0)
    torch.nn.init.constant_(model.latent_z.logvar.bias, -2.5)
    return model


def exact_nll(model: VAE, targets: Tensor, step: float = 0.1) -> Tensor:
    """-log of the integral of p(x|z) p(z), summed over a fine grid."""
    axis = torch.arange(-6, 6, step)
    z = torch.cartesian_prod(axis, axis)
    pixels = Bernoulli(model.decode(z).double().clamp(1e-12, 1 - 1e-12))
    log_joint = torch.stack([pixels.log_prob(x.double()).sum(1) for x in targets])
    return -((log_joint + PRIOR.log_prob(z).sum(1)).logsumexp(1) + 2 * math.log(step))


def test_both_bounds_close_in_on_the_integral(model: VAE, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ais, "transition", partial(ais.transition, leaps=4))  # which take less time
    torch.manual_seed(0)
    z = model.prior().sample((8,))
    x = model.decode(z).bernoulli()
    exact = exact_nll(model, x)
    nll = ais.compare(model, as_test_set(x), chains=32, temperatures=200, z=z).values()
    importance_sampling, forwards, backwards = ((values - exact).mean().item() for values in nll)
    assert importance_sampling > 1
    assert forwards == pytest.approx(0, abs=0.15)
    assert backwards == pytest.approx(0, abs=0.15)


def test_one_temperature_is_importance_sampling(model: VAE):
    x = model.sample(5).bernoulli()
    q, eps = model.posterior(x), torch.randn(7, 5, 2)
    log_weights, _ = ais.anneal(ais.densities(model, q, x), eps, [0.0, 1.0])
    posterior = Normal(q.mu, torch.exp(0.5 * q.logvar))
    z = posterior.mean + posterior.stddev * eps
    expected = Bernoulli(model.decode(z)).log_prob(x).sum(-1) + (PRIOR.log_prob(z) - posterior.log_prob(z)).sum(-1)
    torch.testing.assert_close(log_weights, expected, rtol=1e-4, atol=1e-4)


def test_transitions_leave_a_known_distribution_as_it_is():
    """Between N(0, 1) and N(3, 0.5^2), at beta = 1/2: precision (1 + 4) / 2, mean 3 * 4 / 5."""

    def both(eps: Tensor) -> tuple[Tensor, Tensor]:
        return Normal(0.0, 1.0).log_prob(eps).sum(-1), Normal(3.0, 0.5).log_prob(eps).sum(-1)

    eps = 2.4 + torch.randn(500, 20, 1) * 0.4**0.5
    for _ in range(10):
        eps, is_accepted = ais.transition(both, eps, 0.5, torch.full((20,), 0.5), leaps=3)
    assert 0.5 < is_accepted.float().mean() < 0.999  # so that a wrong test of proposals shows
    assert eps.mean().item() == pytest.approx(2.4, abs=0.03)
    assert eps.var().item() == pytest.approx(0.4, abs=0.02)


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, fails: Callable):
    model = VAE(hidden_size=8, latent_size=2)
    checkpoint = {"model": model.config, "model_state_dict": model.state_dict(), "options": {"dataset": "mnist-5k"}}
    runs.save_checkpoint(tmp_path / "run.pt", checkpoint)
    sizes = ["--images", "3", "--chains", "2", "--temperatures", "3"]
    monkeypatch.setattr(sys, "argv", ["ais.py", str(tmp_path / "run.pt"), *sizes])
    monkeypatch.setattr(
        measure, "estimate_nll", lambda _, test_set, **__: (torch.full((len(test_set.inputs),), 123.0), None)
    )
    ais.main()
    output = capsys.readouterr().out
    assert output.count("123.000") == 2
    assert output.count("standard error") == 3
    checkpoint["options"]["binarize"] = "none"
    runs.save_checkpoint(tmp_path / "gray.pt", checkpoint)
    assert "no likelihood" in fails(ais.main, tmp_path / "gray.pt")
    assert "--chains" in fails(ais.main, tmp_path / "run.pt", "--chains=0")
