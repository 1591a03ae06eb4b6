"""Metrics of a trained VAE, in nats per image."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.nn.parameter import is_lazy
from tqdm import tqdm

from data import ImageData, check_bytes, inputs_and_targets
from model import VAE, LatentZ, kl_by_latent, kl_divergence
from step import (
    Outcome,
    choose_precision,
    compile_checked,
    is_worth_compiling,
    matmul_precision,
    no_validation,
    try_out,
    warn_slower,
)
from utils import UserError, one_line

NLL_SAMPLES = 100
# How many images and samples nll takes at once: on a CPU, logits that fit its cache; on a GPU, enough to fill it
BLOCKS = {"cpu": (50, 20), "mps": (50, 20), "cuda": (1000, 100)}


@dataclass(frozen=True)
class TestSet:
    """Images to test a model on, in one fixed binarization, and what pictures say about them."""

    inputs: Tensor  # (N, C, H, W) in [0, 1], for the encoder
    targets: Tensor  # of the same shape, for the likelihood
    labels: Tensor  # (N,) int64
    images: Tensor  # (N, C, H, W) uint8, as they were before
    binarize: str
    classes: Sequence[str] = ()  # the labels' names

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        return tuple(self.inputs.shape[1:])

    def take(self, chosen: Any) -> "TestSet":
        """The images that an index, a list of them or a slice chooses."""
        names = ("inputs", "targets", "labels", "images")
        return replace(self, **{name: getattr(self, name)[chosen] for name in names})

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Inputs, targets and labels, `size` images at a time."""
        return zip(self.inputs.split(size), self.targets.split(size), self.labels.split(size), strict=True)


def make_test_set(dataset: ImageData, binarize: str, device: torch.device | str = "cpu") -> TestSet:
    """The test images of a data set."""
    images = dataset.test_images.to(device)
    labels = dataset.test_labels.to(device)
    return to_test_set(images, labels, binarize, dataset.classes)


def to_test_set(images: Tensor, labels: Tensor, binarize: str, classes: Sequence[str] = ()) -> TestSet:
    """Images (N, C, H, W) uint8 and labels (N,). Their binarization is the same in every run and on every device."""
    generator = torch.Generator().manual_seed(0)
    inputs, targets = (part.to(images.device) for part in inputs_and_targets(images.cpu(), binarize, generator))
    return TestSet(inputs, targets, labels, images, binarize, classes)


def usual_binarize(model: VAE) -> str:
    """How images become targets for the model's likelihood: dynamic for Bernoulli pixels, else none."""
    return "dynamic" if model.config["likelihood"] == "bernoulli" else "none"


