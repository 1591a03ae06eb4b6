"""The model and the loss against torch.distributions, closed forms and a network written out by hand."""

import ast
import inspect
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Bernoulli, Independent, Normal, TransformedDistribution, Uniform
from torch.distributions import kl_divergence as reference_kl
from torch.distributions.transforms import AffineTransform, SigmoidTransform

from model import (
    VAE,
    Decoder,
    DiagonalNormal,
    DiscretizedLogistic,
    Encoder,
    LatentZ,
    kl_by_latent,
    kl_divergence,
    loss_criterion,
    nll_from_log_weights,
)

PUBLISHED_NAMES = {
    f"{layer}.{kind}"
    for layer in ("encoder.fc1", "encoder.fc2", "latent_z.mu", "latent_z.logvar", "decoder.fc1", "decoder.fc2")
    for kind in ("weight", "bias")
}


def reference_loss(probabilities: torch.Tensor, targets: torch.Tensor, logvar: torch.Tensor, mu: torch.Tensor):
    """-log p(x|z) + KL of a batch, from torch.distributions."""
    log_likelihood = Independent(Bernoulli(probabilities), 1).log_prob(targets).sum()
    posterior = Normal(mu, torch.exp(0.5 * logvar))
    return reference_kl(posterior, Normal(torch.zeros_like(mu), torch.ones_like(mu))).sum() - log_likelihood


class Given(Decoder):
    """Logits that are given, whatever z is."""

    def __init__(self, values: torch.Tensor):
        super().__init__(1, 1, values.shape[-1])
        self.values = values

    def logits(self, z: torch.Tensor) -> torch.Tensor:
        return self.values


