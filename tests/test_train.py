"""The training loop and the train command."""

import copy
import csv
import dataclasses
import gc
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributions import Bernoulli, Normal
from torch.multiprocessing.reductions import StorageWeakRef

import runs
import train
import utils
from data import ImageData
from experiments import burda2016
from model import VAE, loss_criterion
from tests.conftest import same_weights, saved, thinned
from utils import UserError

SMALL = {"dataset": "mnist-5k", "hidden_size": 16, "latent_size": 3, "batch_size": 500, "device": "cpu"}
SMALL_ARGS = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]


pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture(autouse=True)
def small_data(digits: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fifth of the bundled digits."""
    few = thinned(digits, 5)
    monkeypatch.setattr(train, "load_dataset", lambda *args: few.hold_out(*args[3:4] or [0]))


# ---------------------------------------------------------------------------------------------------------------------
# The loop


@pytest.mark.parametrize(("at_once", "largest_norm"), [(1, math.inf), (3, 2150.0)])  # about half are larger
def test_epochs_are_plain_adam_on_the_criterion(digits: ImageData, at_once: int, largest_norm: float, monkeypatch):
    """train_epoch, twice, against the loop as a tutorial writes it, with the same draws."""
    images, labels = digits.test_images[:500].flatten(1), digits.test_labels[:500]
    clip = None if largest_norm == math.inf else largest_norm
    options = {"batch_size": 128, "beta": 0.7, "clip_grad_norm": clip, "precision": "highest"}
    options = train.make_options(**SMALL | options)
    model = VAE(784, 16, 3).double()
    reference, average = copy.deepcopy(model), copy.deepcopy(model).requires_grad_(False)

    def inputs_and_targets(images: torch.Tensor, mode: str) -> tuple[torch.Tensor, torch.Tensor]:
        return (torch.bernoulli(images.double() / 255),) * 2

    monkeypatch.setattr(train, "inputs_and_targets", inputs_and_targets)
    monkeypatch.setattr(train, "STEPS_AT_ONCE", at_once)
    ours = train.Adam(model.parameters(), options.lr)
    steps = train.make_steps(model, ours, images, labels, options)
    bounds = [train.train_epoch(steps, model, average, ours, images, labels, epoch, options) for epoch in (1, 2)]

    adam = torch.optim.Adam(reference.parameters(), lr=options.lr)
    losses, seen, averaged, norms = [], [], [], []
    for epoch in (1, 2):
        utils.seed_epoch(options.seed, epoch)
        batches = torch.randperm(len(images)).split(128)
        for first in range(0, 4, at_once):
            gathered = batches[first : first + at_once]
            pixels, _ = inputs_and_targets(images[torch.cat(gathered)], "")
            for batch, x in zip(gathered, pixels.split([len(batch) for batch in gathered]), strict=True):
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
            averaged.append(copy.deepcopy(reference.state_dict()))
    assert sorted(seen) == sorted([*range(len(images))] * 2)
    assert torch.cat(bounds).tolist() == pytest.approx(losses)
    assert largest_norm == math.inf or min(norms) < largest_norm < max(norms)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, reference.state_dict()[name])

    # The average gives its t-th update the weight that the product of later shrinkings leaves it
    updates = range(1, len(averaged) + 1)
    weights = [10 / (t + 9) * math.prod(1 - 10 / (s + 9) for s in updates if s > t) for t in updates]
    assert sum(weights) == pytest.approx(1)
    for name, weight in average.state_dict().items():
        torch.testing.assert_close(weight, sum(w * state[name] for w, state in zip(weights, averaged, strict=True)))


def recorder(seen: list[tuple]) -> Callable[..., torch.Tensor]:
    """Stands in for steps: records its arguments, with the inputs and labels split into batches."""

    def steps(
        inputs: torch.Tensor, targets: torch.Tensor, y: torch.Tensor, rates: torch.Tensor, sizes: list[int]
    ) -> torch.Tensor:
        seen.extend(zip(inputs.split(sizes), y.split(sizes), rates, strict=True))
        return torch.zeros(len(sizes))

    return steps


def epochs_seen(images: torch.Tensor, epochs: Iterable[int], options: train.Options) -> list[tuple]:
    """The inputs, the images' numbers and the rates of each step of these epochs."""
    seen = []
    model = VAE(4, 2, 2)
    adam = train.Adam(model.parameters(), options.lr)
    for epoch in epochs:
        numbers = torch.arange(len(images))
        train.train_epoch(recorder(seen), model, copy.deepcopy(model), adam, images, numbers, epoch, options)
    return seen


def test_every_epoch_has_an_order_and_pixels_of_its_own(digits: ImageData):
    images = digits.test_images.flatten(1)
    options = train.make_options(precision="highest", binarize="dynamic")

    def draws(epoch: int) -> tuple[list[int], torch.Tensor]:
        inputs, numbers, _ = zip(*epochs_seen(images, [epoch], options), strict=True)
        order = torch.cat(numbers)
        pixels = torch.empty(images.shape)
        pixels[order] = torch.cat(inputs)
        return order.tolist(), pixels

    (first, pixels), (second, other_pixels), (again, same_pixels) = map(draws, (1, 2, 1))
    assert sorted(first) == list(range(len(images)))
    assert first == again != second
    assert torch.equal(pixels, same_pixels)
    is_gray = (images > 64) & (images < 192)
    assert (pixels != other_pixels)[is_gray].float().mean() > 0.3  # of fair coins, a half
    assert not pixels[images == 0].any()
    assert pixels[images == 255].all()


def test_schedules_go_on_within_an_epoch():
    """From 0 at the very first step, in equal parts of an epoch, with Adam's corrections of each step."""
    schedules = {"lr": 2.0, "lr_schedule": "cosine", "epochs": 4, "beta": 3.0, "kl_warmup": 2.5}
    options = train.make_options(batch_size=250, precision="highest", binarize="threshold", **schedules)
    seen = epochs_seen(torch.zeros(1000, 4, dtype=torch.uint8), (1, 2, 3), options)
    expected = []
    for i in range(12):
        lr = 1 + math.cos(math.pi * i / 16)
        root = math.sqrt(1 - 0.999 ** (i + 1))
        expected.append([lr * root / (1 - 0.9 ** (i + 1)), 1e-8 * root, min(3, 3 * i / 10)])
    torch.testing.assert_close(torch.stack([rates for *_, rates in seen]), torch.tensor(expected), rtol=1e-5, atol=0)


def test_a_schedule_of_ones_own_reaches_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A rate of 0 from the second epoch on leaves the weights of the first."""
    monkeypatch.setattr(sys, "argv", ["train.py", *SMALL_ARGS, "--epochs=2", "--lr=0.01", f"--out-dir={tmp_path}"])
    train.main(learning_rate=lambda done, options: options.lr if done < 1 else 0.0)
    _, _, once = train.train(**SMALL, epochs=1, lr=0.01, out_dir=tmp_path)
    weights = saved(once)["training_weights"]
    stopped = saved(tmp_path / "001-mnist-5k-z3")
    assert stopped["epoch"] == 2
    assert all(torch.equal(value, weights[name]) for name, value in stopped["training_weights"].items())


@pytest.mark.parametrize(
    ("ranks", "num_images", "batch_size", "sizes"),
    [
        (1, 11, 5, [5, 6]),
        (1, 12, 5, [5, 5, 2]),
        (1, 3, 1, [1, 1, 1]),
        (1, 4, 9, [4]),
        (3, 25, 10, [10, 15]),
        (3, 26, 10, [10, 10, 6]),
    ],
)
def test_a_last_batch_gives_every_process_two_images(ranks, num_images, batch_size, sizes, monkeypatch):
    """Or joins the batch before, because normalizations need two. Processes share what one would have taken."""
    options = train.make_options(batch_size=batch_size, precision="highest", binarize="threshold")
    images = torch.zeros(num_images, 4, dtype=torch.uint8)
    shares, noise = [], set()
    for rank in range(ranks):
        monkeypatch.setattr(train, "rank_and_ranks", lambda rank=rank: (rank, ranks))
        _, numbers, _ = zip(*epochs_seen(images, [1], options), strict=True)
        shares.append(numbers)
        noise.add(torch.rand(()).item())
    assert len(noise) == ranks
    batches = [torch.cat(parts) for parts in zip(*shares, strict=True)]
    assert [len(batch) for batch in batches] == sizes
    assert torch.cat(batches).sort().values.tolist() == list(range(num_images))
    assert batch_size == 1 or min(len(share) for numbers in shares for share in numbers) >= 2


def take_same_steps(ours: train.Adam, theirs: torch.optim.Adam, steps: int) -> None:
    """With gradients of many sizes, and another step size each time."""
    for i in range(steps):
        gradients = [torch.randn_like(weight) * 10.0 ** torch.randint(-6, 3, weight.shape) for weight in ours.weights]
        for weight, gradient in zip(theirs.param_groups[0]["params"], gradients, strict=True):
            weight.grad = gradient
        lr = theirs.param_groups[0]["lr"] = 1e-3 * (1 + i % 3)
        theirs.step()
        ours.update(gradients, *torch.tensor(ours.corrected(lr, 0), dtype=ours.weights[0].dtype))
        ours.steps += 1


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)
def test_adam_is_that_of_torch(dtype: torch.dtype, rounding: float):
    """Over 60 steps, and over 20 more after a new one of each has continued from the other's state."""
    start = [torch.randn(50, 20, dtype=dtype), torch.randn(7, dtype=dtype)]
    weights, others = ([weight.clone().requires_grad_() for weight in start] for _ in range(2))
    eps = 1e-4 if dtype == torch.float64 else 1e-8
    ours = train.Adam(weights, lr=1e-3, eps=eps, betas=(0.8, 0.95))
    theirs = torch.optim.Adam(others, eps=eps, betas=(0.8, 0.95))
    take_same_steps(ours, theirs, 60)
    assert not any(torch.allclose(*pair, atol=0.01) for pair in zip(weights, start, strict=True))
    our_state = copy.deepcopy(ours.state_dict())
    ours = train.Adam(weights, lr=1e-3, eps=eps, betas=(0.8, 0.95))
    ours.load_state_dict(theirs.state_dict())
    theirs = torch.optim.Adam(others)
    theirs.load_state_dict(our_state)
    take_same_steps(ours, theirs, 20)
    for weight, other in zip(weights, others, strict=True):
        torch.testing.assert_close(weight, other, rtol=rounding, atol=rounding)


def test_initialize(digits: ImageData):
    """Glorot & Bengio's uniform law (2010, eq. 16), and a decoder that, of nothing, makes the mean image."""
    torch.manual_seed(0)
    model = VAE(784, 300, 20)
    burda2016.initialize(model, digits.train_images.flatten(1))
    for name, weight in model.state_dict().items():
        if name.endswith("weight"):
            bound = math.sqrt(6 / sum(weight.shape))
            assert 0.98 * bound < weight.abs().max() <= bound
            assert weight.std() == pytest.approx(bound / math.sqrt(3), rel=0.05)
        elif name != "decoder.fc2.bias":
            assert torch.all(weight == 0)
    mean = (digits.train_images.flatten(1) / 255).mean(0).clamp(0.001, 0.999)
    torch.testing.assert_close(model.decode(torch.zeros(20)).detach(), mean, rtol=1e-4, atol=1e-6)


def test_iwae_objective_is_the_bound_of_torch_distributions(digits: ImageData):
    """Adam goes down the gradient of -log mean w of the K draws; what is reported is the mean of their -log w."""
    eps = 1e10  # with which Adam's first step is lr / eps times the gradient
    options = train.make_options(batch_size=500, binarize="threshold", lr=1e-3 * eps, precision="highest")
    images, labels = digits.test_images[:500].flatten(1), digits.test_labels[:500]
    model = VAE(784, 16, 3)
    before = copy.deepcopy(model)
    adam = train.Adam(model.parameters(), options.lr, eps)
    steps = train.make_steps(model, adam, images, labels, options, num_samples=6)
    (neg_elbo,) = train.train_epoch(steps, model, copy.deepcopy(model), adam, images, labels, 1, options)

    utils.seed_epoch(options.seed, 1)
    inputs, targets = train.inputs_and_targets(images[torch.randperm(500)], "threshold")
    q = before.posterior(inputs)
    posterior, prior = Normal(q.mu, torch.exp(0.5 * q.logvar)), Normal(0.0, 1.0)
    z = posterior.mean + posterior.stddev * torch.randn(6, 500, 3)
    log_joint = Bernoulli(before.decode(z)).log_prob(targets).sum(-1) + prior.log_prob(z).sum(-1)
    log_weights = (log_joint - posterior.log_prob(z).sum(-1)).double()
    assert neg_elbo.item() == pytest.approx(-log_weights.mean(0).sum().item(), rel=1e-4)
    (-log_weights.exp().mean(0).log().sum()).backward()
    for (name, weight), old in zip(model.named_parameters(), before.parameters(), strict=True):
        taken = (old - weight) / 1e-3
        torch.testing.assert_close(taken, old.grad, rtol=0.02, atol=0.02 * old.grad.abs().max().item(), msg=name)


def test_what_a_run_leaves(tmp_path: Path, capsys: pytest.CaptureFixture):
    """It learns, prints its losses, and keeps the model that it tested, not the weights that Adam left."""
    seen = []
    options = SMALL | {"epochs": 10, "lr": 1e-2, "out_dir": tmp_path}
    model, history, run = train.train(**options, on_epoch=lambda model, history: seen.append((model, len(history))))
    assert seen == [(model, epoch) for epoch in range(1, 11)]
    assert history[0]["test_loss"] > 1.5 * history[-1]["test_loss"]  # 784 ln 2 = 543 before the first step
    for row in history:
        assert row["test_loss"] == pytest.approx(row["test_reconstruction"] + row["test_kl"])
        assert row["images_per_second"] * row["seconds"] == pytest.approx(1000)
    with open(run / "metrics.csv") as file:
        table = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    assert table == history

    first, *lines, _ = capsys.readouterr().out.splitlines()
    encoder = (784 + 1) * 16 + (16 + 1) * 16 + 2 * (16 + 1) * 3
    decoder = (3 + 1) * 16 + (16 + 1) * 784
    for says in ("1,000 training images", f"{encoder + decoder:,} weights", str(run), "--resume"):
        assert says in first
    told = [float(word.replace(",", "")) for word in re.findall(r"[\d,]+\.?\d*", lines[0].removeprefix("epoch  1/10"))]
    names = ("train_loss", "test_loss", "test_reconstruction", "test_kl", "images_per_second")
    assert told == pytest.approx([history[0][name] for name in names], rel=1e-3, abs=0.5)

    loaded, checkpoint = runs.load_checkpoint(run)
    x = torch.rand(2, 784)
    assert torch.equal(loaded.reconstruct(x), model.reconstruct(x))
    with train.matmul_precision(checkpoint["options"]["precision"], "cpu"):
        found = train.measure.encode(model, train.measure.make_test_set(train.load_dataset(), "dynamic"))
    assert history[-1]["test_kl"] == pytest.approx(found.kl.mean().item())
    reconstruction = found.reconstruction.mean().item()
    assert history[-1]["test_reconstruction"] == pytest.approx(reconstruction, rel=0.02)  # other draws
    adam = torch.optim.Adam(VAE(784, 16, 3).parameters())
    adam.load_state_dict(checkpoint["optimizer_state_dict"])
    assert type(adam.param_groups[0]["lr"]) is float


def test_a_data_set_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: Callable):
    monkeypatch.undo()  # of what keeps pictures from being drawn
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
    assert "mine" in fails(train.main, "--resume", run, "--epochs", "6")
    assert "mine" in fails(train.evaluate.main, run)
    with pytest.raises(UserError, match="other images"):
        train.resume(run, epochs=6, dataset="mnist-5k")


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("schedule", [{}, {"lr_schedule": "cosine", "kl_warmup": 2.0}])
def test_a_run_that_is_interrupted_goes_on_to_the_same_end(schedule: dict, tmp_path: Path):
    def interrupt(model: VAE, history: train.History) -> None:
        if len(history) == 2:
            raise KeyboardInterrupt

    options = SMALL | schedule | {"epochs": 3, "out_dir": tmp_path}
    _, expected, straight = train.train(**options)
    with pytest.raises(KeyboardInterrupt):
        train.train(**options, on_epoch=interrupt)
    run = tmp_path / "002-mnist-5k-z3"
    assert not same_weights(run, straight)
    torch.manual_seed(123)
    _, history, resumed = train.resume(run)
    assert resumed == run
    assert same_weights(run, straight)
    for name in ("epoch", "train_loss", "test_loss"):
        assert [row[name] for row in history] == [row[name] for row in expected]
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
    runs.save_checkpoint(first / "checkpoint.pt", checkpoint)
    train.resume(first, epochs=3)
    assert same_weights(straight, first)


