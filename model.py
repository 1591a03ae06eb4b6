"""The variational autoencoder of "Auto-Encoding Variational Bayes" (Kingma & Welling 2014, arXiv 1312.6114).

This file holds the whole method and needs only torch, so you can copy it into a project of your own.

    x --Encoder--> hidden --LatentZ--> z, logvar, mu
    z --Decoder--> x_hat

    vae = VAE()
    reconstruction, kl = vae.elbo_terms(x, x)           # x: (B, 784) or (B, 1, 28, 28), values in [0, 1]
    (reconstruction + kl).sum().backward()              # the negative ELBO, in nats
    x_hat, logvar, mu, z = vae(x)

Everything follows from three distributions, so a subclass changes the model by overriding one or more of three methods:

    posterior(x, y)     q(z|x), by default N(mu, diag(exp(logvar)))     uses rsample, log_prob, mean
    prior(y)            p(z), by default N(0, I)                        uses sample, log_prob
    likelihood(z, y)    p(x|z), by default one Bernoulli per pixel      uses log_prob, mean, support, sample

For images of 8 bits per value, VAE(likelihood="logistic") has a discretized logistic in the Bernoulli's place.

Each method returns a torch.distributions.Distribution with the members in the last column. log_prob sums over the
latents or the pixels and returns one number for each z or image. The support of a likelihood is the set of valid
targets. The labels y are passed on to all three; the VAE itself ignores them.

Shapes: B images of D = input_size values, K samples of z for each. Losses and log-probabilities are in nats.
"""

import contextlib
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Bernoulli, Distribution, Independent, constraints

ACTIVATIONS = {"relu": F.relu, "tanh": F.tanh, "silu": F.silu}
LIKELIHOODS = ("bernoulli", "logistic")


class DiagonalNormal(Distribution):
    """N(mu, diag(exp(logvar))) over the last dimension; mu and logvar are (..., latent_size).

    Normal from torch.distributions would do, but its KL is infinite where a variance underflows. Computes in at least
    float32, even under autocast.
    """

    support = constraints.real_vector
    has_rsample = True

    def __init__(self, mu: Tensor, logvar: Tensor):
        self.mu = _at_least_float32(mu)
        self.logvar = _at_least_float32(logvar)
        super().__init__(mu.shape[:-1], mu.shape[-1:], validate_args=False)

    @property
    def mean(self) -> Tensor:
        """(..., latent_size)."""
        return self.mu

    def rsample(self, sample_shape: torch.Size | tuple = ()) -> Tensor:
        """Draws z so that gradients reach mu and logvar: the reparameterization trick (section 2.4, eq. 10)."""
        std = torch.exp(0.5 * self.logvar)
        eps = torch.randn(*sample_shape, *std.shape, dtype=std.dtype, device=std.device)
        return std * eps + self.mu

    def log_prob(self, z: Tensor) -> Tensor:
        """(..., latent_size) -> (...)."""
        eps = (z - self.mu) * torch.exp(-0.5 * self.logvar)
        return -0.5 * (eps**2 + self.logvar + math.log(2 * math.pi)).sum(-1)


class BernoulliPixels(Independent):
    """One Bernoulli for each pixel, for logits (..., D). Its log_prob is several times as fast as PyTorch's."""

    def __init__(self, logits: Tensor):
        super().__init__(Bernoulli(logits=logits, validate_args=False), 1, validate_args=False)

    def log_prob(self, x: Tensor) -> Tensor:
        """(..., D) in [0, 1] -> (...): the sum of x logit - log(1 + exp(logit))."""
        logits = self.base_dist.logits
        size = logits.abs()
        normalizer = 1 + torch.exp(-size)
        factors = 1
        if not torch.is_grad_enabled():  # products have fewer logarithms, but slower gradients
            while factors < 16 and normalizer.shape[-1] % 2 == 0:
                first, last = normalizer.chunk(2, -1)
                normalizer = first * last
                factors = 2 * factors
        return ((x - 0.5) * logits - 0.5 * size).sum(-1) - torch.log(normalizer).sum(-1)


