"""The benchmarks run, and their figures are those of what they say they measure."""

import json
import statistics
from pathlib import Path

import pytest
import torch

import evaluate
import utils
from benchmarks import likelihood, throughput
from data import load_dataset
from tests.conftest import processes

SMALL = ["--dataset=mnist-5k", "--images=600", "--hidden-size=16", "--latent-size=2", "--repeats=2", "--device=cpu"]


def call(monkeypatch: pytest.MonkeyPatch, *args: str) -> dict:
    monkeypatch.setattr("sys.argv", ["throughput.py", *args])
    throughput.main()
    (path,) = (arg.removeprefix("--json=") for arg in args if arg.startswith("--json="))
    return json.loads(Path(path).read_text())


def test_compare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setattr(torch.multiprocessing, "get_context", lambda _: processes)
    arguments = (*SMALL, f"--json={tmp_path / 'all.json'}", f"--picture={tmp_path / 'speeds.png'}")
    measured = call(monkeypatch, *arguments)
    seconds = measured["seconds"]
    assert {len(values) for values in seconds.values()} == {2}
    for name, speedup in measured["speedup"].items():
        ratios = [a / b for a, b in zip(seconds[name], seconds["train.py"], strict=True)]
        assert speedup == pytest.approx(statistics.median(ratios))
    assert measured["speedup"].keys() - {"JAX"} == {"conventional"}
    assert min(map(statistics.median, seconds.values())) == statistics.median(seconds[measured["floor"]])
    assert (tmp_path / "speeds.png").read_bytes().startswith(b"\x89PNG")
    images_per_second = 600 / statistics.median(seconds["train.py"])
    printed = capsys.readouterr().out
    assert f"| train.py | {images_per_second:,.0f} | 1.00 |" in printed
    assert ("| JAX |" in printed) == ("JAX" in seconds) != ("pip install" in printed)


def test_the_floor_is_the_layers_arithmetic(monkeypatch: pytest.MonkeyPatch):
    """Multiply-adds of one step: 3 a weight and image, but 2 in the first layer, which needs no gradient of images."""
    counted = []
    monkeypatch.setattr(
        torch.Tensor,
        "__matmul__",
        lambda a, b, matmul=torch.matmul: counted.append(a.shape[0] * a.shape[1] * b.shape[1]) or matmul(a, b),
    )
    parser_defaults = {"batch_size": 60, "hidden_size": 16, "latent_size": 2, "device": "cpu"}
    parser_defaults |= {"encoder_layers": 2, "decoder_layers": 1, "activation": "relu"}
    data = load_dataset("mnist-5k")
    args = type("Args", (), parser_defaults)
    throughput.matrix_products(throughput.first_images(data, 600), args, torch.float32, "highest")()
    weights = 784 * 16 + 16 * 16 + 2 * 16 * 2 + 2 * 16 + 16 * 784
    assert sum(counted) == (10 + 10) * 60 * (3 * weights - 784 * 16)  # ten steps to warm up


def test_tricks_can_be_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    measured = call(monkeypatch, "tricks", *SMALL, f"--json={tmp_path / 'all.json'}")
    assert len(measured["seconds"]) == len(throughput.TRICKS) - 1 + 2  # on the CPU no graph, but with all and with none
    with throughput.without(*throughput.TRICKS):
        assert throughput.train.AVERAGES_PER_EPOCH == 10**9
        torch.manual_seed(0)
        images = torch.full((4000, 10), 64, dtype=torch.uint8)
        sample, _ = throughput.train.binarize(images, "dynamic")
        assert sample.mean().item() == pytest.approx(64 / 255, abs=0.01)
    assert throughput.train.AVERAGES_PER_EPOCH == 50


def test_scaling_is_drawn():
    sizes = {"batch_size": (1, 2), "hidden_size": (3, 4), "images": [5, 6]}
    seconds = {name: {"conventional": [1.0, 2.0], "train.py": [0.1, 0.2]} for name in sizes}
    figure = throughput.draw_scaling(sizes, seconds, "title")
    for axes, values in zip(figure.axes, sizes.values(), strict=True):
        assert [list(line.get_xdata()) for line in axes.lines] == [list(values)] * 2
        assert axes.get_xscale() == axes.get_yscale() == "log"


@pytest.mark.parametrize("option", ["--repeats=0", "--threads=-1", "--batch-size=x", "--dataset=none"])
def test_bad_options(option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setattr("sys.argv", ["throughput.py", option])
    with pytest.raises(SystemExit) as stop:
        throughput.main()
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert option.split("=")[0] in error
    assert error.count("\n") == 1


def test_likelihood_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setattr(likelihood.train, "draw", lambda *args: None)
    small = ["--dataset=mnist-5k", "--hidden-size=8", "--epochs=2", f"--out-dir={tmp_path}", "--device=cpu"]
    recipes = ["kingma2014-2d", "pytorch-example"]
    monkeypatch.setattr("sys.argv", ["likelihood.py", *recipes, "--after", "1", "--nll-samples=3", *small])
    likelihood.main()
    table = capsys.readouterr().out.splitlines()[-5:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table[1:]]
    assert [row[:2] for row in rows] == [[recipe, epochs] for recipe in recipes for epochs in "12"]
    test_images = load_dataset("mnist-5k").test_images
    for row, binarize in ((rows[1], "dynamic"), (rows[3], "none")):
        model, _ = utils.load_checkpoint(next(tmp_path.glob("001*" if binarize == "dynamic" else "002*")))
        metrics = evaluate.evaluate(model, test_images, binarize, 3 if binarize == "dynamic" else 1)
        assert float(row[3]) == pytest.approx(metrics["neg_elbo"], abs=0.02)
        assert row[4] == (f"{metrics['nll']:.2f} (3 samples)" if binarize == "dynamic" else "")
        assert int(row[5]) == metrics["active_units"]


def test_likelihood_refuses_before_it_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for wrong in ("--nll-samples=0", "--epochs=0"):
        monkeypatch.setattr("sys.argv", ["likelihood.py", "original", "--dataset=mnist-5k", "--epochs=1", wrong])
        with pytest.raises(SystemExit) as stop:
            likelihood.main()
        assert stop.value.code == 2
    assert not (tmp_path / "runs").exists()
