"""Pictures that are seen in part: what fills in the rest, against a sum over everything that it could be."""

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import evaluate
import measure
import pictures
from data import ImageData
from experiments.conditional import ConditionalVAE
from model import VAE
from tests.conftest import thinned

SEEN = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])
X = torch.tensor([[1.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
ROOT = Path(evaluate.__file__).parent


def sharpened(model: VAE) -> VAE:
    """The model with weights so large that its pixels depend on each other."""
    for layer in (model.decoder.fc1, model.decoder.fc2, model.latent_z.mu):
        nn.init.normal_(layer.weight, std=1.5)
    return model.eval()


@torch.no_grad()
def probabilities(model: VAE, y: Tensor) -> Tensor:
    """p(unseen | seen) of each of the 2^5 ways to fill in the unseen pixels of X, summed over a grid of z."""
    axis = torch.linspace(-7, 7, 141)
    z = torch.cartesian_prod(axis, axis)[:, None]
    log_joint = []
    for unseen in itertools.product((0.0, 1.0), repeat=5):
        x = X.clone()
        x[~SEEN] = torch.tensor(unseen)
        log_joint.append((model.likelihood(z, y).log_prob(x.flatten()) + model.prior(y).log_prob(z)).logsumexp(0))
    return torch.stack(log_joint).squeeze().softmax(0)


def test_what_is_filled_in_has_its_exact_distribution():
    torch.manual_seed(2)
    model, n = sharpened(ConditionalVAE(9, hidden_size=8, latent_size=2)), 10_000
    y = torch.full((n,), 3)
    filled = model.complete(X.expand(n, 1, 3, 3), SEEN, y, steps=150, draw_pixels=True)
    assert torch.equal(filled[..., SEEN], X[SEEN].expand(n, 1, 4))
    number = (filled[:, 0, ~SEEN] * 2.0 ** torch.arange(4, -1, -1)).sum(1).long()
    found = torch.bincount(number, minlength=32) / n
    expected = probabilities(model, y[:1])
    deviation = (expected * (1 - expected) / n).sqrt()
    assert ((found - expected).abs() < 5 * deviation + 2e-3).all()
    assert expected.max() < 0.9  # so there is something to get wrong


def test_means_are_filled_in_by_default_and_all_seen_is_unchanged():
    torch.manual_seed(0)
    model, x = VAE(9, 8, 2), torch.rand(5, 1, 3, 3).round()
    filled = model.complete(x, SEEN, steps=3)
    assert torch.equal(filled[..., SEEN], x[..., SEEN])
    assert ((filled[..., ~SEEN] > 0) & (filled[..., ~SEEN] < 1)).all()
    assert torch.equal(model.complete(x, torch.ones(3, 3, dtype=torch.bool), steps=3), x)


def test_upper_halves_are_completed_in_a_picture(digits: ImageData):
    model, _ = evaluate.runs.load_checkpoint(ROOT / "weights" / "flow_prior.pt")
    test_set = measure.make_test_set(thinned(digits, 20), "dynamic")
    shown = torch.tensor(pictures.draw_completions(model, test_set, "", draws=2).axes[0].images[0].get_array())
    given, first, second, image = shown.view(4, 28, -1)
    assert (given[14:] == 0.5).all()
    for completed in (first, second):
        assert torch.equal(completed[:14], image[:14])
        error = (completed[14:] - image[14:]).abs().mean()
        assert error < 0.8 * (completed[14:] - image[14:].roll(28, 1)).abs().mean()  # beside that of other images
    assert not torch.equal(first, second)


def test_command_fills_in_transparent_pixels(tmp_path: Path, call: Callable, digits: ImageData, fails: Callable):
    rgba = np.full((28, 28, 4), 255, np.uint8)
    rgba[..., :3] = digits.test_images[3, 0, :, :, None]
    Image.fromarray(rgba).save(tmp_path / "whole.png")
    rgba[14:, :, 3] = 0
    wide = np.full((28, 40, 4), 255, np.uint8)
    wide[:, 6:34] = rgba  # what is left once it is cropped square at the centre
    Image.fromarray(wide).save(tmp_path / "erased.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "erased.png").read_bytes()[:150])
    (tmp_path / "text.png").write_text("no picture")
    weights = ROOT / "weights" / "default.pt"
    words = [weights, "--samples", 3, "--out-dir", tmp_path]
    for wrong in ("whole.png", "text.png", "half.png", "nothing.png"):
        assert wrong in fails(evaluate.main, *words, "--complete", tmp_path / wrong)
    assert "--complete" in fails(evaluate.main, weights, "--complete", tmp_path / "erased.png")
    call(evaluate.main, *words, "--complete", tmp_path / "erased.png")
    filled = [np.array(Image.open(path)) for path in sorted((tmp_path / "completions").glob("*.png"))]
    assert len(filled) == 3
    for image in filled:
        assert np.array_equal(image[:14], 255 * (rgba[:14, :, 0] > 127))
    assert not np.array_equal(filled[0], filled[1])
