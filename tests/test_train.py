"""The training loop and the train command."""

import copy
import csv
import errno
import math
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributions import Bernoulli, Normal

import train
import utils
from data import BINARIZE, ImageData
from model import VAE, loss_criterion
from tests.conftest import thinned
from utils import UserError

SMALL = {"dataset": "mnist-5k", "hidden_size": 16, "latent_size": 3, "batch_size": 500, "device": "cpu"}
SMALL_ARGS = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]


@pytest.fixture(autouse=True)
def small_data(digits: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fifth of the bundled digits, and no pictures: the tests that need them ask for them."""
    few = thinned(digits, 5)
    monkeypatch.setattr(train, "load_dataset", lambda *args: few.hold_out(*args[3:4] or [0]))
    monkeypatch.setattr(train, "draw", lambda *args: None)


def saved(run: Path) -> dict:
    return torch.load(run / "checkpoint.pt", weights_only=True)


def same_weights(a: Path, b: Path) -> bool:
    a, b = saved(a), saved(b)
    return all(
        torch.equal(a[part][name], b[part][name])
        for part in ("model_state_dict", "training_weights")
        for name in a[part]
    )


# ---------------------------------------------------------------------------------------------------------------------
# The loop


@pytest.mark.parametrize(("stride", "largest_norm"), [(1, math.inf), (2, 2150.0)])  # about half are larger
def test_epochs_are_plain_adam_on_the_criterion(digits: ImageData, stride: int, largest_norm: float):
    """train_epoch, twice, against the loop as a tutorial writes it, with the same draws."""
    images, labels = digits.test_images[:500].flatten(1), digits.test_labels[:500]
    clip = None if largest_norm == math.inf else largest_norm
    options = {"batch_size": 128, "beta": 0.7, "clip_grad_norm": clip, "precision": "highest"}
    options = train.make_options(**SMALL | options)
    model = VAE(784, 16, 3).double()
    reference, average = copy.deepcopy(model), copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters(), lr=options.lr)

    def binarize(images: torch.Tensor, mode: str) -> tuple[torch.Tensor, torch.Tensor]:
        return (torch.bernoulli(images.double() / 255),) * 2

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "binarize", binarize)
        patch.setattr(train, "AVERAGES_PER_EPOCH", 4 // stride)
        step = train.make_step(model, optimizer, images, labels, options)
        bounds = [train.train_epoch(step, model, average, len(images), i, options) for i in (1, 2)]

    adam = torch.optim.Adam(reference.parameters(), lr=options.lr)
    losses, seen = [], []
    iterates, norms = [], []
    for epoch in (1, 2):
        utils.seed_epoch(options.seed, epoch)
        for batch in torch.randperm(len(images)).split(128):
            x, _ = binarize(images[batch], "")
            x_hat, logvar, mu, _ = reference(x)
            kl = -0.5 * (1 + logvar - mu**2 - logvar.exp()).sum()
            criterion = loss_criterion(x_hat, x, logvar, mu)
            adam.zero_grad()
            (criterion - 0.3 * kl).backward()
            norms.append(math.sqrt(sum((weight.grad**2).sum().item() for weight in reference.parameters())))
            for weight in reference.parameters():
                weight.grad *= min(1, largest_norm / norms[-1])
            adam.step()
            losses.append(criterion.item())
            seen += batch.tolist()
            iterates.append(copy.deepcopy(reference.state_dict()))
    assert sorted(seen) == sorted([*range(len(images))] * 2)
    assert torch.cat(bounds).tolist() == pytest.approx(losses)
    assert largest_norm == math.inf or min(norms) < largest_norm < max(norms)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, reference.state_dict()[name])

    # The average gives its t-th update the weight that the product of later shrinkings leaves it
    averaged = iterates[::stride]
    updates = range(1, len(averaged) + 1)
    weights = [10 / (t + 9) * math.prod(1 - 10 / (s + 9) for s in updates if s > t) for t in updates]
    assert sum(weights) == pytest.approx(1)
    for name, weight in average.state_dict().items():
        torch.testing.assert_close(weight, sum(w * step[name] for w, step in zip(weights, averaged, strict=True)))


def test_every_epoch_has_an_order_and_pixels_of_its_own(digits: ImageData):
    images, model = digits.test_images.flatten(1), VAE(784, 4, 2)
    options = train.make_options(precision="highest")

    def draws(epoch: int) -> tuple[list[int], torch.Tensor]:
        order, pixels = [], torch.empty(images.shape)

        def step(batch: torch.Tensor, rates: torch.Tensor) -> torch.Tensor:
            order.extend(batch.tolist())
            pixels[batch], _ = train.binarize(images[batch], "dynamic")
            return torch.zeros(())

        train.train_epoch(step, model, copy.deepcopy(model), len(images), epoch, options)
        return order, pixels

    (first, pixels), (second, other_pixels), (again, same_pixels) = map(draws, (1, 2, 1))
    assert first == again != second
    assert torch.equal(pixels, same_pixels)
    is_gray = (images > 64) & (images < 192)
    assert (pixels != other_pixels)[is_gray].float().mean() > 0.3  # of fair coins, a half


def test_schedules_go_on_within_an_epoch():
    """From 0 at the very first step, in equal parts of an epoch."""
    schedules = {"lr": 2.0, "lr_schedule": "cosine", "epochs": 4, "beta": 3.0, "kl_warmup": 2.5}
    options, seen = train.make_options(batch_size=250, precision="highest", **schedules), []
    model = VAE(4, 2, 2)

    def step(batch: torch.Tensor, rates: torch.Tensor) -> torch.Tensor:
        seen.append(rates)
        return torch.zeros(())

    for epoch in (1, 2, 3):
        train.train_epoch(step, model, copy.deepcopy(model), 1000, epoch, options)
    expected = [[1 + math.cos(math.pi * i / 16), min(3, 3 * i / 10)] for i in range(12)]
    torch.testing.assert_close(torch.stack(seen), torch.tensor(expected))


@pytest.mark.parametrize(
    ("num_images", "batch_size", "sizes"),
    [(11, 5, [5, 6]), (12, 5, [5, 5, 2]), (3, 1, [1, 1, 1]), (4, 9, [4]), (1, 5, [1])],
)
def test_a_last_batch_of_one_joins_the_one_before(num_images: int, batch_size: int, sizes: list[int]):
    """Because normalizations need two. Batches of one are taken if they are asked for."""
    seen, model = [], VAE(4, 2, 2)

    def step(batch: torch.Tensor, rates: torch.Tensor) -> torch.Tensor:
        seen.append(batch)
        return torch.zeros(())

    options = train.make_options(batch_size=batch_size, precision="highest")
    train.train_epoch(step, model, copy.deepcopy(model), num_images, 1, options)
    assert [len(batch) for batch in seen] == sizes
    assert torch.cat(seen).sort().values.tolist() == list(range(num_images))


def test_without_an_average_adams_weights_are_kept(tmp_path: Path):
    model, history, run = train.train(**SMALL, epochs=2, lr=1e-2, average=False, out_dir=tmp_path)
    weights = saved(run)["training_weights"]
    assert all(torch.equal(value, weights[name]) for name, value in saved(run)["model_state_dict"].items())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert history[1]["test_loss"] < history[0]["test_loss"]
    assert not model.training


def test_initialize(digits: ImageData):
    """Glorot & Bengio's uniform law (2010, eq. 16), and a decoder that, of nothing, makes the mean image."""
    torch.manual_seed(0)
    model = VAE(784, 300, 20)
    train.initialize(model, digits.train_images.flatten(1))
    for name, weight in model.state_dict().items():
        if name.endswith("weight"):
            bound = math.sqrt(6 / sum(weight.shape))
            assert 0.98 * bound < weight.abs().max() <= bound
            assert weight.std() == pytest.approx(bound / math.sqrt(3), rel=0.05)
        elif name != "decoder.fc2.bias":
            assert torch.all(weight == 0)
    mean = (digits.train_images.flatten(1) / 255).mean(0).clamp(0.001, 0.999)
    torch.testing.assert_close(model.decode(torch.zeros(20)).detach(), mean, rtol=1e-4, atol=1e-6)


def test_schedules():
    options = train.make_options(lr=2.0, epochs=10, lr_schedule="cosine", beta=4.0, kl_warmup=5.0)
    burda = train.make_options(lr=2.0, lr_schedule="burda2016")
    rates = [train.learning_rate(done, options) for done in (0, 2.5, 5, 10)]
    assert rates == pytest.approx([2, 1 + math.sqrt(0.5), 1, 0])
    assert train.learning_rate(7, train.make_options(lr=2.0)) == 2
    epochs_at_each_rate = [3**i for i in range(8)]
    expected = [2 * 10 ** (-i / 7) for i, n in enumerate(epochs_at_each_rate) for _ in range(n)]
    assert [train.learning_rate(epoch + 0.99, burda) for epoch in range(3280)] == pytest.approx(expected)
    assert [train.kl_weight(done, options) for done in (0, 2.5, 5, 9)] == [0, 2, 4, 4]
    assert train.kl_weight(0, train.make_options(beta=4.0)) == 4


def test_iwae_objective_is_the_bound_of_torch_distributions(digits: ImageData):
    """Adam goes down the gradient of -log mean w of the K draws; what is reported is the mean of their -log w."""
    options = train.make_options(batch_size=500, binarize="threshold", lr=1e-3, precision="highest")
    images, labels = digits.test_images[:500].flatten(1), digits.test_labels[:500]
    model = VAE(784, 16, 3)
    before = copy.deepcopy(model)
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    step = train.make_step(model, sgd, images, labels, options, num_samples=6)
    (neg_elbo,) = train.train_epoch(step, model, copy.deepcopy(model), len(images), 1, options)

    utils.seed_epoch(options.seed, 1)
    inputs, targets = train.binarize(images[torch.randperm(500)], "threshold")
    q = before.posterior(inputs)
    posterior, prior = Normal(q.mu, torch.exp(0.5 * q.logvar)), Normal(0.0, 1.0)
    z = posterior.mean + posterior.stddev * torch.randn(6, 500, 3)
    log_joint = Bernoulli(before.decode(z)).log_prob(targets).sum(-1) + prior.log_prob(z).sum(-1)
    log_weights = (log_joint - posterior.log_prob(z).sum(-1)).double()
    assert neg_elbo.item() == pytest.approx(-log_weights.mean(0).sum().item(), rel=1e-4)
    (-log_weights.exp().mean(0).log().sum()).backward()
    for (name, weight), old in zip(model.named_parameters(), before.parameters(), strict=True):
        taken = (old - weight) / options.lr
        torch.testing.assert_close(taken, old.grad, rtol=0.02, atol=0.02 * old.grad.abs().max().item(), msg=name)


def test_it_learns(tmp_path: Path):
    model, history, run = train.train(**SMALL, epochs=15, lr=1e-2, out_dir=str(tmp_path))
    assert [row["epoch"] for row in history] == list(range(1, 16))
    assert history[0]["test_loss"] > 1.5 * history[-1]["test_loss"]  # 784 ln 2 = 543 before the first step
    for row in history:
        assert row["test_loss"] == pytest.approx(row["test_reconstruction"] + row["test_kl"])
    loaded, _ = utils.load_checkpoint(run)
    x = torch.rand(2, 784)
    assert torch.equal(loaded.reconstruct(x), model.reconstruct(x))


def test_denormals_are_flushed(tmp_path: Path):
    """Multiplying them takes many times longer, and Adam makes many of them."""
    if not torch.set_flush_denormal(False):
        pytest.skip("this CPU can't")
    train.train(**SMALL, epochs=1, out_dir=str(tmp_path))
    assert torch.all(torch.full((64,), 1e-30) * 1e-10 == 0)


def test_what_is_tested_is_what_is_kept(tmp_path: Path):
    """The last row's test loss is that of the saved model, not of the weights that Adam left."""
    model, history, run = train.train(**SMALL, epochs=3, lr=1e-2, out_dir=str(tmp_path))
    test_set = train.measure.make_test_set(train.load_dataset(), "dynamic")
    precision = utils.read_checkpoint(run)["options"]["precision"]
    with train.matmul_precision(precision, "cpu"):
        reconstruction, kl = train.measure.elbo_terms(model, test_set)
    assert history[-1]["test_kl"] == pytest.approx(kl.mean().item())
    assert history[-1]["test_reconstruction"] == pytest.approx(reconstruction.mean().item(), rel=0.02)  # other draws


def test_a_data_set_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: Callable):
    monkeypatch.undo()  # with the pictures
    images = torch.randint(0, 256, (90, 12, 13), dtype=torch.uint8)
    labels = torch.arange(90) % 2
    mine = ImageData("mine", ["even", "odd", "neither"], images[:80], labels[:80], images[80:], labels[80:])
    options = {name: value for name, value in SMALL.items() if name != "dataset"} | {"out_dir": str(tmp_path)}
    model, _, run = train.train(mine, **options, epochs=2)
    assert run.name == "001-mine-z3"
    assert model.sample(4).shape == (4, 156)
    names = {"checkpoint.pt", "metrics.csv", "curves.png", "reconstructions.png", "prior_samples.png"}
    assert {path.name for path in run.iterdir()} == names
    monkeypatch.setattr(train, "draw", lambda *args: None)
    train.resume(run, epochs=4, dataset=mine)
    _, _, straight = train.train(mine, **options, epochs=4)
    assert same_weights(run, straight)
    assert "mine" in fails(train.main, "--resume", run, "--epochs", "6")
    assert "mine" in fails(train.evaluate.main, run)
    with pytest.raises(UserError, match="other images"):
        train.resume(run, epochs=6, dataset="mnist-5k")


