"""The model and the loss against torch.distributions, closed forms and a network written out by hand."""

import ast
import inspect
import math
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli, Independent, Normal
from torch.distributions import kl_divergence as reference_kl

from model import (
    VAE,
    Decoder,
    Encoder,
    LatentZ,
    kl_divergence,
    log_standard_normal,
    loss_criterion,
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


def log_likelihood(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return VAE(logits.shape[-1]).log_likelihood(logits, targets)


def random_terms(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    logits = 3 * torch.randn(7, 30, dtype=dtype)
    targets = torch.bernoulli(torch.rand(7, 30, dtype=dtype))
    return logits, targets, torch.randn(7, 5, dtype=dtype), torch.randn(7, 5, dtype=dtype)


def test_needs_torch_alone():
    tree = ast.parse(Path(inspect.getfile(VAE)).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in imports if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} == {"math", "torch"}


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
    [{"latent_size": 0}, {"hidden_size": -1}, {"encoder_layers": 1.5}, {"input_size": "784"}, {"activation": "x"}],
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


@pytest.mark.parametrize("x", [torch.rand(4, 783), torch.rand(784), torch.rand(4, 28, 29), torch.tensor(1.0)])
def test_wrong_size(x: torch.Tensor):
    with pytest.raises(ValueError, match=r"784.*" + str(tuple(x.shape)).replace("(", r"\(").replace(")", r"\)")):
        VAE()(x)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
def test_not_float(dtype: torch.dtype):
    with pytest.raises(ValueError, match=rf"784.*{dtype}.*\(2, 784\)"):
        VAE()(torch.ones(2, 784, dtype=dtype))


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


def test_sample_has_the_posteriors_moments():
    latent_z = LatentZ(3, 2)
    hidden = torch.randn(1, 3)
    n = 200_000
    z, logvar, mu = latent_z(hidden.expand(n, 3))
    mean, std = mu[0], torch.exp(0.5 * logvar[0])
    assert torch.all((z.mean(0) - mean).abs() < 5 * std / math.sqrt(n))
    assert torch.all((z.var(0) / std**2 - 1).abs() < 5 * math.sqrt(2 / n))
    assert abs(torch.corrcoef(z.T)[0, 1]) < 5 / math.sqrt(n)


def test_gradients_reach_mu_and_logvar():
    latent_z = LatentZ(3, 2)
    z, logvar, mu = latent_z(torch.randn(4, 3))
    d_logvar, d_mu = torch.autograd.grad(z.sum(), (logvar, mu))
    torch.testing.assert_close(d_mu, torch.ones_like(mu))
    torch.testing.assert_close(d_logvar, 0.5 * (z - mu))  # d(mu + exp(logvar / 2) eps) / d logvar


# ---------------------------------------------------------------------------------------------------------------------
# The loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss_equals_torch_distributions(dtype: torch.dtype):
    for _ in range(20):
        logits, targets, logvar, mu = random_terms(dtype)
        expected = reference_loss(logits.sigmoid(), targets, logvar, mu)
        torch.testing.assert_close(loss_criterion(logits.sigmoid(), targets, logvar, mu), expected, rtol=1e-5, atol=0)
        from_logits = kl_divergence(logvar, mu).sum() - log_likelihood(logits, targets).sum()
        torch.testing.assert_close(from_logits, expected, rtol=1e-5, atol=0)


def test_likelihood_and_kl_equal_torch_distributions():
    logits, targets, logvar, mu = random_terms()
    torch.testing.assert_close(
        log_likelihood(logits, targets), Independent(Bernoulli(logits=logits), 1).log_prob(targets)
    )
    expected = reference_kl(Normal(mu, torch.exp(0.5 * logvar)), Normal(0.0, 1.0))
    torch.testing.assert_close(kl_divergence(logvar, mu), expected)


def test_elbo_terms_equal_torch_distributions():
    vae, x, targets = VAE(30, 16, 5), torch.rand(7, 30), torch.rand(7, 30).round()
    torch.manual_seed(1)
    bce, kl = vae.elbo_terms(x, targets)
    torch.manual_seed(1)
    x_hat, logvar, mu, z = vae(x)
    posterior = Normal(mu, torch.exp(0.5 * logvar))
    torch.testing.assert_close(bce, -Bernoulli(x_hat).log_prob(targets).sum(-1))
    torch.testing.assert_close(kl, reference_kl(posterior, Normal(0.0, 1.0)).sum(-1))
    torch.testing.assert_close(vae.log_prior(z), Normal(0.0, 1.0).log_prob(z).sum(-1))
    ratio = (posterior.log_prob(z) - Normal(0.0, 1.0).log_prob(z)).sum(-1)
    eps = (z - mu) / posterior.stddev
    torch.testing.assert_close(vae.sampled_kl(z, logvar, eps), ratio, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(log_standard_normal(z), vae.log_prior(z))


def test_likelihoods_are_of_black_and_white_pixels():
    targets = torch.tensor([[0.0, 1.0], [1.0, 1.0]])
    assert VAE(2).is_likelihood(targets)
    assert not VAE(2).is_likelihood(targets.index_fill(0, torch.tensor([1]), 0.999))


def test_loss_takes_images_as_targets():
    x = torch.rand(2, 1, 4, 4)
    logits, logvar, mu = torch.randn(2, 16), torch.randn(2, 3), torch.randn(2, 3)
    assert loss_criterion(logits.sigmoid(), x, logvar, mu) == loss_criterion(logits.sigmoid(), x.flatten(1), logvar, mu)
    vae, terms = VAE(16, 8, 3), []
    for images in (x, x.flatten(1)):
        torch.manual_seed(1)
        terms.append(torch.stack(vae.elbo_terms(images, images)))
    assert torch.equal(*terms)


def test_gradcheck():
    logits, targets, logvar, mu = (t.requires_grad_() for t in random_terms(torch.float64))
    targets = targets.detach()
    probabilities = logits.detach().sigmoid().requires_grad_()
    assert torch.autograd.gradcheck(lambda p, lv, m: loss_criterion(p, targets, lv, m), (probabilities, logvar, mu))
    assert torch.autograd.gradcheck(lambda s: log_likelihood(s, targets), logits)
    assert torch.autograd.gradcheck(kl_divergence, (logvar, mu))
    z = torch.randn_like(mu).requires_grad_()
    assert torch.autograd.gradcheck(VAE(30).sampled_kl, (z, logvar, mu))


@pytest.mark.parametrize("logit", [-1e4, 1e4])
@pytest.mark.parametrize("pixel", [0.0, 1.0])
def test_extreme_logits(logit: float, pixel: float):
    logits = torch.full((1, 784), logit, requires_grad=True)
    bce = -log_likelihood(logits, torch.full((1, 784), pixel))
    assert bce == (784 * 1e4 if (logit > 0) != (pixel > 0) else 0)
    bce.backward()
    assert torch.isfinite(logits.grad).all()
    z = torch.zeros(1, 2)
    assert torch.isfinite(loss_criterion(logits.sigmoid(), torch.full((1, 784), pixel), z, z))


def test_bfloat16_sums_keep_their_digits():
    _, _, logvar, mu = (t.bfloat16() for t in random_terms())
    assert torch.equal(kl_divergence(logvar, mu), kl_divergence(logvar.float(), mu.float()))
    vae = VAE(784, 16, 3).bfloat16()
    z, targets = torch.randn(4, 3).bfloat16(), torch.rand(4, 784).round().bfloat16()
    assert vae.outputs(z).dtype == vae.sampled_kl(z, z, z).dtype == torch.float32
    expected = Bernoulli(logits=vae.decoder.logits(z).float()).log_prob(targets.float()).sum(-1)
    torch.testing.assert_close(vae.log_likelihood(vae.outputs(z), targets), expected)


def test_importance_weights_equal_torch_distributions():
    vae = VAE(12, 8, 3)
    targets, logvar, mu, eps = torch.rand(5, 12).round(), torch.randn(5, 3), torch.randn(5, 3), torch.randn(7, 5, 3)
    posterior = Normal(mu, torch.exp(0.5 * logvar))
    z = posterior.mean + posterior.stddev * eps
    log_likelihood = Bernoulli(vae.decoder(z)).log_prob(targets).sum(-1)
    expected = log_likelihood + (Normal(0.0, 1.0).log_prob(z) - posterior.log_prob(z)).sum(-1)
    torch.testing.assert_close(vae.log_importance_weights(targets, logvar, mu, eps), expected)
    torch.testing.assert_close(vae.log_importance_weights(targets.view(5, 1, 3, 4), logvar, mu, eps), expected)


# ---------------------------------------------------------------------------------------------------------------------
# torch.compile and other types


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_model_agrees(device: str, dtype: torch.dtype):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("this machine has no CUDA device")
    if device == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("torch.compile needs a C++ compiler on the CPU")
    vae = VAE(16, 8, 2, encoder_layers=1).to(device, dtype)
    x = torch.rand(5, 1, 4, 4, device=device, dtype=dtype).round()

    def loss(model: nn.Module) -> torch.Tensor:
        x_hat, logvar, mu, z = model(x)
        torch.testing.assert_close(vae.decode(z), x_hat)  # the draws of z differ
        return kl_divergence(logvar, mu).sum() - vae.log_likelihood(vae.outputs(mu), x.flatten(1)).sum()

    compiled = torch.compile(vae, fullgraph=True)
    torch.testing.assert_close(loss(compiled), loss(vae))
    loss(compiled).backward()
    assert all(torch.isfinite(weight.grad).all() for weight in vae.parameters())


def test_torch_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """From another folder, as an experiment elsewhere would."""
    monkeypatch.chdir(tmp_path)
    vae = torch.hub.load(str(Path(__file__).parent.parent), "vae", source="local", latent_size=3)
    assert vae.config == VAE(latent_size=3).config
    assert vae(torch.zeros(2, 784))[0].shape == (2, 784)