def log_likelihood(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    vae = VAE(logits.shape[-1], 1, 1)
    vae.decoder = Given(logits)
    return vae.likelihood(torch.zeros(len(logits), 1)).log_prob(targets)


def standard_kl(logvar: torch.Tensor, mu: torch.Tensor) -> torch.Tensor:
    return kl_by_latent(DiagonalNormal(mu, logvar), DiagonalNormal(torch.zeros_like(mu), torch.zeros_like(mu)))


def random_terms(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    logits = 3 * torch.randn(7, 30, dtype=dtype)
    targets = torch.bernoulli(torch.rand(7, 30, dtype=dtype))
    return logits, targets, torch.randn(7, 5, dtype=dtype), torch.randn(7, 5, dtype=dtype)


def test_needs_torch_alone():
    tree = ast.parse(Path(inspect.getfile(VAE)).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in imports if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} == {"contextlib", "math", "torch", "typing"}


@pytest.mark.parametrize("size", [1, 30, 784, 3 * 64 * 64])
@pytest.mark.parametrize("spread", [0.0, 3.0, 100.0])
def test_without_gradients_the_likelihood_is_the_same(size: int, spread: float):
    """It is then computed from logarithms of products, which must not overflow for large images."""
    logits, targets = spread * torch.randn(3, size), torch.bernoulli(torch.rand(3, size))
    expected = -F.binary_cross_entropy_with_logits(logits.double(), targets.double(), reduction="none").sum(-1)
    with torch.no_grad():
        torch.testing.assert_close(log_likelihood(logits, targets).double(), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(log_likelihood(logits, targets).double(), expected, rtol=1e-5, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# The networks


def test_default_model_is_the_published_one():
    vae = VAE()
    state = vae.state_dict()
    assert set(state) == PUBLISHED_NAMES

    def linear(name: str) -> nn.Linear:
        layer = nn.Linear(*state[f"{name}.weight"].T.shape)
        layer.load_state_dict({"weight": state[f"{name}.weight"], "bias": state[f"{name}.bias"]})
        return layer

    hidden = nn.Sequential(linear("encoder.fc1"), nn.ReLU(), linear("encoder.fc2"), nn.ReLU())
    pixels = nn.Sequential(linear("decoder.fc1"), nn.ReLU(), linear("decoder.fc2"), nn.Sigmoid())
    x = torch.rand(3, 784)
    x_hat, logvar, mu, z = vae(x)
    torch.testing.assert_close(mu, linear("latent_z.mu")(hidden(x)))
    torch.testing.assert_close(logvar, linear("latent_z.logvar")(hidden(x)))
    torch.testing.assert_close(x_hat, pixels(z))
    assert [tuple(t.shape) for t in (x_hat, logvar, mu, z)] == [(3, 784), (3, 20), (3, 20), (3, 20)]
    assert hidden[0].weight.shape == (512, 784)


def test_config_rebuilds_the_model():
    vae = VAE(16, 8, 3, encoder_layers=3, decoder_layers=2, activation="tanh")
    twin = VAE(**vae.config)
    twin.load_state_dict(vae.state_dict())
    x = torch.rand(2, 16)
    assert torch.equal(vae.reconstruct(x), twin.reconstruct(x))
    assert [name for name, _ in vae.encoder.named_children()] == ["fc1", "fc2", "fc3"]
    assert [name for name, _ in vae.decoder.named_children()] == ["fc1", "fc2", "fc3"]


@pytest.mark.parametrize(("activation", "reference"), [("relu", nn.ReLU()), ("tanh", nn.Tanh()), ("silu", nn.SiLU())])
def test_activation(activation: str, reference: nn.Module):
    encoder = Encoder(6, 4, num_layers=1, activation=activation)
    decoder = Decoder(3, 4, 6, activation=activation)
    x, z = torch.randn(5, 6), torch.randn(5, 3)
    torch.testing.assert_close(encoder(x), reference(encoder.fc1(x)))
    torch.testing.assert_close(decoder(z), decoder.fc2(reference(decoder.fc1(z))).sigmoid())


@pytest.mark.parametrize(
    "bad",
    [{"latent_size": 0}, {"encoder_layers": 1.5}, {"input_size": "784"}, {"activation": "x"}],
)
def test_bad_config(bad: dict):
    with pytest.raises(ValueError, match=next(iter(bad))):
        VAE(**bad)


@pytest.mark.parametrize("shape", [(4, 784), (4, 28, 28), (4, 1, 28, 28), (0, 784), (4, 2, 392)])
def test_images_of_any_shape(shape: tuple):
    vae, x = VAE(), torch.rand(shape)
    assert vae(x)[0].shape == (shape[0], 784)
    assert vae.reconstruct(x).shape == shape
    torch.testing.assert_close(vae.reconstruct(x).flatten(1), vae.reconstruct(x.flatten(1)))


@pytest.mark.parametrize(
    "x", [torch.rand(4, 783), torch.rand(784), torch.tensor(1.0), torch.ones(2, 784, dtype=torch.uint8)]
)
def test_wrong_size_or_type(x: torch.Tensor):
    with pytest.raises(ValueError, match=r"784"):
        VAE()(x)


@pytest.mark.parametrize("value", [-0.5, 1.5, float("nan")])
def test_values_outside_of_0_to_1(value: float):
    vae, x = VAE(16, 8, 2), torch.rand(3, 16)
    x[1, 3] = value
    for call in (vae, vae.encode, vae.reconstruct, lambda x: vae.elbo_terms(x, x)):
        with pytest.raises(ValueError, match=r"values in \[0, 1\]"):
            call(x)


def test_sample_decodes_the_prior():
    vae = VAE(4, 8, 2)
    images = vae.sample(5)
    assert images.shape == (5, 4)
    assert not images.requires_grad
    torch.manual_seed(3)
    sampled = vae.sample(5)
    torch.manual_seed(3)
    torch.testing.assert_close(sampled, vae.decode(torch.randn(5, 2)))


# ---------------------------------------------------------------------------------------------------------------------
# The reparameterization trick


def test_gradients_reach_mu_and_logvar():
    latent_z = LatentZ(3, 2)
    z, logvar, mu = latent_z(torch.randn(4, 3))
    d_logvar, d_mu = torch.autograd.grad(z.sum(), (logvar, mu))
    torch.testing.assert_close(d_mu, torch.ones_like(mu))
    torch.testing.assert_close(d_logvar, 0.5 * (z - mu))  # d(mu + exp(logvar / 2) eps) / d logvar


# ---------------------------------------------------------------------------------------------------------------------
# The distributions


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_diagonal_normal_is_that_of_torch_distributions(dtype: torch.dtype):
    mu, logvar = torch.randn(4, 3, dtype=dtype), torch.randn(4, 3, dtype=dtype)
    ours, reference = DiagonalNormal(mu, logvar), Independent(Normal(mu, torch.exp(0.5 * logvar)), 1)
    torch.manual_seed(1)
    z = ours.rsample((5,))
    torch.manual_seed(1)
    torch.testing.assert_close(z, reference.rsample((5,)))
    torch.testing.assert_close(ours.log_prob(z), reference.log_prob(z))
    assert torch.equal(ours.mean, mu)
    assert (ours.batch_shape, ours.event_shape) == (reference.batch_shape, reference.event_shape)
    assert not DiagonalNormal(mu.requires_grad_(), logvar).sample().requires_grad


def test_kl_between_any_two():
    q, p = (DiagonalNormal(torch.randn(4, 3), torch.randn(4, 3)) for _ in range(2))
    references = (Normal(d.mu, torch.exp(0.5 * d.logvar)) for d in (q, p))
    expected = reference_kl(*references)
    torch.testing.assert_close(kl_by_latent(q, p), expected)
    torch.testing.assert_close(kl_divergence(q, p, q.mean), expected.sum(-1))
    other = Independent(Normal(torch.zeros(3), 1.0), 1)
    z = q.rsample()
    assert kl_by_latent(q, other) is None
    torch.testing.assert_close(kl_divergence(q, other, z), q.log_prob(z) - other.log_prob(z))

    class Moved(DiagonalNormal):
        """Whose density is another, so that the closed form would be wrong."""

    assert kl_by_latent(Moved(q.mu, q.logvar), p) is None


def test_kl_where_a_variance_underflows():
    mu, logvar = torch.zeros(1, 2), torch.tensor([[-200.0, 0.0]])
    assert standard_kl(logvar, mu).tolist() == [[99.5, 0.0]]


def test_an_odd_image_does_not_overflow():
    """Features so large that exp(logvar) would be infinite give finite terms and gradients."""
    hidden, latent_z = torch.full((1, 3), 1e3), LatentZ(3, 2)
    latent_z.logvar.weight.data.fill_(1.0)
    q, p = latent_z.posterior(hidden), DiagonalNormal(torch.zeros(2), torch.zeros(2))
    z = q.rsample()
    (kl_by_latent(q, p).sum() + q.log_prob(z).sum() - p.log_prob(z).sum()).backward()
    assert all(x.isfinite().all() for x in (z, q.logvar, kl_by_latent(q, p), *(w.grad for w in latent_z.parameters())))


# ---------------------------------------------------------------------------------------------------------------------
# The loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss_equals_torch_distributions(dtype: torch.dtype):
    for _ in range(20):
        logits, targets, logvar, mu = random_terms(dtype)
        expected = reference_loss(logits.sigmoid(), targets, logvar, mu)
        torch.testing.assert_close(loss_criterion(logits.sigmoid(), targets, logvar, mu), expected, rtol=1e-5, atol=0)
        from_logits = standard_kl(logvar, mu).sum() - log_likelihood(logits, targets).sum()
        torch.testing.assert_close(from_logits, expected, rtol=1e-5, atol=0)


def test_elbo_terms_equal_torch_distributions():
    vae, x, targets = VAE(30, 16, 5), torch.rand(7, 30), torch.rand(7, 30).round()
    torch.manual_seed(1)
    reconstruction, kl = vae.elbo_terms(x, targets)
    torch.manual_seed(1)
    x_hat, logvar, mu, z = vae(x)
    posterior = Normal(mu, torch.exp(0.5 * logvar))
    torch.testing.assert_close(reconstruction, -Bernoulli(x_hat).log_prob(targets).sum(-1))
    torch.testing.assert_close(kl, reference_kl(posterior, Normal(0.0, 1.0)).sum(-1))
    torch.testing.assert_close(vae.prior().log_prob(z), Normal(0.0, 1.0).log_prob(z).sum(-1))


def test_importance_weights_equal_torch_distributions():
    vae, x, targets = VAE(30, 16, 5), torch.rand(7, 30), torch.rand(7, 30).round()
    q = vae.posterior(x)
    z = q.rsample((4,))
    log_weights = vae.log_weight(q, vae.prior(), z, targets)
    posterior = Normal(q.mu, torch.exp(0.5 * q.logvar))
    expected = Bernoulli(vae.decode(z)).log_prob(targets).sum(-1) + Normal(0.0, 1.0).log_prob(z).sum(-1)
    expected = expected - posterior.log_prob(z).sum(-1)
    torch.testing.assert_close(log_weights, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(nll_from_log_weights(expected), -expected.double().exp().mean(0).log().float())


def test_gradcheck():
    logits, targets, logvar, mu = (t.requires_grad_() for t in random_terms(torch.float64))
    targets = targets.detach()
    probabilities = logits.detach().sigmoid().requires_grad_()
    assert torch.autograd.gradcheck(lambda p, lv, m: loss_criterion(p, targets, lv, m), (probabilities, logvar, mu))
    assert torch.autograd.gradcheck(lambda s: log_likelihood(s, targets), logits)
    assert torch.autograd.gradcheck(standard_kl, (logvar, mu))
    z = torch.randn_like(mu).requires_grad_()
    assert torch.autograd.gradcheck(lambda z, m, lv: DiagonalNormal(m, lv).log_prob(z), (z, mu, logvar))


@pytest.mark.parametrize("logit", [-1e4, 0.0, 1e4])
@pytest.mark.parametrize("pixel", [0.0, 1.0])
def test_extreme_logits(logit: float, pixel: float):
    logits = torch.full((1, 784), logit, requires_grad=True)
    bce = -log_likelihood(logits, torch.full((1, 784), pixel))
    wrong = 1e4 if (logit > 0) != (pixel > 0) else 0
    assert bce.item() == pytest.approx(784 * (wrong if logit else math.log(2)))
    bce.backward()
    assert torch.isfinite(logits.grad).all()
    z = torch.zeros(1, 2)
    assert torch.isfinite(loss_criterion(logits.sigmoid(), torch.full((1, 784), pixel), z, z))


# ---------------------------------------------------------------------------------------------------------------------
# Models that are changed


def test_likelihoods_have_the_right_gradients_at_0():
    """Where a layer that starts at zero puts all outputs."""
    logits = torch.zeros(4, requires_grad=True)
    log_likelihood(logits[None], torch.tensor([[0.0, 1.0, 0.0, 1.0]])).sum().backward()
    torch.testing.assert_close(logits.grad, torch.tensor([-0.5, 0.5, -0.5, 0.5]))
    loc = torch.tensor([0.5 / 255, 254.5 / 255], requires_grad=True)  # at the edges of the first and last bin
    DiscretizedLogistic(loc, torch.tensor(-2.0)).log_prob(torch.tensor([0.0, 1.0])).sum().backward()
    torch.testing.assert_close(loc.grad, torch.tensor([-0.5, 0.5]) * math.exp(2))


# ---------------------------------------------------------------------------------------------------------------------
# The logistic likelihood

LEVELS = torch.arange(256) / 255
LOCATIONS = (-300.0, -1.3, -0.01, 0.0, 0.2, 0.5, 0.7777, 1.0, 1.05, 4.0)
LOG_SCALES = (-7.0, -6.0, -4.5, -3.0, -2.0, 0.0, 2.0, 7.0)


@pytest.mark.parametrize("log_scale", LOG_SCALES)
def test_the_logistic_against_the_difference_of_its_distribution_function(log_scale: float):
    for loc in LOCATIONS:
        ours = DiscretizedLogistic(torch.tensor(loc), torch.tensor(log_scale))
        found = ours.log_prob(LEVELS)
        assert found.exp().sum().item() == pytest.approx(1, abs=1e-5)
        assert ours.mean.item() == pytest.approx((found.exp() * LEVELS).sum().item(), abs=1 / 510)  # half a level
        uniform = Uniform(torch.tensor(0.0, dtype=torch.float64), 1.0)
        transforms = [SigmoidTransform().inv, AffineTransform(loc, math.exp(log_scale))]
        logistic = TransformedDistribution(uniform, transforms, validate_args=False)
        below = logistic.cdf((torch.arange(255, dtype=torch.float64) + 0.5) / 255)
        expected = torch.cat([below[:1], below.diff(), 1 - below[-1:]])
        torch.testing.assert_close(found.exp().double(), expected, rtol=1e-3, atol=1e-6)


def test_the_logistics_tails_do_not_vanish():
    """Far from the location, where float64 has only 0 left, log p falls by 1 / scale for each unit."""
    far = DiscretizedLogistic(torch.tensor([0.5, -99.5, 200.0]), torch.tensor(-5.0)).log_prob(torch.tensor(0.5))
    assert (far[0] - far[1]).item() == pytest.approx(100 * math.exp(5), rel=1e-3)
    assert (far[0] - far[2]).item() == pytest.approx(199.5 * math.exp(5), rel=1e-3)


def test_the_logistics_targets_are_256_levels():
    support = DiscretizedLogistic(torch.tensor(0.0), torch.tensor(0.0)).support
    assert support.is_discrete
    assert support.check(LEVELS[:, None]).all()
    assert not support.check(torch.tensor([-1 / 255, 0.5, 256 / 255])).any()


@pytest.mark.parametrize("log_scale", [-200.0, -7.0, 0.0, 7.0, 200.0])
def test_the_logistics_gradients_are_finite(log_scale: float):
    for output in (0.0, 1e-40, 100.0, -1e10, 3e38, -3e38, math.inf, -math.inf):
        outputs = torch.full((256,), output, requires_grad=True)
        scale = torch.tensor(log_scale, requires_grad=True)
        log_prob = DiscretizedLogistic(0.5 + 0.25 * outputs, scale).log_prob(LEVELS)
        log_prob.sum().backward()
        assert log_prob.isfinite().all()
        assert outputs.grad.isfinite().all()
        assert scale.grad.isfinite()


def test_the_logistics_draws_have_its_probabilities():
    logistic = DiscretizedLogistic(torch.tensor([0.5, 0.99]), torch.tensor([-5.0, -3.0]))
    levels = (255 * logistic.sample((100_000,))).round().long()
    for i in range(2):
        shares = torch.bincount(levels[:, i], minlength=256) / 100_000
        expected = DiscretizedLogistic(logistic.loc[i], logistic.scale[i].log()).log_prob(LEVELS).exp()
        torch.testing.assert_close(shares, expected, atol=5e-3, rtol=0)


def test_each_channel_has_a_scale_of_its_own():
    vae = VAE(3 * 4, 8, 2, likelihood="logistic", channels=3)
    vae.log_scale.data = torch.tensor([-1.0, -3.0, -5.0])
    z, targets = torch.randn(5, 2), torch.randint(0, 256, (5, 3, 2, 2)) / 255
    loc = 0.5 + 0.25 * vae.decoder.logits(z).view(5, 3, 2, 2)
    by_channel = [
        DiscretizedLogistic(loc[:, i], vae.log_scale[i]).log_prob(targets[:, i]).sum((1, 2)) for i in range(3)
    ]
    torch.testing.assert_close(vae.likelihood(z).log_prob(targets.flatten(1)), sum(by_channel))
    assert "log_scale" in vae.state_dict()
    twin = VAE(**vae.config)
    twin.load_state_dict(vae.state_dict())
    assert torch.equal(twin.decode(z), vae.decode(z))
