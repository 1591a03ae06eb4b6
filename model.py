"""The variational autoencoder of "Auto-Encoding Variational Bayes" (Kingma & Welling 2014, arXiv 1312.6114).

The whole method in one file that needs torch alone: copy it into your own project as it is.

    x --Encoder--> hidden --LatentZ--> z, logvar, mu        q(z|x) = N(mu, diag(exp(logvar)))
    z --Decoder--> x_hat                                    p(x|z) = Bernoulli(x_hat), p(z) = N(0, I)

    vae = VAE()
    bce, kl = vae.elbo_terms(x, x)                          # x: (B, 784) or (B, 1, 28, 28), values in [0, 1]
    (bce + kl).sum().backward()                             # the negative ELBO, in nats
    x_hat, logvar, mu, z = vae(x)
    log_weights = vae.log_importance_weights(x, logvar, mu, eps=torch.randn(100, *mu.shape))
    nll_from_log_weights(log_weights)                       # -log p(x) of each image, estimated from 100 samples

A subclass of VAE changes one thing by overriding one thing, and all losses and metrics follow:

    the networks      other modules in self.encoder, self.latent_z or self.decoder
    the prior         log_prior and sample_prior, and kl_by_latent where there is a closed form
    the likelihood    log_likelihood, with the mean of the pixels and the support of the targets

Shapes: B images, K samples of z per image. Losses and log-probabilities are in nats.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import constraints

ACTIVATIONS = {"relu": F.relu, "tanh": F.tanh, "silu": F.silu}


class Encoder(nn.Module):
    """Maps images to the features from which q(z|x) is read: fully connected layers fc1, fc2, ..."""

    def __init__(self, input_size: int, hidden_size: int, num_layers: int = 2, activation: str = "relu"):
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        for i in range(num_layers):
            self.add_module(f"fc{i + 1}", nn.Linear(hidden_size if i else input_size, hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        """(B, input_size) -> (B, hidden_size)."""
        for layer in self.children():
            x = self.activation(layer(x))
        return x


class LatentZ(nn.Module):
    """Draws z ~ q(z|x) so that gradients reach mu and logvar: the reparameterization trick (section 2.4, eq. 10)."""

    def __init__(self, hidden_size: int, latent_size: int):
        super().__init__()
        self.mu = nn.Linear(hidden_size, latent_size)
        self.logvar = nn.Linear(hidden_size, latent_size)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, hidden_size) -> z, logvar, mu, each (B, latent_size)."""
        mu = self.mu(hidden).to(self.mu.weight.dtype)  # float32 under autocast too: z - mu is to be exact
        logvar = self.logvar(hidden).to(self.logvar.weight.dtype)
        std = torch.exp(0.5 * logvar)
        eps = torch.randn_like(std)
        z = std * eps + mu
        return z, logvar, mu


class Decoder(nn.Module):
    """Maps z to the pixels' Bernoulli probabilities: hidden layers fc1, fc2, ..., and one more to the pixels."""

    def __init__(
        self, latent_size: int, hidden_size: int, input_size: int, num_layers: int = 1, activation: str = "relu"
    ):
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        for i in range(num_layers):
            self.add_module(f"fc{i + 1}", nn.Linear(hidden_size if i else latent_size, hidden_size))
        self.add_module(f"fc{num_layers + 1}", nn.Linear(hidden_size, input_size))

    def logits(self, z: Tensor) -> Tensor:
        """(..., latent_size) -> (..., input_size): the probabilities' log-odds, which losses are best computed from."""
        *hidden_layers, output_layer = self.children()
        for layer in hidden_layers:
            z = self.activation(layer(z))
        return output_layer(z)

    def forward(self, z: Tensor) -> Tensor:
        """(..., latent_size) -> pixel probabilities (..., input_size)."""
        return torch.sigmoid(self.logits(z))


