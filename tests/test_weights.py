"""weights/: the trained models that come with the repository."""

from pathlib import Path

import pytest
import torch
from torch.distributions import Bernoulli

import hubconf
import measure
import runs
from data import ImageData, inputs_and_targets
from docs import make
from utils import UserError
from weights.make import KEPT

WEIGHTS = sorted(hubconf.WEIGHTS.glob("*.pt"))
# -log p(x|z) of reconstructions, nats per image
LARGEST_ERROR = {"2d": 150, "conv_flow": 60, "default": 80, "flow_prior": 72, "vampprior": 72}


@pytest.mark.parametrize("name", LARGEST_ERROR)
def test_reconstructs_the_bundled_digits(name: str, digits: ImageData):
    model = torch.hub.load(str(hubconf.WEIGHTS.parent), "vae", source="local", pretrained=name)
    assert not model.training
    inputs, targets = inputs_and_targets(digits.test_images, "dynamic", torch.Generator().manual_seed(0))
    x_hat = model.reconstruct(inputs)
    error = -Bernoulli(x_hat.clamp(1e-6, 1 - 1e-6)).log_prob(targets).sum(1).mean()
    assert error < LARGEST_ERROR[name]
    assert 50 < model.sample(100).sum(1).mean() < 150  # as much ink as digits have: 104 of 784 pixels


def test_compresses_emoji_that_it_has_not_seen():
    model = torch.hub.load(str(hubconf.WEIGHTS.parent), "vae", source="local", pretrained="emoji")
    emoji = make.read_emoji()  # of the test set
    found = measure.encode(model, measure.make_test_set(emoji, "none"))
    assert measure.bits_per_dim(found.neg_elbo.mean().item(), emoji.input_size) < 3.3
    error = (model.reconstruct(emoji.test_images / 255) - emoji.test_images / 255).abs().mean()
    assert error < 0.07  # white images instead would have 0.18


@pytest.mark.parametrize("path", WEIGHTS, ids=lambda path: path.stem)
def test_the_file_holds_what_evaluation_needs(path: Path):
    checkpoint = runs.read_checkpoint(path)
    assert all(tensor.dtype == torch.float16 for tensor in checkpoint["model_state_dict"].values())
    needed = {"model", "class", "options", "checksum", "epoch", "model_state_dict"}
    assert needed <= checkpoint.keys() <= {*KEPT, "model_state_dict"}  # those made earlier have no more
    assert checkpoint["options"].get("hold_out", 0) == 0
    assert not Path(checkpoint["options"]["dataset"]).is_absolute()


def test_all_are_listed_and_small():
    table = (hubconf.WEIGHTS / "README.md").read_text(encoding="utf-8")
    assert all(f"[{path.name}]({path.name})" in table for path in WEIGHTS)
    assert sum(path.stat().st_size for path in WEIGHTS) < 18e6


def test_unknown_names():
    for arguments in ({"pretrained": "no-such"}, {"pretrained": "default", "latent_size": 3}):
        with pytest.raises(UserError, match="2d, conv_flow, default"):
            hubconf.vae(**arguments)