@pytest.mark.parametrize(
    "batch_size", [100, 1000]
)  # 1000: one step an epoch, whose loss is finite, but not its weights
def test_a_loss_that_explodes_leaves_the_epoch_before(batch_size: int, tmp_path: Path):
    _, _, run = train.train(**(SMALL | {"batch_size": batch_size}), epochs=1, out_dir=str(tmp_path))
    checkpoint = saved(run)
    checkpoint["options"]["lr"] = 1e30
    runs.save_checkpoint(run / "checkpoint.pt", checkpoint)
    with pytest.raises(UserError, match=r"epoch 2.*--lr"):
        train.resume(run, epochs=3)
    assert saved(run)["epoch"] == 1
    runs.load_checkpoint(run)


# ---------------------------------------------------------------------------------------------------------------------
# What a run leaves


def test_curves_show_the_history():
    columns = ("train_loss", "test_loss", "test_reconstruction", "test_kl")
    history = [{"epoch": e} | {name: 100 * i + e for i, name in enumerate(columns)} for e in range(1, 31)]
    figure = train.pictures.draw_curves(history, "caption")
    lines = [line for axes in figure.axes for line in axes.lines]
    for line, name in zip(lines, columns, strict=True):
        assert list(line.get_xdata()) == list(range(1, 31))
        assert list(line.get_ydata()) == [row[name] for row in history]


