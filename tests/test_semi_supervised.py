"""experiments/semi_supervised.py: its loss written out, its labels, and the error that it prints."""

import copy
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Categorical, Normal, kl_divergence

import data
import evaluate
import train
import utils
from data import ImageData
from experiments import semi_supervised
from experiments.semi_supervised import ALPHA, GAMMA, LABELS, SemiSupervisedVAE
from model import DiagonalNormal
from tests.conftest import thinned
from tests.test_experiments import SMALL, weights

SIZE, CLASSES = 9, 3


@pytest.fixture
def few(digits: ImageData, no_pictures: None, monkeypatch: pytest.MonkeyPatch) -> ImageData:
    """What every command loads."""
    few = thinned(digits, 10)
    for module in (train, evaluate, data):
        monkeypatch.setattr(module, "load_dataset", lambda *args: few)
    return few


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> SemiSupervisedVAE:
    """Far from its initial state, without dropout and noise, and with labelled pixels that are 0 or 1."""
    model = SemiSupervisedVAE(SIZE, CLASSES, hidden_size=16, latent_size=2).eval()
    for weight in model.parameters():
        weight.data *= 2
    model.labelled.copy_(255 * torch.randint(0, 2, model.labelled.shape))
    monkeypatch.setattr(DiagonalNormal, "rsample", lambda self, shape=(): self.mu.expand(*shape, *self.mu.shape))
    return model


def bound(model: SemiSupervisedVAE, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """-log p(x|y, z) at the mean of q(z|x, y), and KL(q(z|x, y) || p(z)), from the networks and PyTorch's own."""
    one_hot = F.one_hot(y, CLASSES).float()
    hidden = model.encoder(torch.cat([x, one_hot], 1))
    q = Normal(model.latent_z.mu(hidden), torch.exp(0.5 * model.latent_z.logvar(hidden)))
    logits = model.decoder.logits(torch.cat([q.mean, one_hot], 1))
    return F.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(1), kl_divergence(q, Normal(0, 1)).sum(1)


def unlabelled_terms(model: SemiSupervisedVAE, x: Tensor) -> tuple[Tensor, Tensor]:
    """U(x) = sum over y of q(y|x) L(x, y), less the entropy of q(y|x) (eq. 7), where L has a uniform p(y) (eq. 6)."""
    q = Categorical(logits=model.classifier(x))
    terms = [bound(model, x, torch.full((len(x),), y)) for y in range(CLASSES)]
    reconstruction, kl = (sum(q.probs[:, y] * term[i] for y, term in enumerate(terms)) for i in (0, 1))
    return reconstruction, kl + kl_divergence(q, Categorical(torch.ones(CLASSES)))


@pytest.mark.parametrize("beta", [1.0, 3.0])
def test_the_loss_is_written_out(model: SemiSupervisedVAE, beta: float):
    """What is minimized, and the bound that is printed: values and gradients."""
    x = torch.rand(4, SIZE).round()
    reconstruction, kl = unlabelled_terms(model, x)
    labelled, y = model.labelled / 255, torch.arange(CLASSES).repeat_interleave(LABELS)
    with_label = sum(bound(model, labelled, y)).mean()
    classification = F.cross_entropy(model.classifier(labelled), y)
    loss = reconstruction + beta * kl + GAMMA * with_label + ALPHA * classification
    other_labels = torch.tensor([2, 0, 0, 1])
    found = model.loss(x, x, other_labels, torch.tensor(beta))
    weights = list(model.parameters())
    for value, expected in zip(found, (loss, reconstruction + kl), strict=True):
        torch.testing.assert_close(value, expected)
        gradients, others = (torch.autograd.grad(v.sum(), weights, retain_graph=True) for v in (value, expected))
        torch.testing.assert_close(gradients, others, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("is_training", [False, True])
def test_elbo_terms_are_those_of_the_class_that_is_told(model: SemiSupervisedVAE, is_training: bool):
    x, y = torch.rand(4, SIZE).round(), torch.tensor([0, 2, 1, 1])
    model.train(is_training)
    torch.testing.assert_close(model.elbo_terms(x, x, y), bound(model, x, y))


# ---------------------------------------------------------------------------------------------------------------------
# The labels


def test_ten_images_of_each_class_are_labelled(few: ImageData):
    options = train.make_options(hidden_size=16, latent_size=2, likelihood="bernoulli")
    chosen = SemiSupervisedVAE.for_data(few, options).labelled.tolist()
    labels = {tuple(x): y for x, y in zip(few.train_images.flatten(1).tolist(), few.train_labels.tolist(), strict=True)}
    assert [labels[tuple(x)] for x in chosen] == [y for y in range(10) for _ in range(10)]
    assert len(set(map(tuple, chosen))) == 100
    threes = few.train_images[few.train_labels == 3].flatten(1).tolist()
    assert chosen[30:40] == threes[:10]


def test_other_labels_change_nothing(few: ImageData, tmp_path: Path):
    model = SemiSupervisedVAE.for_data(few, train.make_options(hidden_size=16, latent_size=2, likelihood="bernoulli"))
    hidden = [replace(few, train_labels=labels) for labels in (few.train_labels, (few.train_labels + 1) % 10)]
    runs = [
        train.train(dataset, copy.deepcopy(model), epochs=1, batch_size=100, out_dir=tmp_path)[2] for dataset in hidden
    ]
    first, second = map(weights, runs)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def errors(capsys: pytest.CaptureFixture) -> list[float]:
    (line,) = re.findall(r"^error on 100 test images: .*", capsys.readouterr().out, re.MULTILINE)
    return [float(number) for number in re.findall(r"([\d.]+)%", line)]


def test_images_without_labels_help(few: ImageData, tmp_path: Path, capsys: pytest.CaptureFixture):
    """The classifier of all images errs less than the one of the labelled images alone."""
    options = {"epochs": 10, "batch_size": 20, "lr": 3e-3, "beta": 3, "hidden_size": 64, "latent_size": 5}
    model, _, _ = train.train(few, SemiSupervisedVAE, **options, activation="silu", out_dir=tmp_path)
    semi_supervised.report(model, few)
    ours, alone = errors(capsys)
    is_wrong = model.eval().classifier(few.test_images / 255).argmax(1) != few.test_labels
    assert ours == pytest.approx(100 * is_wrong.float().mean().item())
    assert ours < alone - 2
    assert alone < 45


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"train_labels": torch.arange(500) // 55}, []),
        ({"classes": ["all"], "train_labels": torch.zeros(500).long(), "test_labels": torch.zeros(100).long()}, []),
        ({}, ["--objective=iwae"]),
    ],
)
def test_is_refused(few: ImageData, change: dict, words: list[str], tmp_path: Path, monkeypatch, fails: Callable):
    monkeypatch.setattr(train, "load_dataset", lambda *args: replace(few, **change))
    command = train.main.__wrapped__

    @utils.command
    def main() -> None:
        command(SemiSupervisedVAE)

    main.__module__ = "train"
    message = "is for --objective elbo, --likelihood bernoulli" if words else "two or more classes, with 10 or more"
    assert message in fails(main, *SMALL, *words, "--out-dir", tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
