"""How far the nll of evaluate.py, by importance sampling, is above the truth: annealed importance sampling beside it.

    python benchmarks/ais.py                          # the newest run in runs/
    python benchmarks/ais.py runs/001-mnist-z20 --images 100 --chains 16 --temperatures 500

Importance sampling draws z from q(z|x) and weighs it. Annealed importance sampling (Neal 2001, arXiv physics/9803008;
Wu et al. 2017, arXiv 1611.04273, for decoders) takes each draw from q(z|x) to p(z|x) in many small steps, a Hamiltonian
transition and a weight each. Its -log p(x) is an upper bound in expectation too, but a far tighter one. Of images that
the model drew itself, a z from p(z|x) is known, and the same steps backwards give a lower bound (bidirectional Monte
Carlo, section 3 of Wu et al.): the truth is in between.
"""

import math
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import Tensor
from tqdm import tqdm

import evaluate
import utils
from data import binarize_test_set, load_dataset
from model import VAE, log_standard_normal

Densities = Callable[[Tensor], tuple[Tensor, Tensor]]  # eps (K, B, latent) -> log densities of both ends, each (K, B)


def densities(model: VAE, targets: Tensor, logvar: Tensor, mu: Tensor) -> Densities:
    """Of eps, where z = mu + std * eps: log N(eps; 0, I), which is q(z|x), and log p(x, z) + log |dz / deps|."""

    def both(eps: Tensor) -> tuple[Tensor, Tensor]:
        z = mu + torch.exp(0.5 * logvar) * eps
        log_joint = model.log_likelihood(model.outputs(z), targets) + model.log_prior(z)
        return log_standard_normal(eps), log_joint + 0.5 * logvar.sum(-1)

    return both


def transition(both: Densities, eps: Tensor, beta: float, step: Tensor, leaps: int = 10) -> tuple[Tensor, Tensor]:
    """One of Hamiltonian Monte Carlo that leaves start^(1 - beta) end^beta as it is (Neal 2011, arXiv 1206.1901).

    eps (K, B, latent), step (B,), the size of a leap -> the new eps, and whether each chain moved (K, B).
    """

    def value_and_gradient(eps: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            eps = eps.detach().requires_grad_()
            start, end = both(eps)
            value = torch.lerp(start, end, beta)
            return value.detach(), torch.autograd.grad(value.sum(), eps)[0]

    step = step[:, None]
    value, gradient = value_and_gradient(eps)
    momentum = torch.randn_like(eps)
    before = value + log_standard_normal(momentum)
    proposed = eps
    for _ in range(leaps):
        momentum = momentum + 0.5 * step * gradient
        proposed = proposed + step * momentum
        value, gradient = value_and_gradient(proposed)
        momentum = momentum + 0.5 * step * gradient
    is_accepted = torch.rand_like(before).log() < value + log_standard_normal(momentum) - before
    return torch.where(is_accepted[..., None], proposed, eps), is_accepted


@torch.no_grad()
def anneal(both: Densities, eps: Tensor, betas: list[float], steps: list[Tensor] | None = None) -> tuple:
    """Takes chains eps (K, B, latent) from the first of betas to the last -> their log weights (K, B), and the steps.

    `steps` are the sizes of leaps (B,) at each beta between them. Without any they are tuned on the way, so that two of
    three proposals are accepted; weights are exact with steps that were fixed before.
    """
    tuned, log_weights = [torch.full_like(eps[0, :, 0], 0.3)], torch.zeros_like(eps[..., 0])
    for i in tqdm(range(1, len(betas)), unit=" temperatures", leave=False, disable=None):
        start, end = both(eps)
        log_weights += (betas[i] - betas[i - 1]) * (end - start)
        if i < len(betas) - 1:
            step = steps[i - 1] if steps else tuned[-1]
            eps, is_accepted = transition(both, eps, betas[i], step)
            tuned.append((step * torch.exp(0.2 * (is_accepted.float().mean(0) - 2 / 3))).clamp(1e-3, 1))
    return log_weights, tuned[:-1]


def compare(model: VAE, inputs: Tensor, targets: Tensor, chains: int, temperatures: int, z: Tensor | None) -> dict:
    """-log p(x) of each image (B,) by each method: inputs and targets (B, D), and z (B, latent) of p(z|x), if known."""
    logvar, mu = evaluate.posteriors(model, inputs)
    both = densities(model, targets, logvar, mu)
    betas = [i / temperatures for i in range(temperatures + 1)]
    eps = torch.randn(chains, *mu.shape, device=mu.device)
    _, steps = anneal(both, torch.randn_like(eps[:4]), betas)
    log_weights, _ = anneal(both, eps, betas, steps)
    nll = {
        "importance sampling, 5,000 samples": evaluate.estimate_nll(model, inputs, targets, num_samples=5000),
        "annealed importance sampling": math.log(chains) - log_weights.logsumexp(0),
    }
    if z is not None:
        eps = ((z - mu) * torch.exp(-0.5 * logvar)).expand(chains, *mu.shape)
        log_weights, _ = anneal(both, eps, betas[::-1], steps[::-1])
        nll["the same backwards, a lower bound"] = log_weights.logsumexp(0) - math.log(chains)
    return nll


@utils.command
def main() -> None:
    parser = utils.ArgumentParser(description=__doc__)
    parser.add_argument("run", nargs="?", default="runs", help="run folder or checkpoint (default: the newest run)")
    for name, default in {"images": 100, "chains": 16, "temperatures": 500}.items():
        parser.add_argument(f"--{name}", type=utils.count, default=default, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--data-dir", default="data", metavar="DIR", help="(default: %(default)s)")
    parser.add_argument("--device", choices=utils.DEVICES, default="auto", help="(default: %(default)s)")
    args = parser.parse_args()
    device = utils.choose_device(args.device)
    model, checkpoint = utils.load_checkpoint(args.run)
    options = {"dataset": "auto", "binarize": "dynamic", "hold_out": 0} | checkpoint.get("options", {})
    dataset = load_dataset(options["dataset"], args.data_dir, options.get("image_size"), options["hold_out"])
    evaluate.check_images(model, dataset)
    inputs, targets = binarize_test_set(dataset.test_images[: args.images].to(device), options["binarize"])
    if not model.to(device).is_likelihood(targets):
        raise utils.UserError("the model has no likelihood of the targets that it was trained on")
    torch.manual_seed(0)
    z = model.sample_prior(args.images)
    drawn = model.decode(z).bernoulli()
    for name, (x, target, known) in {
        "test images": (inputs, targets, None),
        "images drawn from the model": (drawn, drawn, z),
    }.items():
        nll = compare(model, x, target, args.chains, args.temperatures, known)
        print(f"{len(x)} {name}, -log p(x) in nats per image")
        first = next(iter(nll.values()))
        for method, values in nll.items():
            error = (first - values).std().item() / math.sqrt(len(values))
            below = f"  {(first - values).mean():.3f} lower, standard error {error:.3f}" if values is not first else ""
            print(f"  {method:36s}{values.mean():8.3f}{below}")


if __name__ == "__main__":
    main()
