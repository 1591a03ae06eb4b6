"""The training loop and the train command."""

import copy
import csv
import errno
import inspect
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import train
import utils
from model import VAE, loss_criterion
from utils import UserError

SMALL = {"dataset": "mnist-5k", "hidden_size": 16, "latent_size": 3, "batch_size": 500, "device": "cpu"}
SMALL_ARGS = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]


@pytest.fixture(autouse=True)
def small_data(digits: utils.Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fifth of the bundled digits, and no pictures: the tests that need them ask for them."""
    few = utils.Dataset(digits.name, digits.classes, *(tensor[::5] for tensor in digits[2:]))
    monkeypatch.setattr(utils, "load_dataset", lambda name, data_dir: few)
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


def test_an_epoch_is_plain_adam_on_the_criterion(digits: utils.Dataset):
    """train_epoch against the loop as a tutorial writes it, with the same draws."""
    images = digits.test_images
    options = inspect.signature(train.train).parameters
    options = (
        {name: parameter.default for name, parameter in options.items()} | SMALL | {"batch_size": 128, "beta": 0.7}
    )
    model = VAE(784, 16, 3).double()
    reference, average = copy.deepcopy(model), copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters(), lr=options["lr"])
    monitored = train.tqdm(disable=True)

    def binarize(images: torch.Tensor, mode: str) -> tuple[torch.Tensor, torch.Tensor]:
        return (torch.bernoulli(images.double() / 255),) * 2

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "binarize", binarize)
        loss = train.train_epoch(model, average, optimizer, images, 1, options, monitored)

    utils.seed_epoch(options["seed"], 1)
    adam = torch.optim.Adam(reference.parameters(), lr=options["lr"])
    total, seen = 0.0, []
    iterates = []
    for batch in torch.randperm(len(images)).split(128):
        x, _ = binarize(images[batch], "")
        x_hat, logvar, mu, _ = reference(x)
        kl = -0.5 * (1 + logvar - mu**2 - logvar.exp()).sum()
        criterion = loss_criterion(x_hat, x, logvar, mu)
        adam.zero_grad()
        (criterion - 0.3 * kl).backward()
        adam.step()
        total += criterion.item()
        seen += batch.tolist()
        iterates.append(copy.deepcopy(reference.state_dict()))
    assert sorted(seen) == list(range(len(images)))
    assert loss == pytest.approx(total / len(images))
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, reference.state_dict()[name])

    # The average gives step t the weight that the product of later shrinkings leaves it
    weights = [
        10 / (t + 9) * math.prod(1 - 10 / (s + 9) for s in range(t + 1, len(iterates) + 1)) for t in (1, 2, 3, 4)
    ]
    assert sum(weights) == pytest.approx(1)
    for name, weight in average.state_dict().items():
        torch.testing.assert_close(weight, sum(w * step[name] for w, step in zip(weights, iterates, strict=True)))


def test_schedules():
    options = {"lr": 2.0, "epochs": 10, "lr_schedule": "cosine", "beta": 4.0, "kl_warmup": 5.0}
    rates = [train.learning_rate(done, options) for done in (0, 2.5, 5, 10)]
    assert rates == pytest.approx([2, 1 + math.sqrt(0.5), 1, 0])
    assert train.learning_rate(7, options | {"lr_schedule": "constant"}) == 2
    assert [train.kl_weight(done, options) for done in (0, 2.5, 5, 9)] == [0, 2, 4, 4]
    assert train.kl_weight(0, options | {"kl_warmup": 0.0}) == 4


def test_it_learns(tmp_path: Path):
    model, history, run = train.train(**SMALL, epochs=15, lr=1e-2, out_dir=str(tmp_path))
    assert [row["epoch"] for row in history] == list(range(1, 16))
    assert history[0]["test_loss"] > 1.5 * history[-1]["test_loss"]  # 784 ln 2 = 543 before the first step
    for row in history:
        assert row["test_loss"] == pytest.approx(row["test_bce"] + row["test_kl"])
    loaded, _ = utils.load_checkpoint(run)
    x = torch.rand(2, 784)
    assert torch.equal(loaded.reconstruct(x), model.reconstruct(x))


def test_seeds(tmp_path: Path):
    a, b, c = (train.train(**SMALL, epochs=2, seed=seed, out_dir=str(tmp_path))[2] for seed in (0, 0, 1))
    assert same_weights(a, b)
    assert not same_weights(a, c)


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


def test_interrupted_run_goes_on_to_the_same_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    options = SMALL | {"lr_schedule": "cosine", "kl_warmup": 2.0, "epochs": 3, "out_dir": str(tmp_path)}
    _, _, straight = train.train(**options)
    with monkeypatch.context() as patch:
        train_epoch = train.train_epoch

        def interrupted(*args: object) -> float:
            if args[4] == 3:
                raise KeyboardInterrupt
            return train_epoch(*args)

        patch.setattr(train, "train_epoch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train.train(**options)
    run = tmp_path / "002-mnist-5k-z3"
    assert saved(run)["epoch"] == 2
    train.resume(run)
    assert same_weights(run, straight)


def test_a_loss_that_explodes_leaves_the_epoch_before(tmp_path: Path):
    _, _, run = train.train(**SMALL, epochs=1, out_dir=str(tmp_path))
    checkpoint = saved(run)
    checkpoint["options"]["lr"] = 1e30
    utils.save_checkpoint(run / "checkpoint.pt", checkpoint)
    with pytest.raises(UserError, match=r"epoch 2.*--lr"):
        train.resume(run, epochs=3)
    assert saved(run)["epoch"] == 1


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


def test_default_epochs_follow_the_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(train, "_fit", lambda model, checkpoint, data, run: checkpoint["options"]["epochs"])
    assert train.train(**SMALL, out_dir=str(tmp_path)) == 100
    few = utils.load_dataset("", "")._replace(name="mnist")
    monkeypatch.setattr(utils, "load_dataset", lambda name, data_dir: few)
    assert train.train(out_dir=str(tmp_path)) == 20


def test_gray_targets_are_labelled(tmp_path: Path, capsys: pytest.CaptureFixture):
    for mode in utils.BINARIZE:
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
        (["--dataset", "imagenet"], "--dataset"),
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
    assert "larger --epochs" in fails(train.main, "--resume", run)
    assert "larger --epochs" in fails(train.main, "--resume", run, "--epochs", "1")
    assert "--epochs" in fails(train.main, "--resume", run, "--epochs", "-3")
    assert "--latent-size" in fails(train.main, "--resume", run, "--latent-size", "3")
    assert "nowhere" in fails(train.main, "--resume", tmp_path / "nowhere")

    whole = saved(run)
    for damage in ({"options": {}}, {"options": whole["options"] | {"lr": "fast"}}, {"options": None}, {"epoch": "1"}):
        utils.save_checkpoint(run / "checkpoint.pt", whole | damage)
        assert "cannot be resumed" in fails(train.main, "--resume", run, "--epochs", "2")
    for key in ("training_weights", "optimizer_state_dict"):
        utils.save_checkpoint(run / "checkpoint.pt", whole | {key: {}})
        assert "cannot be resumed" in fails(train.main, "--resume", run, "--epochs", "2")
    kept = {key: whole[key] for key in ("model", "model_state_dict", "optimizer_state_dict")}
    utils.save_checkpoint(run / "checkpoint.pt", kept)
    assert "cannot be resumed" in fails(train.main, "--resume", run, "--epochs", "2")
    (run / "checkpoint.pt").write_bytes(b"damaged")
    assert "damaged" in fails(train.main, "--resume", run, "--epochs", "2")


def test_unwritable_and_full(tmp_path: Path, fails: Callable, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").touch()
    assert "file" in fails(train.main, *SMALL_ARGS, "--epochs=1", "--out-dir", tmp_path / "file")

    def full_disk(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    assert "No space left" in fails(train.main, *SMALL_ARGS, "--epochs=1", "--out-dir", tmp_path / "runs")


def test_too_large_for_memory(tmp_path: Path, fails: Callable):
    message = fails(train.main, "--dataset=mnist-5k", f"--hidden-size={2**40}", "--out-dir", tmp_path / "runs")
    assert "memory" in message


@pytest.mark.parametrize("package", ["torch", "tqdm", "mlxtend", "matplotlib"])
def test_missing_package(package: str, tmp_path: Path):
    """A real process in which the package can't be imported."""
    (tmp_path / "sitecustomize.py").write_text(f"import sys; sys.modules[{package!r}] = None")
    args = [sys.executable, "train.py", *SMALL_ARGS, "--epochs=1", f"--out-dir={tmp_path / 'runs'}"]
    done = subprocess.run(args, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert re.search(rf"{package}.* is missing: pip install -r requirements.txt", done.stderr)


def test_help_lists_every_argument_of_train_and_its_default(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        train.main()
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, parameter in inspect.signature(train.train).parameters.items():
        assert f"--{name.replace('_', '-')} " in text
        assert parameter.default is None or f"(default: {parameter.default})" in text


def test_command_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Every option set on the command line arrives in the run."""
    given = {
        "dataset": "mnist-5k",
        "data_dir": str(tmp_path / "data"),
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
        "binarize": "threshold",
        "device": "cpu",
        "seed": 7,
        "out_dir": str(tmp_path / "runs"),
    }
    assert given.keys() == inspect.signature(train.train).parameters.keys()
    args = [text for name, value in given.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    monkeypatch.setattr(sys, "argv", ["train.py", *args])
    train.main()
    run = tmp_path / "runs" / "001-mnist-5k-z2"
    assert saved(run)["options"] == given
    model, _ = utils.load_checkpoint(run)
    assert len(list(model.decoder.children())) == 4
    output = capsys.readouterr().out
    assert re.search(r"epoch 1/1 +train +[\d.]+ +test +[\d.]+ = BCE +[\d.]+ \+ KL +[\d.]+ +[\d,]+ images/s", output)
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
        {"binarize": "none"},
        {"binarize": "threshold"},
    ],
)
def test_every_option_changes_what_is_learned(change: dict, tmp_path: Path):
    a = train.train(**SMALL, epochs=1, out_dir=str(tmp_path))[2]
    b = train.train(**(SMALL | change), epochs=1, out_dir=str(tmp_path))[2]
    assert not same_weights(a, b)
