"""What went wrong in other people's first hour: namesakes, unfinished runs, wrong arguments."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import evaluate
import runs
import train
from data import ImageData
from tests.conftest import thinned
from utils import UserError

ROOT = Path(__file__).parent.parent


@pytest.fixture
def options(tmp_path: Path, no_pictures: None) -> dict[str, object]:
    """A small run's options. No pictures are drawn."""
    small = {"hidden_size": 16, "latent_size": 2, "epochs": 1, "device": "cpu", "compile": False}
    return small | {"out_dir": tmp_path / "runs"}


@pytest.fixture(scope="module")
def few(digits: ImageData) -> ImageData:
    return thinned(digits, 20)


def run_script(*words: object, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, encoding="utf-8", timeout=100)


# ---------------------------------------------------------------------------------------------------------------------
# Beside a user's own modules

PROGRAM = """
import torch
import data.sets, model
models = [torch.hub.load({root!r}, "vae", source="local", latent_size=3)]
models += [torch.hub.load({root!r}, "vae", source="local", pretrained=name) for name in ("default", "vampprior")]
import data.sets, model, step, train, utils
assert data.sets.MINE and model.MINE and step.MINE and train.MINE and utils.MINE
for vae in models:
    vae.elbo_terms(torch.rand(2, 784), torch.ones(2, 784))
    print(type(vae).__name__, *vae.sample(2).shape)
"""


def test_torch_hub_beside_modules_of_the_same_names(tmp_path: Path):
    """Some of them imported before, some after."""
    (tmp_path / "data").mkdir()
    for name in ("data/__init__", "data/sets", "model", "step", "train", "utils"):
        (tmp_path / f"{name}.py").write_text("MINE = True\n", encoding="utf-8")
    (tmp_path / "program.py").write_text(PROGRAM.format(root=str(ROOT)), encoding="utf-8")
    done = run_script(tmp_path / "program.py")
    assert done.stdout.split("\n") == ["VAE 2 784", "VAE 2 784", "VampVAE 2 784", ""], done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Which run is the newest


def test_a_run_in_its_first_epoch_is_not_the_newest(few: ImageData, options: dict, capsys):
    _, _, run = train.train(few, **options)
    unfinished = runs.new_run_folder(run.parent, "few", 2)
    capsys.readouterr()
    evaluate.evaluate_run(run.parent, dataset=few, nll_samples=1)
    assert capsys.readouterr().out.startswith(f"{run / 'checkpoint.pt'}: ")
    with pytest.raises(UserError, match="after an epoch"):
        runs.checkpoint_path(unfinished)


# ---------------------------------------------------------------------------------------------------------------------
# What can be known before the first step


@pytest.mark.parametrize(
    "wrong",
    [
        {"dataset": torch.zeros(9, 28, 28)},
        {"dataset": [1, 2]},
        {"model": "conv"},
    ],
    ids=["tensor", "list", "text"],
)
def test_wrong_arguments_are_refused_before_the_first_step(wrong: dict, few: ImageData, options: dict):
    with pytest.raises(UserError):
        train.train(**{"dataset": few} | wrong, **options)
    assert not options["out_dir"].exists()


def test_wrong_arguments_of_resume_and_evaluate(few: ImageData, options: dict):
    model, _, run = train.train(few, **options)
    tensor, labels = few.test_images, few.test_labels
    calls: list[Callable[[], object]] = [
        lambda: train.resume(run, dataset=tensor, epochs=2),
        lambda: evaluate.evaluate_run(run, dataset=tensor),
        lambda: evaluate.evaluate_run(run, dataset=few, nll_samples=1.5),
        lambda: evaluate.evaluate(model, tensor / 255),
        lambda: evaluate.evaluate(model, tensor[..., :9]),
        lambda: evaluate.evaluate(model, tensor, labels=labels[:3]),
        lambda: evaluate.evaluate(model, tensor, labels=labels.float()),
    ]
    for call in calls:
        with pytest.raises(UserError):
            call()