class EightBits(constraints.Constraint):
    """0, 1/255, ..., 1: the support of a distribution over the values of pixels of 8 bits.

    It says is_discrete, so log_prob is taken for the logarithm of a mass. Only then do evaluations speak of likelihoods
    and bits.
    """

    is_discrete = True

    def check(self, value: Tensor) -> Tensor:
        """(...) -> (...) bool."""
        level = 255 * value
        return (level >= 0) & (level <= 255) & ((level - level.round()).abs() < 1e-3)


class DiscretizedLogistic(Distribution):
    """Values 0, 1/255, ..., 1, each with a logistic distribution's mass in the bin around it.

    The first and last bins reach to infinity (Salimans et al. 2017, arXiv 1701.05517, section 2.1). loc (...) and the
    scale (...) are in units of the values. Both are clamped, so that gradients are finite for all arguments. A value in
    between counts as the nearest of the 256.
    """

    support = EightBits()

    def __init__(self, loc: Tensor, log_scale: Tensor):
        self.loc = loc.clamp(-1e6, 1e6)
        self.scale = torch.exp(log_scale.clamp(-7, 7))
        super().__init__(torch.broadcast_shapes(loc.shape, log_scale.shape), validate_args=False)

    def log_prob(self, x: Tensor) -> Tensor:
        """(...) in [0, 1] -> (...), exact far into the tails.

        With the standard logistic's distribution function F, F(a) - F(b) = F(a) F(-b) (1 - exp(b - a)).
        """
        level = (255 * x).round()
        loc = 255 * self.loc
        scale = 255 * self.scale
        at_most = _log_sigmoid((level + 0.5 - loc) / scale)  # log P(X <= x)
        at_least = _log_sigmoid((loc - (level - 0.5)) / scale)  # log P(X >= x)
        inside = at_most + at_least + torch.log(-torch.expm1(-1 / scale))
        return torch.where(level == 0, at_most, torch.where(level == 255, at_least, inside))

    @property
    def mean(self) -> Tensor:
        """(...): of the logistic clipped to [0, 1], which is the integral of P(X > t) over t from 0 to 1."""
        below = F.softplus(self.loc / self.scale)
        above = F.softplus((self.loc - 1) / self.scale)
        return (self.scale * (below - above)).clamp(0, 1)

    @torch.no_grad()
    def sample(self, sample_shape: torch.Size | tuple = ()) -> Tensor:
        """(*sample_shape, ...) in 0, 1/255, ..., 1."""
        uniform = torch.rand(*sample_shape, *self.batch_shape, device=self.loc.device)
        return (255 * (self.loc + self.scale * torch.logit(uniform))).round().clamp(0, 255) / 255


