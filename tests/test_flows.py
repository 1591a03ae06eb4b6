"""The flows and the two layers of latents, against automatic differentiation, integrals and densities written out."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal

import train
from data import ImageData
from experiments import burda2016
from experiments.burda2016_two_layers import BurdaTwoLayerVAE
from experiments.flow_posterior import FlowPosteriorVAE
from experiments.flow_prior import Coupling, Flow, FlowPriorVAE
from experiments.two_layers import TwoLayerVAE
from experiments.two_layers_vampprior import TwoLayerVampVAE
from model import VAE, DiagonalNormal
from tests.conftest import SIZE

KINDS = (FlowPriorVAE, FlowPosteriorVAE, TwoLayerVAE, TwoLayerVampVAE)
STEP = 0.1
AXIS = torch.arange(-14, 14, STEP, dtype=torch.float64)
GRID = torch.cartesian_prod(AXIS, AXIS)  # (points, 2)


def stirred(model: nn.Module, gain: float = 1) -> nn.Module:
    """The model with weights so large that nothing in it is nearly linear."""
    for weight in model.parameters():
        nn.init.normal_(weight, std=gain / math.sqrt(max(1, weight.shape[-1])) if weight.dim() > 1 else 0.3)
    return model


def small_model(kind: type[VAE], latent_size: int = 2, **sizes: int) -> VAE:
    if kind is TwoLayerVampVAE:
        sizes["num_pseudo_inputs"] = 3
    elif kind is not TwoLayerVAE:
        sizes |= {"num_couplings": 3, "width": 8}
    return kind(SIZE, hidden_size=15, latent_size=latent_size, activation="tanh", **sizes)


def make_flow(latent_size: int, *batch: int) -> tuple[Flow, Tensor]:
    """A flow of four layers, with terms for a batch, and draws of its base."""
    layers = stirred(nn.ModuleList(Coupling(latent_size, 8) for _ in range(4)))
    zeros = torch.zeros(*batch, latent_size)
    return Flow(DiagonalNormal(zeros, zeros), layers, torch.randn(4, *batch, 8).unbind()), torch.randn(zeros.shape)


# ---------------------------------------------------------------------------------------------------------------------
# Flows


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # the half of one latent
@pytest.mark.parametrize("latent_size", [1, 2, 5, 6])
def test_density_is_the_change_of_variables(latent_size: int):
    """log p(z) = log N(eps) - log |det dz / deps|, with the Jacobian from automatic differentiation."""
    flow, eps = make_flow(latent_size)
    jacobian = torch.autograd.functional.jacobian(flow.invert, eps)
    expected = Normal(0, 1).log_prob(eps).sum() - torch.linalg.slogdet(jacobian).logabsdet
    torch.testing.assert_close(flow.log_prob(flow.invert(eps)), expected, rtol=1e-4, atol=1e-4)
    assert latent_size == 1 or (jacobian != 0).all()  # each latent depends on every other


def test_a_flows_terms_are_its_batchs():
    """Draws (K, B, latent_size) have the terms (B, width) that each one would have alone."""
    flow, _ = make_flow(5, 4)
    eps = torch.randn(3, 4, 5)
    z = flow.invert(eps)
    for b in range(4):
        base = DiagonalNormal(torch.zeros(5), torch.zeros(5))
        alone = Flow(base, flow.layers, tuple(term[b] for term in flow.contexts))
        torch.testing.assert_close(alone.invert(eps[:, b]), z[:, b])
        torch.testing.assert_close(alone.log_prob(z[:, b]), flow.log_prob(z)[:, b])


def test_a_rounded_flow_is_as_exact():
    """Under autocast, eps is found again, because both ways round the same network of the same half."""
    flow, eps = make_flow(6, 500)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        z = flow.invert(eps)
        found, log_prob = z, flow.log_prob(z)
        for layer, term in zip(flow.layers, flow.contexts, strict=True):
            found, _ = layer(found.roll(3, -1), term)
    assert z.dtype == log_prob.dtype == torch.float32
    assert ((found - eps).abs() < 1e-4).float().mean() > 0.98  # but for a half on the edge between two bfloat16s
    assert (z - flow.invert(eps)).abs().mean() > 1e-3  # rounding did matter


@pytest.mark.parametrize("kind", KINDS)
def test_draws_have_the_density_that_is_claimed(kind: type[VAE]):
    """Of prior and posterior: a grid over the latents has the mass 1, and the means of functions of draws."""
    model = stirred(small_model(kind), gain=0.8).double()
    x = torch.rand(3, SIZE, dtype=torch.float64)
    with torch.no_grad():
        for distribution, batch in ((model.prior(), ()), (model.posterior(x), (3,))):
            z = GRID.view(-1, *[1] * len(batch), 2)
            mass = distribution.log_prob(z).exp() * STEP**2
            torch.testing.assert_close(mass.sum(0), torch.ones_like(mass[0]), atol=5e-3, rtol=0)
            draws = distribution.sample((40_000,))
            assert draws.shape == (40_000, *batch, 2)
            for function in (torch.sin, torch.tanh, lambda z: torch.tanh(z).prod(-1, keepdim=True)):
                expected = (mass[..., None] * function(z)).sum(0)
                torch.testing.assert_close(function(draws).mean(0), expected, atol=0.02, rtol=0)


def test_the_posterior_is_reshaped_noise():
    """z = mu + exp(logvar / 2) eps, where eps has a density of its own for each image."""
    model = stirred(small_model(FlowPosteriorVAE, latent_size=5))
    x = torch.rand(4, SIZE)
    normal, q = VAE.posterior(model, x), model.posterior(x)
    eps = torch.randn(3, 4, 5)
    z = normal.mu + torch.exp(0.5 * normal.logvar) * q.noise.invert(eps)
    expected = q.noise.log_prob(q.noise.invert(eps)) - 0.5 * normal.logvar.sum(-1)
    torch.testing.assert_close(q.log_prob(z), expected, rtol=1e-4, atol=1e-3)
    middle = q.noise.invert(torch.zeros(4, 5))
    torch.testing.assert_close(q.mean, normal.mu + torch.exp(0.5 * normal.logvar) * middle)
    assert middle.std(0).min() > 1e-3


# ---------------------------------------------------------------------------------------------------------------------
# Two layers


def normal_of(part: nn.Module, z: Tensor) -> Distribution:
    """What a Conditional says of z, from its weights."""
    encoder, latent_z = part
    for layer in encoder.children():
        z = torch.tanh(z @ layer.weight.T + layer.bias)
    return Independent(Normal(latent_z.mu(z), torch.exp(0.5 * latent_z.logvar(z))), 1)


def test_two_layers_are_products_of_conditionals():
    model = stirred(small_model(TwoLayerVAE, latent_size=7, encoder_layers=1, decoder_layers=3))
    depths = [len(list(part.children())) for part in (model.encoder, model.up[0], model.down[0], model.decoder)]
    assert depths == [1, 1, 3, 4]
    x, z = torch.rand(4, SIZE), torch.randn(3, 4, 7)
    z1, z2 = z[..., :5], z[..., 5:]  # a third of 7, rounded, is 2
    q1 = normal_of((model.encoder, model.latent_z), x)
    expected = q1.log_prob(z1) + normal_of(model.up, z1).log_prob(z2)
    torch.testing.assert_close(model.posterior(x).log_prob(z), expected)
    expected = Normal(0, 1).log_prob(z2).sum(-1) + normal_of(model.down, z2).log_prob(z1)
    torch.testing.assert_close(model.prior().log_prob(z), expected)
    torch.testing.assert_close(model.decode(z), model.decoder(z1))
    q = model.posterior(x).mean
    torch.testing.assert_close(q, torch.cat([q1.mean, normal_of(model.up, q1.mean).mean], -1))


def test_the_vampprior_on_top_is_a_mixture():
    model = stirred(small_model(TwoLayerVampVAE, latent_size=7))
    z = torch.randn(4, 7)
    components = normal_of(model.up, model.pseudo_inputs)
    top = components.log_prob(z[:, None, 5:]).exp().mean(-1).log()
    torch.testing.assert_close(model.prior().log_prob(z), top + normal_of(model.down, z[:, 5:]).log_prob(z[:, :5]))


def test_two_layers_have_the_papers_sizes(digits: ImageData):
    """784 - 200 - 200 - 100 - 100 - 100 - 50 and back, with Glorot's weights and the mean image (Burda et al. 2016)."""
    options = train.make_options(latent_size=150, **burda2016.SIZES)
    model = BurdaTwoLayerVAE.for_data(digits, options.resolve(digits))

    def sizes(*parts: nn.Module) -> list[tuple[int, ...]]:
        layers = (layer for part in parts for layer in part.modules() if isinstance(layer, nn.Linear))
        return [layer.weight.T.shape for layer in layers]

    assert sizes(model.encoder, model.latent_z) == [(784, 200), (200, 200), (200, 100), (200, 100)]
    assert sizes(model.up) == [(100, 100), (100, 100), (100, 50), (100, 50)]
    assert sizes(model.down) == [(50, 100), (100, 100), (100, 100), (100, 100)]
    assert sizes(model.decoder) == [(100, 200), (200, 200), (200, 784)]
    assert model.up[1].mu.bias.abs().sum() == 0
    assert model.up[1].mu.weight.abs().max() <= math.sqrt(6 / 150)
    mean = digits.train_images.flatten(1).double().mean(0) / 255
    torch.testing.assert_close(model.decoder.fc3.bias.sigmoid(), mean.float().clamp(1e-3, 1 - 1e-3))