def test_on_epoch_sees_the_model_and_history(tmp_path: Path):
    seen = []
    model, _, _ = train.train(
        **SMALL, epochs=3, out_dir=str(tmp_path), on_epoch=lambda model, history: seen.append((model, len(history)))
    )
    assert seen == [(model, 1), (model, 2), (model, 3)]


def test_seeds(tmp_path: Path):
    a, b, c = (train.train(**SMALL, epochs=2, seed=seed, out_dir=str(tmp_path))[2] for seed in (0, 0, 1))
    assert same_weights(a, b)
    assert not same_weights(a, c)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_resumed_is_bit_identical(tmp_path: Path):
    _, straight_history, straight = train.train(**SMALL, epochs=4, out_dir=str(tmp_path))
    _, _, run = train.train(**SMALL, epochs=2, out_dir=str(tmp_path))
    assert not same_weights(run, straight)
    torch.manual_seed(123)
    _, history, resumed = train.resume(run, epochs=4)
    assert resumed == run
    assert same_weights(run, straight)

    def losses(rows: list[dict]) -> list[tuple]:
        return [(row["epoch"], row["train_loss"], row["test_loss"]) for row in rows]

    assert losses(history) == losses(straight_history)
    a, b = saved(run)["optimizer_state_dict"]["state"], saved(straight)["optimizer_state_dict"]["state"]
    assert all(torch.equal(a[i][key], b[i][key]) for i in a for key in a[i])


