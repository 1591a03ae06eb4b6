"""Metrics of a trained VAE, in nats per image."""

import copy
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution
from tqdm import tqdm

from data import ImageData, binarize, binarize_test_set, check_bytes
from model import VAE, LatentZ, kl_by_latent
from step import Outcome, choose_precision, compile_checked, is_worth_compiling, matmul_precision, try_out
from utils import UserError, one_line, rank_and_ranks

NLL_SAMPLES = 100
# How many images and samples nll takes at once: on a CPU, logits that fit its cache; on a GPU, enough to fill it
BLOCKS = {"cpu": (50, 20), "mps": (50, 20), "cuda": (1000, 100)}


class Examples(NamedTuple):
    """Binarized images to test a model on, and their labels."""

    inputs: Tensor  # (N, C, H, W) in [0, 1], for the encoder
    targets: Tensor  # of the same shape, for the likelihood
    labels: Tensor  # (N,) int64


def make_test_set(dataset: ImageData, binarization: str, device: torch.device | str = "cpu") -> Examples:
    """The test images of a data set in their one fixed binarization."""
    images, labels = dataset.test_images.to(device), dataset.test_labels.to(device)
    return Examples(*binarize_test_set(images, binarization), labels)


def usual_binarization(model: VAE) -> str:
    """How images become targets for the model's likelihood: dynamic for Bernoulli pixels, else none."""
    return "dynamic" if model.config["likelihood"] == "bernoulli" else "none"


