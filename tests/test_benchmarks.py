"""The benchmarks run, and their figures are those of what they say they measure."""

import itertools
import json
import statistics
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
import runs
import step
import train
from benchmarks import convolutions, few_pictures, likelihood, throughput
from data import ImageData, inputs_and_targets
from model import VAE
from tests.conftest import processes

SMALL = ["--dataset=mnist-5k", "--images=600", "--hidden-size=16", "--latent-size=2", "--repeats=2", "--device=cpu"]


@pytest.fixture
def measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict]:
    """Runs throughput.py -> what it measured."""

    def run(*args: str) -> dict:
        path = tmp_path / "measured.json"
        monkeypatch.setattr("sys.argv", ["throughput.py", *SMALL, *args, f"--json={path}"])
        throughput.main()
        return json.loads(path.read_text())

    return run


def test_compare(measure: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setattr(torch.multiprocessing, "get_context", lambda _: processes)
    measured = measure(f"--picture={tmp_path / 'speeds.png'}")
    seconds = measured["seconds"]
    assert {len(passes) for passes in seconds.values()} == {2}
    for name, times in measured["times"].items():
        turns = zip(seconds[name], seconds["train.py"], strict=True)
        assert times == pytest.approx(statistics.median(a / b for a, b in turns))
    products = [name for name in seconds if name.startswith("matrix products")]
    assert seconds.keys() - {"JAX", *products} == {"conventional", "train.py"}
    assert measured["floor"] == min(products, key=lambda name: statistics.median(seconds[name]))
    assert (tmp_path / "speeds.png").read_bytes().startswith(b"\x89PNG")
    images_per_second = 600 / statistics.median(seconds["train.py"])
    printed = capsys.readouterr().out
    assert f"| train.py | {images_per_second:,.0f} | 1.00 |" in printed


def test_the_floor_is_the_layers_arithmetic(digits: ImageData, monkeypatch: pytest.MonkeyPatch):
    """Multiply-adds of one step: 3 a weight and image, but 2 in the first layer, which needs no gradient of images."""
    counted = []
    monkeypatch.setattr(
        torch.Tensor,
        "__matmul__",
        lambda a, b, matmul=torch.matmul: counted.append(a.shape[0] * a.shape[1] * b.shape[1]) or matmul(a, b),
    )
    options = train.make_options(batch_size=60, hidden_size=16, latent_size=2, device="cpu")
    throughput.matrix_products(throughput.first_images(digits, 600), options, "highest")()
    weights = 784 * 16 + 16 * 16 + 2 * 16 * 2 + 2 * 16 + 16 * 784
    assert sum(counted) == 10 * 60 * (3 * weights - 784 * 16)


def test_tricks_can_be_done_without(measure: Callable):
    measured = measure("tricks", "--repeats=1")
    assert len(measured["seconds"]) == len(throughput.TRICKS) - 1 + 2  # on the CPU no graph, but with all and with none
    options = train.make_options(device="cpu", epochs=10**6, batch_size=128)
    images = torch.full((4000, 2, 5), 64, dtype=torch.uint8)
    labels = torch.zeros(4000, dtype=torch.int64)
    dataset = ImageData("gray", ["gray"], images, labels, images, labels)
    with throughput.without(*throughput.TRICKS):
        assert train.STEPS_AT_ONCE == 1
        options = options.resolve(dataset)
        options = options.resolve_for(VAE.for_data(dataset, options), dataset)
        assert (options.compile, options.precision) == (False, "highest")
        sample, _ = inputs_and_targets(images, "dynamic")
        assert sample.mean().item() == pytest.approx(64 / 255, abs=0.01)
        assert len(throughput.data.draw_bits(images.shape, images.device).unique()) > 39_000  # of 2^16, 30,000
    assert train.STEPS_AT_ONCE == 8


def test_results(measure: Callable, digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(train, "draw", lambda *_: None)
    losses = measure("results", "--epochs=1")["neg_elbo"]
    few = throughput.first_images(digits, 600)
    sizes = {"hidden_size": 16, "latent_size": 2, "device": "cpu"}
    for seed in (0, 1):
        model, _, _ = train.train(few, seed=seed, epochs=1, out_dir=tmp_path, **sizes)
        expected = evaluate.evaluate(model, digits.test_images, nll_samples=1)["neg_elbo"]
        assert losses["with all tricks"][seed] == pytest.approx(expected, abs=0.01)
        assert 0 < abs(losses["with none"][seed] - expected) < 20


def test_nll(measure: Callable, monkeypatch: pytest.MonkeyPatch, quick_compiler: None, capsys):
    monkeypatch.setattr(throughput.measure, "BLOCKS", {"cpu": (30, 100)})  # fewer and larger ones are sooner done
    compiled, make = [], throughput.measure.compile_checked
    monkeypatch.setattr(
        throughput.measure, "compile_checked", lambda *args, **how: compiled.append(args) or make(*args, **how)
    )
    seconds = measure("nll", "--images=60", "--batch-size=50", "--repeats=1")["seconds"]
    assert {name: len(passes) for name, passes in seconds.items()} == dict.fromkeys(seconds, 1)
    assert len(compiled) == 1  # one row of three is compiled, before its passes
    ratio = statistics.median(a / b for a, b in zip(seconds["nll"], seconds["matrix products"], strict=True))
    assert f" {ratio:.2f} |" in capsys.readouterr().out


def test_race(measure: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """A rival is given as much time as train.py at least, and then goes on to the goal."""
    (tmp_path / "tiny.txt").write_text("--epochs 2 --hidden-size 8 --latent-size 3")
    monkeypatch.setattr(throughput, "RECIPES", tmp_path)
    rates, sizes = [], []

    def start_rivals(dataset: ImageData, args: Namespace) -> dict[str, throughput.Loop]:
        rates.append(args.lr)
        losses = itertools.count(104, -1)
        monkeypatch.setattr(  # the models of rivals are left in training mode
            train, "compute_test_losses", lambda model, _: (99.5, next(losses) if model.training else 99.0, 0.5)
        )
        return {"rival": (lambda: 0.01, throughput.make_vae(dataset, args).state_dict)}

    def evaluate_model(model: train.VAE, images: torch.Tensor, nll_samples: int) -> dict[str, float]:
        sizes.append(model.config["latent_size"])
        return {"nll": 88.0 + model.training}

    monkeypatch.setattr(throughput, "start_rivals", start_rivals)
    monkeypatch.setattr(throughput.evaluate, "evaluate", evaluate_model)
    measured = measure("race", "--recipe=tiny", "--epochs=3")
    ours, theirs = measured["curves"]["train.py"], measured["curves"]["rival"]
    assert [loss for _, loss in ours] == [99.5] * 3
    assert 0 < ours[0][0] < ours[1][0] < ours[2][0] <= theirs[-1][0]
    assert theirs[7] == [pytest.approx(0.08), 97.5]
    assert (len(theirs) == 8) == (ours[2][0] <= 0.08)
    printed = capsys.readouterr().out
    assert "| rival | 0 | 0 |" in printed  # 99.5 after 0.06 s, and 97.5 after 0.08 s
    assert f"| train.py | {ours[0][0]:.0f} | not in {ours[2][0]:.0f} |" in printed
    assert measured["nll"] == {"rival": 89.0, "train.py": 88.0}
    assert rates == [1e-3] * 2
    assert sizes == [3, 3]


def test_convolutions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, fails: Callable):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # it takes most of the time
    images = np.random.default_rng(0).integers(0, 256, (20, 16, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "mine.npz", images=images)
    np.savez(tmp_path / "odd.npz", images=images[:, :9])
    monkeypatch.setattr(step, "bfloat16_units", set)
    monkeypatch.setattr("sys.argv", ["convolutions.py", f"--dataset={tmp_path / 'mine.npz'}", "--repeats=1"])
    convolutions.main()
    rows = [line.split(" | ")[0][2:] for line in capsys.readouterr().out.splitlines() if line.startswith("| t")]
    how = "train.py --precision highest"
    others = ["tutorial", "tutorial, its network as ours", "train.py", "train.py, products alone"]
    assert rows == [*others, how, f"{how} --compile"]
    assert "multiples of 16" in fails(convolutions.main, "--dataset", tmp_path / "odd.npz")


def test_few_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Each row is of a run on as many pictures. Here the networks are small."""
    given = []

    def train_small(dataset: ImageData, model: type, **options):
        given.append((len(dataset.train_images), options["batch_size"], options["epochs"]))
        return train.train(dataset, model, **options | {"hidden_size": 8})

    monkeypatch.setattr(train, "draw", lambda *_: None)
    monkeypatch.setattr(few_pictures, "train", train_small)
    images = np.random.default_rng(0).integers(0, 256, (100, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "mine.npz", images=images)
    arguments = ["10", "39", "--epochs=1", f"--dataset={tmp_path / 'mine.npz'}", f"--out-dir={tmp_path}"]
    monkeypatch.setattr("sys.argv", ["few_pictures.py", *arguments])
    few_pictures.main()
    assert given == [(10, 32, 1), (39, 32, 1)]
    rows = [line.split(" | ")[:2] for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert rows == [["| pictures", "epochs"], ["| ---", "---"], ["| 10", "1"], ["| 39", "1"]]


@pytest.mark.parametrize("option", ["--repeats=0", "--batch-size=5001", "--dataset=none"])
def test_bad_options(option: str, fails: Callable):
    error = fails(throughput.main, "--dataset=mnist-5k", option)
    assert option.split("=")[0] in error


def test_likelihood_rows(digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(train, "draw", lambda *_: None)
    small = ["--dataset=mnist-5k", "--hidden-size=8", "--epochs=2", f"--out-dir={tmp_path}", "--device=cpu"]
    recipes = ["kingma2014-2d", "pytorch-example"]
    monkeypatch.setattr("sys.argv", ["likelihood.py", *recipes, "--nll-samples=3", *small])
    likelihood.main()
    table = capsys.readouterr().out.splitlines()[-2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert [row[:2] for row in rows] == [[recipe, "2"] for recipe in recipes]
    for row, run, mode in ((rows[0], "001", "dynamic"), (rows[1], "002", "none")):
        model, _ = runs.load_checkpoint(next(tmp_path.glob(f"{run}*")))
        metrics = evaluate.evaluate(model, digits.test_images, mode, 3)
        assert float(row[3]) == pytest.approx(metrics["neg_elbo"], abs=0.02)
        assert row[4] == (f"{metrics['nll']:.2f} (3 samples)" if mode == "dynamic" else "")
        assert int(row[5]) == metrics["active_units"]
