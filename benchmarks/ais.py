"""Measures how far evaluate.py's nll is above the truth, by annealed importance sampling.

    python benchmarks/ais.py                          # the newest run in runs/
    python benchmarks/ais.py runs/001-mnist-z20 --images 100 --chains 16 --temperatures 500

Importance sampling draws z from q(z|x) and weighs it. Annealed importance sampling (Neal 2001, arXiv physics/9803008;
Wu et al. 2017, arXiv 1611.04273, for decoders) takes each draw from q(z|x) to p(z|x) in many small steps, a Hamiltonian
transition and a weight each. Its -log p(x) is an upper bound in expectation too, but a far tighter one. For images that
the model drew itself, a z from p(z|x) is known, and the same steps backwards give a lower bound (bidirectional Monte
Carlo, section 3 of Wu et al.). The truth is in between.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import Tensor
from tqdm import tqdm

import evaluate
import measure
import utils
from measure import TestSet
from model import VAE, DiagonalNormal, nll_from_log_weights

Densities = Callable[[Tensor], tuple[Tensor, Tensor]]  # eps (K, B, latent) -> log densities of both ends, each (K, B)


def densities(model: VAE, q: DiagonalNormal, targets: Tensor) -> Densities:
    """Of eps, where z = mu + std * eps: log N(eps; 0, I), for q(z|x), and log p(x, z) + log |dz / deps|."""
    p, standard = model.prior(), DiagonalNormal(torch.zeros_like(q.mu), torch.zeros_like(q.mu))

    def both(eps: Tensor) -> tuple[Tensor, Tensor]:
        z = q.mu + torch.exp(0.5 * q.logvar) * eps
        log_joint = model.likelihood(z).log_prob(targets.flatten(1)) + p.log_prob(z)
        return standard.log_prob(eps), log_joint + 0.5 * q.logvar.sum(-1)

    return both


def transition(both: Densities, eps: Tensor, beta: float, step: Tensor, leaps: int = 10) -> tuple[Tensor, Tensor]:
    """A step of Hamiltonian Monte Carlo, which leaves start^(1 - beta) end^beta as it is (Neal 2011, arXiv 1206.1901).

    eps (K, B, latent) and the size of a leap, step (B,) -> the new eps, and whether each chain moved (K, B).
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
    before = value - 0.5 * momentum.square().sum(-1)
    proposed = eps
    for _ in range(leaps):
        momentum = momentum + 0.5 * step * gradient
        proposed = proposed + step * momentum
        value, gradient = value_and_gradient(proposed)
        momentum = momentum + 0.5 * step * gradient
    is_accepted = torch.rand_like(before).log() < value - 0.5 * momentum.square().sum(-1) - before
    return torch.where(is_accepted[..., None], proposed, eps), is_accepted


@torch.no_grad()
def anneal(both: Densities, eps: Tensor, betas: list[float], steps: list[Tensor] | None = None) -> tuple:
    """Takes chains eps (K, B, latent) from the first of betas to the last -> their log weights (K, B), and the steps.

    `steps` holds the size of a leap (B,) at each beta between them. Without it, sizes are tuned on the way so that two
    of three proposals are accepted, but the weights are exact only with sizes that were fixed before.
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


@measure.in_eval_mode
def compare(model: VAE, test_set: TestSet, chains: int, temperatures: int, z: Tensor | None) -> dict[str, Tensor]:
    """Estimates -log p(x) of each image by each method: (B,). z (B, latent), if known, is a draw of p(z|x).

    Raises UserError unless q(z|x) is a DiagonalNormal.
    """
    q = model.posterior(test_set.inputs)
    if not isinstance(q, DiagonalNormal):
        raise utils.UserError(f"q(z|x) must be a DiagonalNormal, not {type(q).__name__}")
    both = densities(model, q, test_set.targets)
    betas = [i / temperatures for i in range(temperatures + 1)]
    eps = torch.randn(chains, *q.mu.shape, device=q.mu.device)
    _, steps = anneal(both, torch.randn_like(eps[:4]), betas)
    log_weights, _ = anneal(both, eps, betas, steps)
    nll = {
        "importance sampling, 5,000 samples": measure.estimate_nll(model, test_set, num_samples=5000)[0],
        "annealed importance sampling": nll_from_log_weights(log_weights),
    }
    if z is not None:
        eps = ((z - q.mu) * torch.exp(-0.5 * q.logvar)).expand(eps.shape)
        log_weights, _ = anneal(both, eps, betas[::-1], steps[::-1])
        nll["the same backwards, a lower bound"] = -nll_from_log_weights(log_weights)
    return nll


@utils.command
def main() -> None:
    parser = utils.ArgumentParser(description=__doc__)
    parser.add_argument("run", nargs="?", default="runs", help="run folder, checkpoint file, or folder of runs")
    sizes = {"images": (100, "of each kind"), "chains": (16, "for each image"), "temperatures": (500, "of each chain")}
    for name, (default, what) in sizes.items():
        parser.add_argument(f"--{name}", type=utils.count, default=default, metavar="N", help=what)
    parser.add_argument("--data-dir", default="data", metavar="DIR", help="where data sets are read and downloaded")
    parser.add_argument("--device", choices=utils.DEVICES, default="auto", help="where to compute")
    args = parser.parse_args()
    device = utils.choose_device(args.device)
    opened = evaluate.open_run(args.run, device=args.device)
    model = opened.model
    dataset = opened.test_data(data_dir=args.data_dir)
    test_set = measure.make_test_set(dataset, opened.binarize, device).take(slice(args.images))
    if not measure.is_likelihood(model, test_set):
        raise utils.UserError("the model has no likelihood of the targets that it was trained on")
    torch.manual_seed(0)
    with torch.no_grad():
        z = model.prior().sample((len(test_set.inputs),))
        drawn = model.likelihood(z).sample()
    for name, images, known in (
        ("test images", test_set, None),
        ("images drawn from the model", replace(test_set, inputs=drawn, targets=drawn), z),
    ):
        nll = compare(model, images, args.chains, args.temperatures, known)
        print(f"{len(images.inputs)} {name}, -log p(x) in nats per image")
        first = next(iter(nll.values()))
        for method, values in nll.items():
            error = (first - values).std().item() / math.sqrt(len(values))
            below = f"  {(first - values).mean():.3f} lower, standard error {error:.3f}" if values is not first else ""
            print(f"  {method:36s}{values.mean():8.3f}{below}")


if __name__ == "__main__":
    main()