def in_eval_mode(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a function of a model: runs it in eval mode without gradients, and restores every module's mode."""

    @functools.wraps(function)
    def wrapped(model: VAE, *args: Any, **kwargs: Any) -> Any:
        modes = {module: module.training for module in model.modules()}
        model.eval()
        try:
            with torch.no_grad():
                return function(model, *args, **kwargs)
        finally:
            for module, mode in modes.items():
                module.training = mode

    return wrapped


@in_eval_mode
def elbo_terms(model: VAE, test_set: Examples, batch_size: int = 1000) -> tuple[Tensor, Tensor]:
    """The negative ELBO's terms, with one z for each image: reconstruction and KL, each (N,)."""
    batches = zip(*(part.split(batch_size) for part in test_set), strict=True)
    reconstructions, kls = zip(*(model.elbo_terms(*batch) for batch in batches), strict=True)
    return torch.cat(reconstructions), torch.cat(kls)


@in_eval_mode
def posterior_means(model: VAE, test_set: Examples, batch_size: int = 1000) -> tuple[Tensor, Tensor | None]:
    """The means of q(z|x) and the KL by latent, each (N, latent_size). The KL is None where it has no closed form."""
    means, kls = [], []
    for x, y in zip(test_set.inputs.split(batch_size), test_set.labels.split(batch_size), strict=True):
        q = model.posterior(x, y)
        means.append(q.mean)
        kls.append(kl_by_latent(q, model.prior(y)))
    return torch.cat(means), None if kls[0] is None else torch.cat(kls)


Weigh = Callable[[Distribution, Distribution, Tensor, Tensor], Tensor]  # q, p, targets, y -> log of the weights' sum


@in_eval_mode
def estimate_nll(
    model: VAE,
    test_set: Examples,
    num_samples: int = NLL_SAMPLES,
    seed: int = 0,
    weigh: Weigh | None = None,
) -> Tensor:
    """-log p(target) by importance sampling from q(z|input) (Burda et al. 2016, eq. 8): (N,) nats. Reseeds PyTorch.

    weigh is make_weigh's. By default, it is made here.
    """
    torch.manual_seed(seed)
    torch.empty(30 * 2**18)  # after 30 MB are freed, glibc no longer returns memory that is about to be needed again
    device, nll = test_set.inputs.device, []
    batch_size, samples = BLOCKS[device.type]
    weigh = weigh or make_weigh(model, test_set, len(test_set.labels), num_samples)
    batches = list(zip(*(part.split(batch_size) for part in test_set), strict=True))
    with matmul_precision(nll_precision(device), device):
        for inputs, targets, y in tqdm(batches, desc="nll", unit=" batches", leave=False, disable=None):
            q, p = model.posterior(inputs, y), model.prior(y)
            total = torch.tensor(-math.inf, device=device)  # the log of the sum of all weights so far
            for start in range(0, num_samples, samples):
                n = min(samples, num_samples - start)
                if n == samples and len(y) == batch_size:
                    some = weigh(q, p, targets, y)
                else:
                    some = model.log_importance_weights(q, p, targets, n, y).logsumexp(0)
                total = torch.logaddexp(total, some)
            nll.append(math.log(num_samples) - total)
    return torch.cat(nll)


@in_eval_mode
def make_weigh(model: VAE, test_set: Examples, num_images: int, num_samples: int) -> Weigh:
    """Returns the function that computes the log of the sum of a block's importance weights, compiled if that pays.

    test_set serves as the example, and num_images are to come. The model's weights must not change afterwards.
    """
    device = test_set.inputs.device
    batch_size, samples = BLOCKS[device.type]

    def weigh(q: Distribution, p: Distribution, targets: Tensor, y: Tensor) -> Tensor:
        return model.log_importance_weights(q, p, targets, samples, y).logsumexp(0)

    blocks = num_images // batch_size * (num_samples // samples)
    if not is_worth_compiling(device, 1, blocks):
        return weigh
    inputs, targets, y = (part[:batch_size] for part in test_set)
    with matmul_precision(nll_precision(device), device):
        q, p = model.posterior(inputs, y), model.prior(y)

        def outcome(weigh: Weigh) -> Outcome:
            return try_out(lambda: weigh(q, p, targets, y), [])

        return compile_checked(weigh, outcome, device, "nll", freeze=True) or weigh


def nll_precision(device: torch.device) -> str:
    """The precision of an estimate of nll's products."""
    return choose_precision(device, math.prod(BLOCKS[device.type]), is_compiled=False)


@in_eval_mode
def is_likelihood(model: VAE, test_set: Examples) -> bool:
    """Whether all targets are in the support of p(x|z). A Bernoulli's holds 0 and 1 but no gray."""
    likelihood = model.likelihood(model.posterior(test_set.inputs[:1], test_set.labels[:1]).mean, test_set.labels[:1])
    return bool(likelihood.support.check(test_set.targets.flatten(1)).all())


def is_active(means: Tensor, threshold: float = 0.01) -> Tensor:
    """(N, latent_size) posterior means -> (latent_size,): whether each varies over the images (Burda et al. 2016)."""
    return means.var(0) > threshold


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


@in_eval_mode
def check_model(model: VAE, dataset: ImageData, binarization: str, batch_size: int) -> None:
    """Raises UserError if the model is for other images, or one of its distributions has a wrong shape."""
    check_images(model, dataset)
    name = type(model).__name__
    if type(model).posterior is VAE.posterior and type(model.latent_z).forward is not LatentZ.forward:
        raise UserError(f"{name}: the KL would ignore what latent_z.forward does; override {name}.posterior instead")
    device = next(model.parameters()).device
    inputs, targets = (images.to(device) for images in binarize(dataset.train_images[:2], binarization))
    y = dataset.train_labels[:2].to(device)
    targets = targets.flatten(1)
    try:
        q, p = model.posterior(inputs, y), model.prior(y)
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
    ranks = rank_and_ranks()[1]
    if batch_size < ranks:
        raise UserError(f"--batch-size must be {ranks} or more, for as many processes, not {batch_size}")
    share = min(batch_size, len(dataset.train_images)) // ranks
    try:
        copy.deepcopy(model).train().elbo_terms(inputs[:share], targets[:share], y[:share])
    except ValueError as error:  # a normalization's
        reason = one_line(error)
        raise UserError(f"{name} cannot train on batches of {share}: {reason}. Try a larger --batch-size") from error


def evaluate(
    model: VAE,
    images: Tensor,
    binarize: str | None = None,
    nll_samples: int = NLL_SAMPLES,
    seed: int = 0,
    labels: Tensor | None = None,
) -> dict[str, Any]:
    """All metrics of a model on uint8 images (N, ...), with labels (N,) int64 if the model uses them. Reseeds PyTorch.

    In nats per image; a name with _se is a standard error over the images. nll and nll_per_image (N) are None where
    the targets are outside the likelihood's support, bits_per_dim (of nll) also where they are binarized, and
    kl_per_latent where a closed form is missing. binarize defaults to usual_binarization. Raises UserError for bad
    images.
    """
    check_bytes(images, "images")
    size = model.config["input_size"]
    if len(images) < 2 or images.dim() < 2 or images[0].numel() != size:
        raise UserError(f"the images must be two or more of {size} values each, not {tuple(images.shape)}")
    device = next(model.parameters()).device
    labels = torch.zeros(len(images), dtype=torch.int64) if labels is None else labels
    if not isinstance(labels, Tensor) or labels.shape != (len(images),) or labels.dtype != torch.int64:
        raise UserError(f"the labels must be a tensor ({len(images)},) of type int64, one for each image")
    binarize = binarize or usual_binarization(model)
    test_set = Examples(*binarize_test_set(images.to(device), binarize), labels.to(device))
    return compute_metrics(model, test_set, binarize, nll_samples, seed)


def compute_metrics(model: VAE, test_set: Examples, binarize: str, nll_samples: int, seed: int) -> dict[str, Any]:
    """What evaluate returns, of images that are binarized already."""
    if not isinstance(nll_samples, int) or nll_samples < 1:
        raise UserError(f"nll_samples must be a whole number, 1 or more, not {nll_samples}")
    torch.manual_seed(seed)
    reconstruction, kl = elbo_terms(model, test_set)
    means, by_latent = posterior_means(model, test_set)
    neg_elbo, num_images = reconstruction + kl, len(kl)
    nll = estimate_nll(model, test_set, nll_samples, seed) if is_likelihood(model, test_set) else None
    is_in_bits = nll is not None and binarize == "none"
    return {
        "neg_elbo": neg_elbo.mean().item(),
        "neg_elbo_se": neg_elbo.std().item() / math.sqrt(num_images),
        "reconstruction": reconstruction.mean().item(),
        "kl": kl.mean().item(),
        "kl_per_latent": None if by_latent is None else by_latent.mean(0).tolist(),
        "nll": None if nll is None else nll.mean().item(),
        "nll_se": None if nll is None else nll.std().item() / math.sqrt(num_images),
        "nll_per_image": None if nll is None else nll.tolist(),
        "bits_per_dim": bits_per_dim(nll.mean().item(), model.config["input_size"]) if is_in_bits else None,
        "nll_samples": nll_samples,
        "active_units": int(is_active(means).sum()),
        "latent_size": means.shape[1],
        "num_images": num_images,
    }


@in_eval_mode
def encode_images(
    model: VAE, images: Tensor, labels: Tensor, mode: str, nll_samples: int, seed: int = 0, batch_size: int = 1000
) -> dict[str, Tensor]:
    """mu and logvar (N, latent_size), and neg_elbo and nll (N,) in nats, of uint8 images (N, ...) binarized by mode.

    Leaves out logvar where the posterior has none, and nll where targets are outside the likelihood's support. Takes
    memory for the floats of one batch. Reseeds PyTorch.
    """
    device, generator, parts = next(model.parameters()).device, torch.Generator().manual_seed(0), []
    weigh = None
    for i, (batch, y) in enumerate(zip(images.split(batch_size), labels.split(batch_size), strict=True)):
        inputs, targets = binarize(batch.cpu(), mode, generator)
        examples = Examples(inputs.to(device), targets.to(device), y.to(device))
        nll = None
        if is_likelihood(model, examples):
            weigh = weigh or make_weigh(model, examples, len(images), nll_samples)
            nll = estimate_nll(model, examples, nll_samples, seed + i, weigh)
        q, (reconstruction, kl) = model.posterior(examples.inputs, examples.labels), elbo_terms(model, examples)
        part = {"mu": q.mean, "logvar": getattr(q, "logvar", None), "neg_elbo": reconstruction + kl, "nll": nll}
        parts.append({name: value.cpu() for name, value in part.items() if value is not None})
    names = [name for name in parts[0] if all(name in part for part in parts)]
    return {name: torch.cat([part[name] for part in parts]) for name in names}