def in_eval_mode(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a function of a model: runs it in eval mode without gradients, and restores every module's mode.

    Distributions check no arguments meanwhile.
    """

    @functools.wraps(function)
    def wrapped(model: VAE, *args: Any, **kwargs: Any) -> Any:
        modes = {module: module.training for module in model.modules()}
        model.eval()
        try:
            with torch.no_grad(), no_validation():
                return function(model, *args, **kwargs)
        finally:
            for module, mode in modes.items():
                module.training = mode

    return wrapped


class PerImage(NamedTuple):
    """What a model says about each of N images. Losses are in nats."""

    mu: Tensor  # (N, latent_size), the mean of q(z|x)
    logvar: Tensor | None  # of the same shape, if q(z|x) is a DiagonalNormal
    kl_by_latent: Tensor | None  # of the same shape, if the KL has a closed form for each latent
    reconstruction: Tensor  # (N,), with one draw of z
    kl: Tensor  # (N,)
    nll: Tensor | None = None  # (N,), if the model has a likelihood of the targets
    effective_samples: Tensor | None = None  # (N,), of the importance samples behind nll

    @property
    def neg_elbo(self) -> Tensor:
        """(N,)."""
        return self.reconstruction + self.kl


@in_eval_mode
def encode(model: VAE, test_set: TestSet, batch_size: int = 1000) -> PerImage:
    """The posterior of each image and the negative ELBO's two terms, with one draw of z."""
    parts = []
    for inputs, targets, y in test_set.batches(batch_size):
        q = model.posterior(model.check(inputs), y)
        p = model.prior(y)
        z = q.rsample()
        reconstruction = -model.likelihood(z, y).log_prob(targets.flatten(1))
        kl = kl_divergence(q, p, z)
        parts.append(PerImage(q.mean, getattr(q, "logvar", None), kl_by_latent(q, p), reconstruction, kl))
    return concatenate(parts)


def concatenate(parts: list[PerImage]) -> PerImage:
    """Joins what is known about several groups of images. A figure that one of them lacks is None."""
    columns = zip(*parts, strict=True)
    return PerImage(*(None if any(part is None for part in column) else torch.cat(column) for column in columns))


@in_eval_mode
def estimate_nll(model: VAE, test_set: TestSet, num_samples: int = NLL_SAMPLES, seed: int = 0) -> tuple[Tensor, Tensor]:
    """-log p(target) by importance sampling from q(z|input) (Burda et al. 2016, eq. 8): (N,) nats. Reseeds PyTorch.

    Also returns the effective number of samples (N,), (sum of weights)^2 / sum of squared weights (Kong 1992): from 1,
    where one weight outweighs all others and nll is too high, to num_samples.
    """
    torch.empty(30 * 2**18)  # after 30 MB are freed, glibc no longer returns memory that is about to be needed again
    device = test_set.inputs.device
    batch_size, samples = BLOCKS[device.type]
    batches = list(test_set.batches(batch_size))
    log_sums = []
    with matmul_precision(nll_precision(model, test_set), device):
        weigh = make_weigh(model, test_set, num_samples)
        torch.manual_seed(seed)
        for inputs, targets, y in tqdm(batches, desc="nll", unit=" batches", leave=False, disable=None):
            q = model.posterior(model.check(inputs), y)
            p = model.prior(y)
            total = torch.tensor(-math.inf, device=device)
            for start in range(0, num_samples, samples):
                n = min(samples, num_samples - start)
                if n == samples and len(y) == batch_size:
                    block = weigh(q, p, targets, y)
                else:
                    block = sum_weights(model.log_weight(q, p, q.rsample((n,)), targets, y))
                total = torch.logaddexp(total, block)
            log_sums.append(total)
    log_sum, log_sum_of_squares = torch.cat(log_sums, 1)
    return math.log(num_samples) - log_sum, torch.exp(2 * log_sum - log_sum_of_squares)


def sum_weights(log_weights: Tensor) -> Tensor:
    """The logarithms of the sum of weights (K, B) and of the sum of their squares: (2, B)."""
    return torch.stack([log_weights.logsumexp(0), (2 * log_weights).logsumexp(0)])


def make_weigh(model: VAE, test_set: TestSet, num_samples: int) -> Callable[..., Tensor]:
    """Returns weigh(q, p, targets, y), which does sum_weights of one block's weights. It is compiled if that pays.

    The model's weights must not change afterwards.
    """
    device = test_set.inputs.device
    batch_size, samples = BLOCKS[device.type]

    def weigh(q: Distribution, p: Distribution, targets: Tensor, y: Tensor) -> Tensor:
        return sum_weights(model.log_weight(q, p, q.rsample((samples,)), targets, y))

    blocks = len(test_set.labels) // batch_size * (num_samples // samples)
    if not is_worth_compiling(device, 1, blocks):
        return weigh
    inputs, targets, y = next(test_set.batches(batch_size))
    q = model.posterior(model.check(inputs), y)
    p = model.prior(y)

    def outcome(weigh: Callable[..., Tensor]) -> Outcome:
        return try_out(lambda: weigh(q, p, targets, y), [])

    return compile_checked(weigh, outcome, device, "nll", freeze=True) or weigh


def nll_precision(model: VAE, test_set: TestSet) -> str:
    """The precision of an estimate of nll's products."""
    device = test_set.inputs.device
    precision = choose_precision(device, math.prod(BLOCKS[device.type]), is_compiled=False)
    return possible_precision(model, next(test_set.batches(2)), precision)


@in_eval_mode
def possible_precision(model: VAE, batch: Sequence[Tensor], precision: str) -> str:
    """That precision, or "medium" after a warning if a distribution has an operation that bfloat16 lacks."""
    if precision == "bfloat16":
        device = next(model.parameters()).device
        inputs, targets, y = (part.to(device) for part in batch)
        try:
            with matmul_precision(precision, device):
                q = model.posterior(model.check(inputs), y)
                p = model.prior(y)
                model.log_weight(q, p, q.rsample((2,)), targets, y)
        except RuntimeError as error:
            if "bfloat16" not in str(error).lower():
                raise
            warn_slower("products are not of bfloat16", error)
            return "medium"
    return precision


@in_eval_mode
def is_likelihood(model: VAE, test_set: TestSet) -> bool:
    """Whether p(x|z) gives masses, which add up to 1, and all targets are in its support.

    A density is no likelihood of pixels, which have 256 levels. A Bernoulli is one of 0 and 1 but not of gray.
    """
    y = test_set.labels[:1]
    support = model.likelihood(model.posterior(model.check(test_set.inputs[:1]), y).mean, y).support
    return support.is_discrete and bool(support.check(test_set.targets.flatten(1)).all())


def is_active(means: Tensor, threshold: float = 0.01) -> Tensor:
    """(N, latent_size) posterior means -> (latent_size,): whether each varies over the images (Burda et al. 2016)."""
    return means.var(0, correction=0) > threshold


def standard_error(values: Tensor) -> float:
    """That of the mean of values (N,); 0 for one value."""
    return values.std(correction=min(1, len(values) - 1)).item() / math.sqrt(len(values))


def bits_per_dim(nats: float, num_values: int) -> float:
    """Nats per image -> bits per value (pixel and channel) of an image, which compares across sizes."""
    return nats / num_values / math.log(2)


def check_images(model: VAE, dataset: ImageData) -> None:
    """Raises UserError if the model is for images of another size."""
    expected = model.config["input_size"]
    if expected != dataset.input_size:
        raise UserError(
            f"the model is for other images: it expects {expected} values each, but those of {dataset.name} have "
            f"{dataset.input_size}"
        )


def example(dataset: ImageData, binarize: str) -> tuple[Tensor, Tensor, Tensor]:
    """A batch of two training images: inputs, targets and labels."""
    return *inputs_and_targets(dataset.train_images[:2], binarize), dataset.train_labels[:2]


def check_weights(model: VAE) -> None:
    """Raises UserError if a checkpoint could not restore the model's state, or if weights have a half precision."""
    name = type(model).__name__
    for key, value in model.state_dict().items():
        if not isinstance(value, Tensor) or is_lazy(value):
            raise UserError(f"{name}: {key} is not a tensor of a known size, so a checkpoint could not restore it")
        if value.dtype in (torch.bfloat16, torch.float16):
            raise UserError(f"{name} has weights of type {value.dtype}: call its method float() first")


@in_eval_mode
def check_model(model: VAE, dataset: ImageData, binarize: str) -> None:
    """Raises UserError if the model is for other images, or one of its distributions has a wrong shape."""
    check_images(model, dataset)
    check_weights(model)
    name = type(model).__name__
    if type(model).posterior is VAE.posterior and type(model.latent_z).forward is not LatentZ.forward:
        raise UserError(f"{name}: the KL would ignore what latent_z.forward does; override {name}.posterior instead")
    device = next(model.parameters()).device
    inputs, targets, y = (part.to(device) for part in example(dataset, binarize))
    targets = targets.flatten(1)
    try:
        q = model.posterior(model.check(inputs), y)
        p = model.prior(y)
        z = q.rsample((3,))
        likelihood = model.likelihood(z, y)
        found = {
            "posterior(x).log_prob(z)": (q.log_prob(z), (3, 2)),
            "posterior(x).mean": (q.mean, (2, z.shape[-1])),
            "prior().log_prob(z)": (p.log_prob(z), (3, 2)),
            "likelihood(z).log_prob(targets)": (likelihood.log_prob(targets), (3, 2)),
            "likelihood(z).mean": (likelihood.mean, (3, *targets.shape)),
            "sample(2)": (model.sample(2, y), targets.shape),
            "likelihood(z).support": (likelihood.support.check(targets), (2,)),
        }
    except (NotImplementedError, AttributeError) as error:
        raise UserError(f"{name}: a distribution lacks something: {one_line(error)}") from error
    for member, (value, shape) in found.items():
        if value.shape != shape:
            sizes = f"z of shape {tuple(z.shape)} and images of shape {tuple(targets.shape)}"
            raise UserError(f"{name}.{member} has shape {tuple(value.shape)}, not {shape}, for {sizes}")


def evaluate(
    model: VAE,
    images: Tensor | TestSet,
    binarize: str | None = None,
    nll_samples: int = NLL_SAMPLES,
    seed: int = 0,
    labels: Tensor | None = None,
) -> dict[str, Any]:
    """All metrics of a model on a TestSet, or on uint8 images (N, ...) and labels (N,) int64. Reseeds PyTorch.

    In nats per image. A name with _se is a standard error over the images, effective_samples is a median, and per_image
    is a PerImage. nll is None where is_likelihood is False. bits_per_dim, which is of nll, is None there and where
    targets are binarized. kl_per_latent is None without a closed form. binarize defaults to usual_binarize. Raises
    UserError for bad images.
    """
    if not isinstance(nll_samples, int) or nll_samples < 1:
        raise UserError(f"nll_samples must be a whole number, 1 or more, not {nll_samples}")
    check_weights(model)
    test_set = images if isinstance(images, TestSet) else test_set_for(model, images, labels, binarize)
    torch.manual_seed(seed)
    found = encode(model, test_set)
    num_images = len(found.kl)
    metrics = {
        "neg_elbo": found.neg_elbo.mean().item(),
        "neg_elbo_se": standard_error(found.neg_elbo),
        "reconstruction": found.reconstruction.mean().item(),
        "kl": found.kl.mean().item(),
        "kl_per_latent": None if found.kl_by_latent is None else found.kl_by_latent.mean(0).tolist(),
        "nll": None,
        "nll_se": None,
        "bits_per_dim": None,
        "nll_samples": nll_samples,
        "effective_samples": None,
        "active_units": int(is_active(found.mu).sum()),
        "latent_size": found.mu.shape[1],
        "num_images": num_images,
    }
    if is_likelihood(model, test_set):
        nll, effective_samples = estimate_nll(model, test_set, nll_samples, seed)
        found = found._replace(nll=nll, effective_samples=effective_samples)
        metrics["nll"] = nll.mean().item()
        metrics["nll_se"] = standard_error(nll)
        metrics["effective_samples"] = effective_samples.median().item()
        if test_set.binarize == "none":
            metrics["bits_per_dim"] = bits_per_dim(metrics["nll"], model.config["input_size"])
    return metrics | {"per_image": found}


def test_set_for(model: VAE, images: Tensor, labels: Tensor | None, binarize: str | None) -> TestSet:
    """The test set of images and labels for a model. Arguments and errors are evaluate's."""
    check_bytes(images, "images")
    size = model.config["input_size"]
    if images.dim() < 2 or len(images) == 0 or images[0].numel() != size:
        raise UserError(f"the images must be (N, ...) of {size} values each, not {tuple(images.shape)}")
    labels = torch.zeros(len(images), dtype=torch.int64) if labels is None else labels
    if not isinstance(labels, Tensor) or labels.shape != (len(images),) or labels.dtype != torch.int64:
        raise UserError(f"the labels must be a tensor ({len(images)},) of type int64, one for each image")
    device = next(model.parameters()).device
    return to_test_set(images.to(device), labels.to(device), binarize or usual_binarize(model))