@pytest.mark.parametrize("mirror", [False, True])
def test_train_loss_is_the_mean_over_the_images(mirror: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of the losses of all steps, the last of which has fewer images. A mirror image counts as one."""
    sums = []
    train_epoch = train.train_epoch

    def recorded(*args: object) -> torch.Tensor:
        neg_elbos = train_epoch(*args)
        sums.append(sum(neg_elbos.tolist()))
        return neg_elbos

    monkeypatch.setattr(train, "train_epoch", recorded)
    _, history, _ = train.train(**SMALL | {"batch_size": 300}, epochs=2, mirror=mirror, out_dir=tmp_path)
    num_images = 2000 if mirror else 1000
    assert [row["train_loss"] for row in history] == pytest.approx([total / num_images for total in sums])
    assert [row["images_per_second"] * row["seconds"] for row in history] == pytest.approx([num_images] * 2)


# ---------------------------------------------------------------------------------------------------------------------
# The command


@pytest.mark.parametrize(
    ("args", "names"),
    [
        (["--epochs", "0"], "--epochs"),
        (["--batch-size", str(10**20)], "--batch-size"),
        (["--lr", "nan"], "--lr"),
        (["--lr-schedule", "linear"], "--lr-schedule"),
        (["--beta", "-1"], "--beta"),
        (["--clip-grad-norm", "0"], "--clip-grad-norm"),
        (["--device", "tpu"], "--device"),
        (["--device", "cuda"], "cuda"),
        (["--seed", "-1"], "--seed"),
        (["--importance-samples", "5"], "iwae"),
        (["--elbo-epochs", "5"], "--elbo-epochs"),
        (["--objective", "iwae", "--beta", "2"], "--beta"),
        (["--objective", "iwae", "--elbo-epochs", "5", "--kl-warmup", "6"], "--kl-warmup"),
        (["--latnt-size", "3"], "did you mean --latent-size?"),
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

    whole = saved(run)
    runs.save_checkpoint(run / "checkpoint.pt", whole | {"options": whole["options"] | {"lr": "fast"}})
    assert "--lr" in fails(train.main, "--resume", run, "--epochs", "2")
    kept = {key: whole[key] for key in ("model", "model_state_dict", "optimizer_state_dict")}
    runs.save_checkpoint(run / "checkpoint.pt", kept)
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
    assert "already trained" in capsys.readouterr().out
    assert "larger --epochs" in fails(train.main, "--resume", run, "--epochs", "1")


def test_a_run_takes_no_other_images_or_labels_than_its_own(digits, tmp_path, monkeypatch, fails):
    """It is not tested on others of the same name either, unless that is asked for."""
    few = train.load_dataset()  # every fifth
    _, _, run = train.train(**SMALL | {"dataset": few}, epochs=1, out_dir=tmp_path)
    images, labels = few.test_images.clone(), few.train_labels
    images[0, 0, 0] = 1
    moved = replace(
        few,  # the last training image is the first test image now
        train_images=few.train_images[:-1],
        train_labels=labels[:-1],
        test_images=torch.cat([few.train_images[-1:], few.test_images]),
        test_labels=torch.cat([labels[-1:], few.test_labels]),
    )
    others = {"images": replace(few, test_images=images), "labels": replace(few, train_labels=9 - labels)}
    for what, other in (*others.items(), ("images", moved), ("images", digits)):
        with pytest.raises(UserError, match=f"{run}.*other {what}"):
            train.resume(run, dataset=other, epochs=2)
    for module in (train, train.evaluate):
        monkeypatch.setattr(module, "load_dataset", lambda *args: digits)
    assert "other images" in fails(train.main, "--resume", run, "--epochs=2")
    assert "other images" in fails(train.evaluate.main, run)
    metrics = train.evaluate.evaluate_run(run, dataset="mnist-5k", nll_samples=1, out_dir=tmp_path)
    assert metrics["num_images"] == len(digits.test_images)
    train.resume(run, dataset=few, epochs=2)


def test_options_take_numpys_numbers_and_paths(digits: ImageData, tmp_path: Path):
    options = train.make_options(lr=np.float32(2), epochs=np.int64(3), average=np.False_, out_dir=tmp_path)
    assert (options.lr, options.epochs, options.average, options.out_dir) == (2.0, 3, False, str(tmp_path))
    for bad in ({"epochs": True}, {"epochs": 2.5}, {"lr": "fast"}, {"average": 3}, {"device": ["cpu"]}, {"epoch": 3}):
        with pytest.raises(UserError, match=utils.flag(next(iter(bad)))):
            train.make_options(**bad)
    options = train.make_options()
    assert options.resolve(digits).epochs == 150
    assert options.resolve(replace(digits, name="mnist")).epochs == 20


def test_unwritable(tmp_path: Path, fails: Callable):
    (tmp_path / "file").touch()
    assert "file" in fails(train.main, *SMALL_ARGS, "--epochs=1", "--out-dir", tmp_path / "file")


def test_too_large_for_memory(tmp_path: Path, fails: Callable):
    message = fails(train.main, "--dataset=mnist-5k", f"--hidden-size={2**30}", "--out-dir", tmp_path / "runs")
    assert "memory" in message


def test_help_lists_every_argument_of_train_and_its_default(call: Callable, capsys):
    with pytest.raises(SystemExit) as stop:
        call(train.main, "--help")
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, default in dataclasses.asdict(train.make_options()).items():
        assert utils.flag(name) in text
        assert default is None or f"(default: {default})" in text
    groups = ["data:", "model:", "training:", "objective:", "computation:"]
    assert [text.index(group) for group in groups] == sorted(text.index(group) for group in groups)


def test_command_end_to_end(tmp_path: Path, call: Callable, capsys: pytest.CaptureFixture):
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
    assert given.keys() == dataclasses.asdict(train.make_options()).keys()
    args = [
        f"{utils.flag(name)}={value}"
        for name, value in given.items()
        if name not in ("average", "compile", "grayscale", "mirror", "image_size")
    ]
    call(train.main, *args, "--no-average", "--no-compile", "--grayscale", "--mirror")
    run = tmp_path / "runs" / "001-mnist-5k-z2"
    assert saved(run)["options"] == {name: given[name] for name in given.keys() - {"data_dir", "out_dir"}}
    model, checkpoint = runs.load_checkpoint(run)
    assert len(list(model.decoder.children())) == 4
    weights = checkpoint["training_weights"]
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())  # with --no-average
    assert f"python evaluate.py {run}" in capsys.readouterr().out

    call(train.main, "--resume", run, "--epochs=2", "--precision=medium")
    assert (saved(run)["epoch"], saved(run)["options"]["precision"]) == (2, "medium")


def test_options_change_what_is_learned(tmp_path: Path):
    """In two epochs, because the first update of the average is the weights themselves."""
    _, _, usual = train.train(**SMALL, epochs=2, out_dir=str(tmp_path))
    _, _, again = train.train(**SMALL, epochs=2, out_dir=str(tmp_path))
    assert same_weights(usual, again)
    for change in (
        {"seed": 1},
        {"lr_schedule": "cosine"},
        {"activation": "tanh"},
        {"likelihood": "logistic"},
        {"adam_eps": 1.0},
        {"average": False},
        {"objective": "iwae", "importance_samples": 3},
    ):
        _, _, changed = train.train(**(SMALL | change), epochs=2, out_dir=str(tmp_path))
        assert not same_weights(usual, changed), change


@pytest.mark.parametrize("compile", [False, True])
def test_nothing_keeps_the_images_after_a_run(compile: bool, tmp_path: Path, monkeypatch, quick_compiler: None):
    """Neither the data set's nor the copy that is trained on, which fills a GPU: not even a cycle of references."""
    kept = []
    training_images = train.training_images

    def recorded(*args: object) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = training_images(*args)
        kept.append(StorageWeakRef(images.untyped_storage()))
        return images, labels

    monkeypatch.setattr(train, "training_images", recorded)
    images = torch.randint(0, 256, (90, 1, 7, 7), dtype=torch.uint8)
    labels = torch.arange(90) % 2
    data = ImageData("mine", ["even", "odd"], images, labels, images.clone(), labels)
    kept.append(StorageWeakRef(images.untyped_storage()))
    options = {"hidden_size": 8, "latent_size": 2, "batch_size": 20, "device": "cpu", "mirror": True}
    gc.collect()
    gc.disable()
    try:
        results = train.train(data, **options, compile=compile, epochs=2, out_dir=tmp_path)
        assert saved(results[2])["options"]["compile"] == compile
        assert not kept[0].expired()
        del results, data, images
        assert [storage.expired() for storage in kept] == [True, True]
    finally:
        gc.enable()