class VAE(nn.Module):
    """Encoder, LatentZ and Decoder, with the prior p(z) and the likelihood p(x|z).

    `config` holds the arguments, so that VAE(**vae.config) builds the same model. A subclass may replace

    - self.encoder: any module (B, input_size) -> hidden. Images arrive flat.
    - self.latent_z: any module hidden -> z, logvar, mu, each (B, latent_size).
    - self.decoder: any module (..., latent_size) -> outputs (..., D), which log_likelihood and mean take: by default
      one logit per pixel. z arrives as (B, latent_size), and as (K, B, latent_size) from importance sampling. Of a
      Decoder, the method `logits` is called.
    """

    support: constraints.Constraint = constraints.boolean  # the targets of which log_likelihood is a likelihood

    def __init__(
        self,
        input_size: int = 784,
        hidden_size: int = 512,
        latent_size: int = 20,
        encoder_layers: int = 2,
        decoder_layers: int = 1,
        activation: str = "relu",
    ):
        """Raises ValueError for a size that is not a positive integer or an activation not in ACTIVATIONS."""
        super().__init__()
        self.config = {
            "input_size": input_size,
            "hidden_size": hidden_size,
            "latent_size": latent_size,
            "encoder_layers": encoder_layers,
            "decoder_layers": decoder_layers,
            "activation": activation,
        }
        for name, value in self.config.items():
            if name != "activation" and not (type(value) is int and value > 0):
                raise ValueError(f"{name} must be a positive integer, not {value!r}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, not {activation!r}")
        self.encoder = Encoder(input_size, hidden_size, encoder_layers, activation)
        self.latent_z = LatentZ(hidden_size, latent_size)
        self.decoder = Decoder(latent_size, hidden_size, input_size, decoder_layers, activation)

    # The networks

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, ...) images in [0, 1] -> z, logvar, mu, each (B, latent_size), with z drawn from q(z|x).

        Raises ValueError where the sizes after the first do not multiply to input_size, or x is not floating point.
        """
        size = self.config["input_size"]
        if x.dim() < 2 or math.prod(x.shape[1:]) != size:
            raise ValueError(f"expected images of shape (B, ...) with {size} values each, got {tuple(x.shape)}")
        if not x.is_floating_point():
            raise ValueError(f"expected floats in [0, 1] of shape (B, {size}), got {x.dtype} {tuple(x.shape)}")
        return self.latent_z(self.encoder(x.flatten(1)))

    def outputs(self, z: Tensor) -> Tensor:
        """(..., latent_size) -> what the decoder gives before any sigmoid: (..., D), by default the pixels' logits."""
        decode = self.decoder.logits if isinstance(self.decoder, Decoder) else self.decoder
        return _at_least_float32(decode(z))

    def decode(self, z: Tensor) -> Tensor:
        """(..., latent_size) -> the pixels' means (..., input_size), by default their probabilities of being on."""
        return self.mean(self.outputs(z))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(B, ...) images in [0, 1] -> x_hat (B, input_size), and logvar, mu, z, each (B, latent_size)."""
        z, logvar, mu = self.encode(x)
        return self.decode(z), logvar, mu, z

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """Images -> the pixels' means, of the same shape, decoded from the mean of q(z|x)."""
        _, _, mu = self.encode(x)
        return self.decode(mu).view(x.shape)

    @torch.no_grad()
    def sample(self, n: int) -> Tensor:
        """The pixels' means (n, input_size), decoded from n draws of the prior."""
        return self.decode(self.sample_prior(n))

    # The prior p(z)

    def log_prior(self, z: Tensor) -> Tensor:
        """log p(z): (..., latent_size) -> (...), in nats."""
        return log_standard_normal(z)

    def sample_prior(self, n: int) -> Tensor:
        """-> (n, latent_size): draws of p(z), of the weights' type and on their device."""
        weight = next(self.parameters())
        return torch.randn(n, self.config["latent_size"], dtype=weight.dtype, device=weight.device)

    # The likelihood p(x|z)

    def log_likelihood(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """log p(x|z): outputs (..., D), targets (B, input_size) that broadcast to them -> (...), in nats."""
        targets = targets.to(outputs.dtype).expand_as(outputs)
        return -F.binary_cross_entropy_with_logits(outputs, targets, reduction="none").sum(-1)

    def mean(self, outputs: Tensor) -> Tensor:
        """E[x|z], which pictures show: outputs (..., D) -> (..., input_size), in [0, 1]."""
        return torch.sigmoid(outputs)

    def is_likelihood(self, targets: Tensor) -> bool:
        """Are all targets (B, input_size) in the support, so that log_likelihood is the logarithm of a likelihood?"""
        return bool(self.support.check(targets).all())

    # What follows from them

    def has_standard_prior(self) -> bool:
        """Is p(z) = N(0, I), for which there are closed forms?"""
        return type(self).log_prior is VAE.log_prior

    def kl_by_latent(self, logvar: Tensor, mu: Tensor) -> Tensor | None:
        """KL(q(z|x) || p(z)) by image and latent dimension, in closed form: (B, latent_size), in nats.

        None, for no closed form, where a subclass overrides log_prior and not this.
        """
        return kl_divergence(logvar, mu) if self.has_standard_prior() else None

    def sampled_kl(self, z: Tensor, logvar: Tensor, eps: Tensor) -> Tensor:
        """log q(z|x) - log p(z), the estimate of the KL from one draw z = mu + std * eps.

        z and eps (..., latent_size), logvar (B, latent_size) -> (...), in nats.
        """
        z, logvar, eps = _at_least_float32(z), _at_least_float32(logvar), _at_least_float32(eps)
        if self.has_standard_prior():
            return -0.5 * (logvar + eps**2 - z**2).sum(-1)  # the constants cancel
        return log_standard_normal(eps) - 0.5 * logvar.sum(-1) - self.log_prior(z)

    def elbo_terms(self, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The negative ELBO's two terms per image (eq. 3), from one draw of z: -log p(x|z) and the KL, each (B,).

        x (B, ...) is what the encoder is given, targets (B, ...) what p(x|z) is taken of. The form to train with: no
        probability rounds to 0 or 1 on the way. By default the first term is the binary cross-entropy of the pixels.
        The KL is kl_by_latent's, and where there is none, sampled_kl's (eq. 2). Their sum is the negative ELBO;
        bce + beta * kl weighs the KL (Higgins et al. 2017).
        """
        z, logvar, mu = self.encode(x)
        bce = -self.log_likelihood(self.outputs(z), targets.flatten(1))
        kl = self.kl_by_latent(logvar, mu)
        return bce, self.sampled_kl(z, logvar, (z - mu) * torch.exp(-0.5 * logvar)) if kl is None else kl.sum(-1)

    def log_importance_weights(self, targets: Tensor, logvar: Tensor, mu: Tensor, eps: Tensor) -> Tensor:
        """log p(x|z) + log p(z) - log q(z|x) at z = mu + std * eps (Burda et al. 2016, arXiv 1509.00519, eq. 8).

        targets (B, ...), logvar and mu (B, latent_size), eps (K, B, latent_size) from N(0, I), of their type ->
        (K, B), in nats.
        """
        z = mu + torch.exp(0.5 * logvar) * eps
        return self.log_likelihood(self.outputs(z), targets.flatten(1)) - self.sampled_kl(z, logvar, eps)


def loss_criterion(inputs: Tensor, targets: Tensor, logvar: Tensor, mu: Tensor) -> Tensor:
    """The negative ELBO (eq. 10) from pixel probabilities: binary cross-entropy + KL, summed over all, never averaged.

    inputs (B, D) as the decoder returns them, targets (B, ...) in [0, 1] with D values per image, logvar and mu
    (B, latent_size) -> a scalar, in nats for the whole batch. Averaging the cross-entropy over pixels would make the
    KL 784 times too heavy, and every reconstruction the same blob.
    """
    inputs = _at_least_float32(inputs)
    targets = targets.reshape(inputs.shape).to(inputs.dtype)
    return F.binary_cross_entropy(inputs, targets, reduction="sum") + kl_divergence(logvar, mu).sum()


def kl_divergence(logvar: Tensor, mu: Tensor) -> Tensor:
    """KL(q(z|x) || N(0, I)) by image and latent dimension, in closed form (appendix B): (B, latent_size), in nats."""
    logvar, mu = _at_least_float32(logvar), _at_least_float32(mu)
    return -0.5 * (1 + logvar - mu**2 - logvar.exp())


def log_standard_normal(z: Tensor) -> Tensor:
    """log N(z; 0, I): (..., latent_size) -> (...), in nats."""
    return -0.5 * (z**2 + math.log(2 * math.pi)).sum(-1)


def nll_from_log_weights(log_weights: Tensor) -> Tensor:
    """The estimate of -log p(x) from K importance weights per image: (K, B) -> (B,), in nats.

    In expectation an upper bound: the negative ELBO at K = 1, and tighter as K grows (Burda et al. 2016, theorem 1).
    Minimized, it is the IWAE's loss.
    """
    return math.log(log_weights.shape[0]) - log_weights.logsumexp(0)


def _at_least_float32(x: Tensor) -> Tensor:
    """Sums over pixels need more than the 8 bits of bfloat16; float64 stays what it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