def test_objective_changes_after_elbo_epochs(tmp_path: Path):
    """Until then bit for bit as on the ELBO; from then on as a run on the ELBO that is made to go on as an IWAE."""
    options = SMALL | {"kl_warmup": 2.0, "out_dir": str(tmp_path)}
    iwae = {"objective": "iwae", "importance_samples": 3}
    _, _, first = train.train(**options, epochs=2)
    _, _, switched = train.train(**options, **iwae, elbo_epochs=2, epochs=1)
    train.resume(switched, epochs=2)
    assert same_weights(first, switched)
    train.resume(switched, epochs=3)
    _, _, straight = train.train(**options, **iwae, elbo_epochs=2, epochs=3)
    assert same_weights(straight, switched)
    assert saved(straight)["options"]["elbo_epochs"] == 2

    checkpoint = saved(first)
    train.resume(first, epochs=3)
    assert not same_weights(straight, first)
    checkpoint["options"] |= iwae | {"kl_warmup": 0.0}
    utils.save_checkpoint(first / "checkpoint.pt", checkpoint)
    train.resume(first, epochs=3)
    assert same_weights(straight, first)


def test_interrupted_run_goes_on_to_the_same_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    options = SMALL | {"lr_schedule": "cosine", "kl_warmup": 2.0, "epochs": 3, "out_dir": str(tmp_path)}
    _, _, straight = train.train(**options)
    with monkeypatch.context() as patch:
        train_epoch = train.train_epoch

        def interrupted(*args: object) -> torch.Tensor:
            if args[4] == 3:  # the epoch
                raise KeyboardInterrupt
            return train_epoch(*args)

        patch.setattr(train, "train_epoch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train.train(**options)
    run = tmp_path / "002-mnist-5k-z3"
    assert saved(run)["epoch"] == 2
    train.resume(run)
    assert same_weights(run, straight)


@pytest.mark.parametrize(
    "batch_size", [100, 1000]
)  # 1000: one step an epoch, whose loss is finite, but not its weights
def test_a_loss_that_explodes_leaves_the_epoch_before(batch_size: int, tmp_path: Path):
    _, _, run = train.train(**(SMALL | {"batch_size": batch_size}), epochs=1, out_dir=str(tmp_path))
    checkpoint = saved(run)
    checkpoint["options"]["lr"] = 1e30
    utils.save_checkpoint(run / "checkpoint.pt", checkpoint)
    where = "step 2" if batch_size == 100 else "the test after its last step"
    with pytest.raises(UserError, match=rf"epoch 2, {where};.*--lr"):
        train.resume(run, epochs=3)
    assert saved(run)["epoch"] == 1
    utils.load_checkpoint(run)


def test_clipping_outlives_an_outlier(digits: ImageData, tmp_path: Path):
    """Without it, one image's gradient makes Adam's second moments so large that no weight moves any more."""

    class HasOutlier(VAE):
        def elbo_terms(self, x: torch.Tensor, targets: torch.Tensor, y: torch.Tensor) -> tuple:
            is_outlier = targets.flatten(1).mean(-1) == 1
            return tuple(term * torch.where(is_outlier, 1e10, 1) for term in super().elbo_terms(x, targets, y))

    few = thinned(digits, 5)
    images = few.train_images.clone()
    images[0] = 255
    data = replace(few, name="outlier", train_images=images)
    options = {"hidden_size": 16, "latent_size": 3, "batch_size": 50, "epochs": 6, "out_dir": str(tmp_path)}
    plain, clipped = (
        train.train(data, HasOutlier, **options, device="cpu", clip_grad_norm=clip)[1] for clip in (None, 3000)
    )
    assert clipped[-1]["test_loss"] < clipped[0]["test_loss"] - 50
    assert plain[-1]["test_loss"] > plain[0]["test_loss"] - 50


# ---------------------------------------------------------------------------------------------------------------------
# What a run leaves


def test_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()
    _, history, run = train.train(**SMALL, epochs=2, out_dir=str(tmp_path))
    names = {"checkpoint.pt", "metrics.csv", "curves.png", "reconstructions.png", "prior_samples.png"}
    assert {path.name for path in run.iterdir()} == names
    assert run == tmp_path / "001-mnist-5k-z3"
    train.resume(run, epochs=3)
    with open(run / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert [float(row["test_loss"]) for row in rows][:2] == [row["test_loss"] for row in history]

    checkpoint = saved(run)
    assert checkpoint["model"] == VAE(784, 16, 3).config
    assert checkpoint["options"]["dataset"] == "mnist-5k"
    adam = torch.optim.Adam(VAE(784, 16, 3).parameters())
    adam.load_state_dict(checkpoint["optimizer_state_dict"])
    assert type(adam.param_groups[0]["lr"]) is float


def test_pictures_at_powers_of_two_and_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    drawn = []
    monkeypatch.setattr(train, "draw", lambda *args: drawn.append(len(args[-1])))
    train.train(**SMALL, epochs=6, out_dir=str(tmp_path))
    assert drawn == [1, 2, 4, 6]


@pytest.mark.parametrize("epochs", [1, 30])
def test_curves_show_the_history(epochs: int):
    columns = ("train_loss", "test_loss", "test_reconstruction", "test_kl")
    history = [{"epoch": e} | {name: 100 * i + e for i, name in enumerate(columns)} for e in range(1, epochs + 1)]
    figure = train.pictures.draw_curves(history, "caption")
    lines = [line for axes in figure.axes for line in axes.lines]
    for line, name in zip(lines, columns, strict=True):
        assert list(line.get_xdata()) == list(range(1, epochs + 1))
        assert list(line.get_ydata()) == [row[name] for row in history]


def test_default_epochs_follow_the_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    epochs = []
    monkeypatch.setattr(train, "fit", lambda model, checkpoint, options, *_: epochs.append(options.epochs))
    train.train(**SMALL, out_dir=str(tmp_path))
    few = replace(train.load_dataset(), name="mnist")
    monkeypatch.setattr(train, "load_dataset", lambda *args: few.hold_out(*args[3:4] or [0]))
    train.train(out_dir=str(tmp_path))
    assert epochs == [150, 20]


def test_what_an_epoch_says(tmp_path: Path, capsys: pytest.CaptureFixture):
    _, (row,), _ = train.train(**SMALL, epochs=1, out_dir=tmp_path)
    assert row["images_per_second"] * row["seconds"] == pytest.approx(1000)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch 1/1"))
    told = [float(word.replace(",", "")) for word in re.findall(r"[\d,]+\.?\d*", line.removeprefix("epoch 1/1"))]
    names = ("train_loss", "test_loss", "test_reconstruction", "test_kl", "images_per_second")
    assert told == pytest.approx([row[name] for name in names], rel=1e-3, abs=0.5)


def test_gray_targets_are_labelled(tmp_path: Path, capsys: pytest.CaptureFixture):
    for mode in BINARIZE:
        train.train(**SMALL, epochs=1, binarize=mode, out_dir=str(tmp_path))
        assert ("no likelihood" in capsys.readouterr().out) == (mode == "none")


# ---------------------------------------------------------------------------------------------------------------------
# The command


@pytest.mark.parametrize(
    ("args", "names"),
    [
        (["--epochs", "-1"], "--epochs"),
        (["--epochs", "0"], "--epochs"),
        (["--epochs", "2.5"], "--epochs"),
        (["--batch-size", "0"], "--batch-size"),
        (["--lr", "nan"], "--lr"),
        (["--lr", "0"], "--lr"),
        (["--lr", "inf"], "--lr"),
        (["--lr", "fast"], "--lr"),
        (["--lr-schedule", "linear"], "--lr-schedule"),
        (["--beta", "-1"], "--beta"),
        (["--kl-warmup", "nan"], "--kl-warmup"),
        (["--hidden-size", "0"], "--hidden-size"),
        (["--latent-size", "0"], "--latent-size"),
        (["--encoder-layers", "0"], "--encoder-layers"),
        (["--decoder-layers", "0"], "--decoder-layers"),
        (["--activation", "selu"], "--activation"),
        (["--binarize", "sometimes"], "--binarize"),
        (["--device", "tpu"], "--device"),
        (["--device", "cuda"], "cuda"),
        (["--seed", "-1"], "--seed"),
        (["--seed", str(2**41)], "--seed"),
        (["--batch-size", str(10**20)], "--batch-size"),
        (["--importance-samples", "0"], "--importance-samples"),
        (["--importance-samples", "5"], "iwae"),
        (["--elbo-epochs", "5"], "--elbo-epochs"),
        (["--objective", "iwae", "--elbo-epochs", "-1"], "--elbo-epochs"),
        (["--objective", "iwae", "--beta", "2"], "--beta"),
        (["--objective", "iwae", "--elbo-epochs", "5", "--kl-warmup", "6"], "--kl-warmup"),
        (["--objective", "elbow"], "--objective"),
        (["--adam-eps", "-1"], "--adam-eps"),
        (["--adam-eps", "0"], "--adam-eps"),
        (["--data-dir", ""], "--data-dir"),
        (["--adam-eps", "1e-50"], "--adam-eps"),
        (["--beta", "1e308"], "--beta"),
        (["--encoder-layers", "1001"], "--encoder-layers"),
        (["--decoder-layers", "1001"], "--decoder-layers"),
        (["--adam-eps", "inf"], "--adam-eps"),
        (["--clip-grad-norm", "0"], "--clip-grad-norm"),
        (["--epoch", "3"], "--epoch"),
        (["stray"], "stray"),
    ],
)
def test_bad_options(args: list[str], names: str, tmp_path: Path, fails: Callable, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert names in fails(train.main, *args, f"--out-dir={tmp_path / 'runs'}")
    assert not (tmp_path / "runs").exists()


def test_bad_resume(tmp_path: Path, fails: Callable):
    _, _, run = train.train(**SMALL, epochs=1, out_dir=str(tmp_path))
    assert "--epochs" in fails(train.main, "--resume", run, "--epochs", "-3")
    assert "--latent-size" in fails(train.main, "--resume", run, "--latent-size", "3")
    assert "nowhere" in fails(train.main, "--resume", tmp_path / "nowhere")

    (run / "copy.pt").write_bytes((run / "checkpoint.pt").read_bytes())
    assert "copy.pt" in fails(train.main, "--resume", run / "copy.pt", "--epochs", "2")

    whole = saved(run)
    for damage in ({"history": [3]}, {"epoch": 2}, {"history": []}):
        utils.save_checkpoint(run / "checkpoint.pt", whole | damage)
        assert "cannot be resumed" in fails(train.main, "--resume", run, "--epochs", "2")
    utils.save_checkpoint(run / "checkpoint.pt", whole | {"options": None})
    assert "options is of another type" in fails(train.main, "--resume", run, "--epochs", "2")
    utils.save_checkpoint(run / "checkpoint.pt", whole | {"options": whole["options"] | {"lr": "fast"}})
    assert "--lr" in fails(train.main, "--resume", run, "--epochs", "2")
    for key in ("training_weights", "optimizer_state_dict"):
        utils.save_checkpoint(run / "checkpoint.pt", whole | {key: {}})
        assert "cannot be resumed" in fails(train.main, "--resume", run, "--epochs", "2")
    kept = {key: whole[key] for key in ("model", "model_state_dict", "optimizer_state_dict")}
    utils.save_checkpoint(run / "checkpoint.pt", kept)
    assert "cannot be resumed" in fails(train.main, "--resume", run, "--epochs", "2")
    (run / "checkpoint.pt").write_bytes(b"damaged")
    assert "damaged" in fails(train.main, "--resume", run, "--epochs", "2")


def test_a_finished_run_is_written_again(tmp_path: Path, fails: Callable, capsys: pytest.CaptureFixture):
    """As one that was stopped between its last checkpoint and what is made from it."""
    _, _, run = train.train(**SMALL, epochs=2, out_dir=tmp_path)
    before = (run / "metrics.csv").read_bytes(), saved(run)["training_weights"]
    (run / "metrics.csv").unlink()
    _, history, _ = train.resume(run)
    assert [row["epoch"] for row in history] == [1, 2]
    assert (run / "metrics.csv").read_bytes() == before[0]
    assert all(torch.equal(value, before[1][name]) for name, value in saved(run)["training_weights"].items())
    assert "outputs rewritten" in capsys.readouterr().out
    assert "larger --epochs" in fails(train.main, "--resume", run, "--epochs", "1")


def test_resumes_on_its_own_images_only(tmp_path: Path):
    data = train.load_dataset()
    _, _, run = train.train(**SMALL, epochs=1, out_dir=tmp_path)
    for part in ("train_images", "test_images"):
        other = getattr(data, part).clone()
        other[0, 0, 0] = 1
        with pytest.raises(UserError, match=f"{run}.*other images"):
            train.resume(run, dataset=replace(data, **{part: other}), epochs=2)
    train.resume(run, dataset=data, epochs=2)


def test_other_images_under_the_name_of_a_data_set(digits, tmp_path, monkeypatch, fails):
    """A run on images called mnist-5k is not tested on mnist-5k, or trained on it, but where that is asked for."""
    few = train.load_dataset()  # every fifth
    _, _, run = train.train(**SMALL | {"dataset": few}, epochs=1, out_dir=tmp_path)
    checkpoint, path = saved(run), run / "checkpoint.pt"
    for module in (train, train.evaluate):
        monkeypatch.setattr(module, "load_dataset", lambda *args: digits)
    monkeypatch.setattr(train.evaluate, "draw_all", lambda *args: ())
    assert "other images" in fails(train.main, "--resume", run, "--epochs=2")
    assert "other images than those now in mnist-5k" in fails(train.evaluate.main, run)
    with pytest.raises(UserError, match="other images"):
        train.evaluate.evaluate_run(run)
    metrics = train.evaluate.evaluate_run(run, dataset="mnist-5k", nll_samples=1, out_dir=tmp_path)
    assert metrics["num_images"] == len(digits.test_images)
    labels = replace(few, train_labels=9 - few.train_labels)
    moved = replace(
        few,  # the last training image is the first test image now
        train_images=few.train_images[:-1],
        train_labels=few.train_labels[:-1],
        test_images=torch.cat([few.train_images[-1:], few.test_images]),
        test_labels=torch.cat([few.train_labels[-1:], few.test_labels]),
    )
    train.evaluate.check_same_images(checkpoint, labels, path)
    with pytest.raises(UserError, match="other images"):
        train.evaluate.check_same_images(checkpoint, moved, path)
    checkpoint.pop("options")
    with pytest.raises(UserError, match="other images"):
        train.evaluate.check_same_images(checkpoint, digits, path)


def test_options_take_numpys_numbers_and_paths(tmp_path: Path):
    options = train.make_options(lr=np.logspace(-4, -2, 3)[1], epochs=np.int64(3), beta=np.float32(2), out_dir=tmp_path)
    assert (options.lr, options.epochs, options.beta, options.out_dir) == (1e-3, 3, 2.0, str(tmp_path))
    options = train.make_options(lr=torch.tensor(0.5), epochs=torch.tensor(3), average=np.False_, compile=True)
    assert (options.lr, options.epochs, options.average, options.compile) == (0.5, 3, False, True)
    for bad in (
        {"epochs": True},
        {"epochs": torch.tensor([2, 3])},
        {"lr": np.array([0.1])},
        {"epochs": 2.5},
        {"lr": "fast"},
        {"average": 3},
        {"device": ["cpu"]},
        {"epoch": 3},
    ):
        with pytest.raises(UserError, match=utils.flag(next(iter(bad)))):
            train.make_options(**bad)


def test_what_is_not_a_data_set(tmp_path: Path):
    for dataset in (np.zeros((9, 4, 4)), torch.zeros(9, 4, 4), [1, 2], None):
        with pytest.raises(UserError, match="ImageData"):
            train.train(dataset, out_dir=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_unwritable_and_full(tmp_path: Path, fails: Callable, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").touch()
    assert "file" in fails(train.main, *SMALL_ARGS, "--epochs=1", "--out-dir", tmp_path / "file")

    def full_disk(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    message = fails(train.main, *SMALL_ARGS, "--epochs=1", "--out-dir", tmp_path / "runs")
    assert "checkpoint.pt: No space left" in message
    assert list((tmp_path / "runs").iterdir()) == []


def test_too_large_for_memory(tmp_path: Path, fails: Callable):
    message = fails(train.main, "--dataset=mnist-5k", f"--hidden-size={2**30}", "--out-dir", tmp_path / "runs")
    assert "memory" in message


def test_help_lists_every_argument_of_train_and_its_default(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        train.main()
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, default in vars(train.make_options()).items():
        assert utils.flag(name) in text
        assert default is None or f"(default: {default})" in text
    groups = ["data:", "model:", "training:", "objective:", "computation:"]
    assert [text.index(group) for group in groups] == sorted(text.index(group) for group in groups)


def test_command_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Every option set on the command line arrives in the run."""
    given = {
        "dataset": "mnist-5k",
        "data_dir": str(tmp_path / "data"),
        "image_size": None,
        "grayscale": True,
        "mirror": True,
        "hold_out": 100,
        "epochs": 1,
        "batch_size": 300,
        "lr": 0.002,
        "lr_schedule": "cosine",
        "beta": 0.5,
        "kl_warmup": 1.5,
        "hidden_size": 12,
        "latent_size": 2,
        "encoder_layers": 1,
        "decoder_layers": 3,
        "activation": "silu",
        "likelihood": "bernoulli",
        "init": "burda2016",
        "binarize": "threshold",
        "objective": "elbo",
        "importance_samples": 1,
        "elbo_epochs": 0,
        "adam_eps": 1e-6,
        "clip_grad_norm": 1e4,
        "average": False,
        "compile": False,
        "precision": "highest",
        "device": "cpu",
        "seed": 7,
        "out_dir": str(tmp_path / "runs"),
    }
    assert given.keys() == vars(train.make_options()).keys()
    args = [
        f"{utils.flag(name)}={value}"
        for name, value in given.items()
        if name not in ("average", "compile", "grayscale", "mirror", "image_size")
    ]
    monkeypatch.setattr(sys, "argv", ["train.py", *args, "--no-average", "--no-compile", "--grayscale", "--mirror"])
    train.main()
    run = tmp_path / "runs" / "001-mnist-5k-z2"
    assert saved(run)["options"] == {name: given[name] for name in given.keys() - {"data_dir", "out_dir"}}
    model, _ = utils.load_checkpoint(run)
    assert len(list(model.decoder.children())) == 4
    output = capsys.readouterr().out
    assert re.search(
        r"epoch 1/1 +train +[\d.]+ +test +[\d.]+ = reconstruction +[\d.]+ \+ KL +[\d.]+ +[\d,]+ images/s", output
    )
    assert f"python evaluate.py {run}" in output

    monkeypatch.setattr(sys, "argv", ["train.py", "--resume", str(run), "--epochs", "2"])
    train.main()
    assert saved(run)["epoch"] == 2


@pytest.mark.parametrize(
    "change",
    [
        {"lr": 1e-2},
        {"lr_schedule": "cosine"},
        {"beta": 2.0},
        {"kl_warmup": 1.0},
        {"batch_size": 100},
        {"activation": "tanh"},
        {"init": "burda2016"},
        {"binarize": "none"},
        {"likelihood": "logistic"},
        {"mirror": True},
        {"binarize": "threshold"},
        {"adam_eps": 1.0},
        {"clip_grad_norm": 500.0},
        {"average": False},
        {"objective": "iwae"},
        {"objective": "iwae", "importance_samples": 3},
    ],
)
def test_every_option_changes_what_is_learned(change: dict, tmp_path: Path):
    a = train.train(**SMALL, epochs=1, out_dir=str(tmp_path))[2]
    b = train.train(**(SMALL | change), epochs=1, out_dir=str(tmp_path))[2]
    assert not same_weights(a, b)