class Encoder(nn.Module):
    """Maps images to the features that q(z|x) is read from: fully connected layers fc1, fc2, ..."""

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
    """Reads q(z|x) from the encoder's features and draws z from it."""

    def __init__(self, hidden_size: int, latent_size: int):
        super().__init__()
        self.mu = nn.Linear(hidden_size, latent_size)
        self.logvar = nn.Linear(hidden_size, latent_size)

    def posterior(self, hidden: Tensor) -> DiagonalNormal:
        """(B, hidden_size) -> q(z|x).

        logvar is capped, because one outlier could overflow exp(logvar) and end training.
        """
        weight = torch.cat([self.mu.weight, self.logvar.weight])  # one product is faster than two
        bias = torch.cat([self.mu.bias, self.logvar.bias])
        mu, logvar = F.linear(hidden, weight, bias).chunk(2, -1)
        return DiagonalNormal(mu, logvar.clamp(max=10))

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, hidden_size) -> z, logvar, mu, each (B, latent_size)."""
        q = self.posterior(hidden)
        return q.rsample(), q.logvar, q.mu


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
        """(..., latent_size) -> the log-odds of the probabilities, (..., input_size). Losses use these."""
        *hidden_layers, output_layer = self.children()
        for layer in hidden_layers:
            z = self.activation(layer(z))
        return output_layer(z)

    def forward(self, z: Tensor) -> Tensor:
        """(..., latent_size) -> pixel probabilities (..., input_size)."""
        return torch.sigmoid(self.logits(z))


class VAE(nn.Module):
    """Encoder, LatentZ and Decoder, and the three distributions that they parameterize.

    `config` holds the arguments, so VAE(**vae.config) builds the same model. For other networks, assign modules to
    self.encoder, (B, input_size) -> (B, hidden_size), and self.decoder, whose method logits maps (..., latent_size) to
    (..., input_size). For other distributions, override posterior, prior or likelihood. encode returns z, logvar, mu
    and forward x_hat, logvar, mu, z: the order of the repository that this one grew from.
    """

    def __init__(
        self,
        input_size: int = 784,
        hidden_size: int = 512,
        latent_size: int = 20,
        encoder_layers: int = 2,
        decoder_layers: int = 1,
        activation: str = "relu",
        likelihood: str = "bernoulli",
        channels: int = 1,
    ):
        """likelihood is one of LIKELIHOODS; the logistic has one scale for each of the images' channels.

        Raises ValueError for a size that is not a positive integer, or an unknown name.
        """
        super().__init__()
        sizes = {
            "input_size": input_size,
            "hidden_size": hidden_size,
            "latent_size": latent_size,
            "encoder_layers": encoder_layers,
            "decoder_layers": decoder_layers,
            "channels": channels,
        }
        for name, size in sizes.items():
            if not (type(size) is int and size > 0):
                raise ValueError(f"{name} must be a positive integer, not {size!r}")
        if input_size % channels:
            raise ValueError(f"input_size must be a multiple of channels, not {input_size} for {channels} channels")
        names = {"activation": (activation, ACTIVATIONS), "likelihood": (likelihood, LIKELIHOODS)}
        for name, (value, choices) in names.items():
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
        self.config = sizes | {"activation": activation, "likelihood": likelihood}
        self.encoder = Encoder(input_size, hidden_size, encoder_layers, activation)
        self.latent_z = LatentZ(hidden_size, latent_size)
        self.decoder = Decoder(latent_size, hidden_size, input_size, decoder_layers, activation)
        if likelihood == "logistic":
            self.log_scale = nn.Parameter(torch.full((channels,), -2.0))

    @classmethod
    def for_data(cls, dataset: Any, options: Any, **more: Any) -> "VAE":
        """The model that `python train.py` trains on a data set. `more` are further arguments.

        dataset (data.ImageData) has the images' input_size and shape, options (options.Options) the other sizes.
        Override it if the model needs more than sizes.
        """
        return cls(dataset.input_size, channels=dataset.shape[0], **options.sizes, **more)

    # The three distributions

    def posterior(self, x: Tensor, y: Tensor | None = None) -> Distribution:
        """q(z|x) of images (B, ...) in [0, 1], with labels y (B,)."""
        return self.latent_z.posterior(self.encoder(x.flatten(1)))

    def prior(self, y: Tensor | None = None) -> Distribution:
        """p(z): one distribution, or B of them where it depends on the labels y (B,)."""
        zeros = next(self.parameters()).new_zeros(self.config["latent_size"])
        return DiagonalNormal(zeros, zeros)

    def likelihood(self, z: Tensor, y: Tensor | None = None) -> Distribution:
        """p(x|z) over flat images (..., input_size), of z (..., latent_size) with labels y (B,).

        z is (B, latent_size), or (K, B, latent_size) with K samples for each image. The logistic's location is linear
        in the decoder's output, with the slope of the sigmoid at 0, so that it can lie beyond 0 and 1.
        """
        logits = _at_least_float32(self.decoder.logits(z))
        if self.config["likelihood"] == "bernoulli":
            return BernoulliPixels(logits)
        log_scale = self.log_scale.repeat_interleave(logits.shape[-1] // len(self.log_scale))
        return Independent(DiscretizedLogistic(0.5 + 0.25 * logits, log_scale), 1, validate_args=False)

    # What follows from them

    def elbo_terms(self, x: Tensor, targets: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The negative ELBO's two terms, from one draw of z: -log p(targets|z) and the KL, each (B,) (eq. 3).

        The encoder sees x (B, ...); the likelihood is evaluated at targets (B, ...). Their sum is the negative ELBO,
        and reconstruction + beta * kl weighs the KL (Higgins et al. 2017). With the default likelihood, the first term
        is the binary cross-entropy, computed from logits so that no probability rounds to 0 or 1.
        """
        q = self.posterior(self.check(x), y)
        p = self.prior(y)
        z = q.rsample()
        reconstruction = -self.likelihood(z, y).log_prob(targets.flatten(1))
        return reconstruction, kl_divergence(q, p, z)

    def loss(
        self, inputs: Tensor, targets: Tensor, y: Tensor | None = None, kl_weight: float | Tensor = 1.0
    ) -> tuple[Tensor, Tensor]:
        """What training minimizes, and the negative ELBO, which it prints: each (B,), in nats.

        Override it for another objective. kl_weight follows the schedule of --beta and --kl-warmup. With --objective
        iwae, iwae_loss is minimized instead.
        """
        reconstruction, kl = self.elbo_terms(inputs, targets, y)
        return reconstruction + kl_weight * kl, reconstruction + kl

    def iwae_loss(self, inputs: Tensor, targets: Tensor, y: Tensor | None, num_samples: int) -> tuple[Tensor, Tensor]:
        """What the importance weighted autoencoder minimizes (Burda et al. 2016, eq. 8), and the negative ELBO.

        Each is (B,), in nats, of num_samples draws of z for each image.
        """
        q = self.posterior(self.check(inputs), y)
        p = self.prior(y)
        log_weights = self.log_weight(q, p, q.rsample((num_samples,)), targets, y)
        return nll_from_log_weights(log_weights), -log_weights.mean(0)

    def log_weight(
        self, q: Distribution, p: Distribution, z: Tensor, targets: Tensor, y: Tensor | None = None
    ) -> Tensor:
        """log p(targets|z) + log p(z) - log q(z|x) for z (..., B, latent_size): (..., B), in nats.

        q is the images' posterior, p the prior, and targets are (B, ...). For draws of q, these are the logarithms of
        the importance weights (Burda et al. 2016, arXiv 1509.00519, eq. 8).
        """
        return self.likelihood(z, y).log_prob(targets.flatten(1)) + p.log_prob(z) - q.log_prob(z)

    def encode(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor | None, Tensor]:
        """(B, ...) images in [0, 1] -> z, logvar, mu, each (B, latent_size), with z drawn from q(z|x).

        mu is the mean of q(z|x), and logvar is None unless that is a DiagonalNormal. Raises ValueError for images of
        another size, or with values that are not floats in [0, 1].
        """
        q = self.posterior(self.check(x), y)
        return q.rsample(), getattr(q, "logvar", None), q.mean

    def decode(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """(..., latent_size) -> the pixels' means (..., input_size): for Bernoullis, their probabilities."""
        return self.likelihood(z.to(next(self.parameters()).dtype), y).mean

    def forward(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """(B, ...) images in [0, 1] -> x_hat (B, input_size), and logvar, mu, z as encode returns them."""
        z, logvar, mu = self.encode(x, y)
        return self.decode(z, y), logvar, mu, z

    @torch.no_grad()
    def reconstruct(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Images -> the pixels' means, of the same shape, decoded from the mean of q(z|x)."""
        return self.decode(self.posterior(self.check(x), y).mean, y).view(x.shape)

    @torch.no_grad()
    def sample(self, n: int, y: Tensor | None = None) -> Tensor:
        """The pixels' means (n, input_size), decoded from n draws of the prior, for labels y (n,)."""
        p = self.prior(y)
        return self.decode(p.sample(() if p.batch_shape else (n,)), y)

    @torch.no_grad()
    def complete(
        self, x: Tensor, seen: Tensor, y: Tensor | None = None, steps: int = 100, draw_pixels: bool = False
    ) -> Tensor:
        """Images x (B, ...) whose pixels that are not seen are filled in, given the others: of the same shape.

        seen is bool, of x's shape or one that expands to it. What is filled in are the pixels' means, for a draw of z
        from p(z | seen pixels), or drawn pixels. Metropolis within Gibbs (Mattei & Frellsen 2018, arXiv 1802.04826)
        draws z and the unseen pixels in turn, and converges to their exact distribution. Its first half accepts every
        proposal (Rezende et al. 2014, arXiv 1401.4082, appendix F), which finds a likely z sooner. Pixels must be
        independent given z. Raises NotImplementedError if the likelihood has no method sample.
        """
        x = torch.where(seen, self.check(x), self.sample(len(x), y).view(x.shape))
        p = self.prior(y)
        z = None
        for step in range(steps):
            q = self.posterior(x, y)
            proposal = q.rsample()
            if step < max(1, steps // 2):
                z = proposal
            else:
                ratio = self.log_weight(q, p, proposal, x, y) - self.log_weight(q, p, z, x, y)
                is_accepted = torch.rand_like(ratio).log() < ratio
                z = torch.where(is_accepted[:, None], proposal, z)
            likelihood = self.likelihood(z, y)
            x = torch.where(seen, x, likelihood.sample().view(x.shape))
        return x if draw_pixels else torch.where(seen, x, likelihood.mean.view(x.shape))

    def check(self, x: Tensor) -> Tensor:
        """Returns x in the weights' type, or raises ValueError unless it holds images of this model's size.

        Values are checked only on the CPU and uncompiled, where that costs next to nothing.
        """
        size = self.config["input_size"]
        if x.dim() < 2 or math.prod(x.shape[1:]) != size or not x.is_floating_point():
            raise ValueError(
                f"expected floats of shape (B, ...) with {size} values for each image, got {x.dtype} {tuple(x.shape)}"
            )
        if not torch.compiler.is_compiling() and x.device.type == "cpu" and x.numel():
            with contextlib.suppress(RuntimeError):  # within torch.func.vmap, tensors have no values to look at
                low, high = (value.item() for value in x.detach().aminmax())
                if not 0 <= low <= high <= 1:
                    raise ValueError(f"expected images with values in [0, 1], got values from {low:g} to {high:g}")
        return x.to(next(self.parameters()).dtype)


def loss_criterion(inputs: Tensor, targets: Tensor, logvar: Tensor, mu: Tensor) -> Tensor:
    """The negative ELBO (eq. 10) from pixel probabilities: binary cross-entropy + KL, summed, never averaged.

    For loops of your own; train.py uses VAE.elbo_terms, which computes the same from logits. inputs (B, D) as the
    decoder returns them, targets (B, ...) in [0, 1] with D values for each image, logvar and mu (B, latent_size) -> a
    scalar, in nats for the whole batch. Averaging the cross-entropy over the pixels would make the KL D times too
    heavy, and every reconstruction the same blob.
    """
    inputs, logvar, mu = map(_at_least_float32, (inputs, logvar, mu))
    bce = F.binary_cross_entropy(inputs, targets.reshape(inputs.shape).to(inputs.dtype), reduction="sum")
    return bce - 0.5 * torch.sum(1 + logvar - mu**2 - logvar.exp())


def kl_by_latent(q: Distribution, p: Distribution) -> Tensor | None:
    """KL(q || p) in closed form (appendix B) for each latent dimension: (..., latent_size), in nats.

    None unless both are DiagonalNormal. For p = N(0, I) it is -1/2 (1 + logvar - mu^2 - exp(logvar)).
    """
    if not type(q) is type(p) is DiagonalNormal:
        return None
    log_ratio = q.logvar - p.logvar  # expm1 is exact near 0
    return 0.5 * (torch.expm1(log_ratio) - log_ratio + (q.mu - p.mu) ** 2 * torch.exp(-p.logvar))


def kl_divergence(q: Distribution, p: Distribution, z: Tensor) -> Tensor:
    """KL(q || p), (...), in nats: in closed form, or else estimated from the draw z of q, (..., latent_size)."""
    by_latent = kl_by_latent(q, p)
    return q.log_prob(z) - p.log_prob(z) if by_latent is None else by_latent.sum(-1)


def nll_from_log_weights(log_weights: Tensor) -> Tensor:
    """The estimate of -log p(x) from K importance weights for each image: (K, B) -> (B,), in nats.

    In expectation it is an upper bound: the negative ELBO at K = 1, and tighter as K grows (Burda et al. 2016, theorem
    1). The IWAE minimizes it.
    """
    return math.log(log_weights.shape[0]) - log_weights.logsumexp(0)


def _log_sigmoid(x: Tensor) -> Tensor:
    """-log(1 + exp(-x)) to 1e-7. F.logsigmoid is closer near 0, but several times slower on a CPU, because of log1p."""
    return 0.5 * (x - x.abs()) + torch.log(torch.sigmoid(x.abs()))


def _at_least_float32(x: Tensor) -> Tensor:
    """x in at least float32, because sums over pixels need more than the 8 bits of bfloat16."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
