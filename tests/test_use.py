"""A trained model put to use: samples as files, what each latent does, the least likely images, runs compared."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import evaluate
import pictures
import runs
import train
from benchmarks import outliers
from data import ImageData
from evaluate import sample_images
from experiments import conditional, vampprior
from measure import make_test_set
from model import VAE, DiagonalNormal
from tests.conftest import thinned

QUICK = {"epochs": 1, "hidden_size": 16, "latent_size": 3, "batch_size": 100, "device": "cpu"}


@pytest.fixture(autouse=True)
def few(digits: ImageData, no_pictures: None, monkeypatch: pytest.MonkeyPatch) -> ImageData:
    """What every command loads."""
    few = thinned(digits, 10)
    for module in (train, evaluate):
        monkeypatch.setattr(module, "load_dataset", lambda *args: few)
    return few


def read(folder: Path) -> torch.Tensor:
    """The pictures of a folder, (N, H, W) or (N, H, W, 3)."""
    return torch.stack([torch.from_numpy(np.array(Image.open(path))) for path in sorted(folder.iterdir())])


# ---------------------------------------------------------------------------------------------------------------------
# Samples


def test_samples_as_files(tmp_path: Path, call: Callable, fails: Callable):
    model, _, run = train.train("mnist-5k", **QUICK, out_dir=tmp_path)
    call(evaluate.main, run, "--samples", 12, "--seed", 5)
    pictures = read(run / "samples")
    assert (pictures.shape, pictures.dtype) == ((12, 28, 28), torch.uint8)
    torch.manual_seed(5)
    expected = model.decode(torch.randn(12, 3)).view(12, 28, 28)
    assert (pictures - 255 * expected).abs().max() <= 0.51
    assert str(run / "samples") in fails(evaluate.main, run, "--samples", 3)  # nothing is overwritten
    assert len(list((run / "samples").iterdir())) == 12
    call(evaluate.main, run, "--samples", 2, "--out-dir", tmp_path / "other", "--draw-pixels")
    assert set(read(tmp_path / "other" / "samples").unique().tolist()) <= {0, 255}
    flow_prior = Path(evaluate.__file__).parent / "weights" / "flow_prior.pt"
    for unconditional in (run, flow_prior):
        words = [unconditional, "--samples", 3, "--label", "7", "--out-dir", tmp_path / "no"]
        assert "conditional" in fails(evaluate.main, *words)
    together = ["--compare", run, "--samples", 2]
    for words in (["--label", "7"], ["--temperature", "2"], ["--draw-pixels"], ["--samples", 0], together):
        assert "--samples" in fails(evaluate.main, run, *words)


def test_samples_of_one_class(few: ImageData, tmp_path: Path, call: Callable, fails: Callable):
    """evaluate.py finds the classes of the experiments."""
    torch.manual_seed(0)
    model, _, run = train.train("mnist-5k", conditional.ConditionalVAE, **QUICK, out_dir=tmp_path)
    call(evaluate.main, run, "--samples", 20, "--label", "3")
    call(evaluate.main, run, "--samples", 20, "--out-dir", tmp_path / "all")
    torch.manual_seed(0)
    z = torch.randn(20, 3)
    for folder, y in ((run, torch.full((20,), 3)), (tmp_path / "all", torch.arange(20) % 10)):
        assert (read(folder / "samples").flatten(1) - 255 * model.decode(z, y)).abs().max() <= 0.51
    message = fails(evaluate.main, run, "--samples", 2, "--label", "eleven", "--out-dir", tmp_path / "none")
    assert "0, 1, 2" in message
    assert not (tmp_path / "none").exists()


def test_samples_in_colour_that_are_not_square(tmp_path: Path, call: Callable):
    images = torch.randint(0, 256, (20, 3, 4, 6), dtype=torch.uint8)
    labels = torch.zeros(20, dtype=torch.int64)
    wide = ImageData("wide", ["all"], images, labels, images, labels)
    model, _, run = train.train(wide, **QUICK, out_dir=tmp_path)
    model.log_scale.data[:] = torch.tensor([-7.0, 0.0, 2.0])  # so that channels differ
    checkpoint = runs.read_checkpoint(run)
    runs.save_checkpoint(run / "checkpoint.pt", checkpoint | {"model_state_dict": model.state_dict()})
    call(evaluate.main, run, "--samples", 5)
    torch.manual_seed(0)
    expected = model.decode(torch.randn(5, 3)).view(5, 3, 4, 6).permute(0, 2, 3, 1)
    assert (read(run / "samples") - 255 * expected).abs().max() <= 0.51


def test_temperature(fails: Callable, tmp_path: Path):
    model, y = VAE(49, 16, 2).requires_grad_(False), torch.zeros(500, dtype=torch.int64)
    coldest = sample_images(model, y, temperature=1e-6)
    torch.testing.assert_close(coldest, model.decode(torch.zeros(500, 2)), atol=1e-4, rtol=0)
    torch.manual_seed(3)
    expected = model.decode(0.5 * torch.randn(500, 2))
    torch.testing.assert_close(sample_images(model, y, 0.5, seed=3), expected)
    model.prior = lambda y: DiagonalNormal(torch.tensor([1.0, -2.0]), torch.zeros(2))
    of_mean = model.decode(torch.tensor([1.0, -2.0])).expand(500, 49)
    torch.testing.assert_close(sample_images(model, y, temperature=1e-6), of_mean, atol=1e-4, rtol=0)
    _, _, run = train.train("mnist-5k", vampprior.VampVAE, **QUICK, out_dir=tmp_path)
    assert "normal prior" in fails(evaluate.main, run, "--samples", 2, "--temperature", 0.5)


def test_drawn_pixels_have_the_means_that_are_shown():
    for likelihood in ("bernoulli", "logistic"):
        model = VAE(49, 16, 2, likelihood=likelihood).requires_grad_(False)
        y = torch.zeros(20_000, dtype=torch.int64)
        means, drawn = (sample_images(model, y, 1e-6, draw_pixels).mean(0) for draw_pixels in (False, True))
        torch.testing.assert_close(drawn, means, atol=0.02, rtol=0)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def test_traversals_move_one_latent_at_a_time():
    model, z = VAE(49, 16, 3).requires_grad_(False), torch.randn(1, 3)
    model.prior = lambda y: DiagonalNormal(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 2.0, -2.0]))
    images = pictures.decode_traversals(model, z, [2, 0], torch.tensor([-3.0, 0.0, 1.0]), torch.zeros(1).long())
    for i, (latent, value) in enumerate([(2, 3 - 3 / torch.e), (2, 3), (2, 3 + 1 / torch.e), (0, -2), (0, 1), (0, 2)]):
        moved = z.clone()
        moved[0, latent] = value
        torch.testing.assert_close(images[i : i + 1], model.decode(moved), atol=1e-4, rtol=1e-4)


@pytest.fixture
def conditional_model() -> VAE:
    return conditional.ConditionalVAE(784, 10, hidden_size=16, latent_size=3).requires_grad_(False)


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Tensor, ...]]:
    """The images and the labels of rows and columns of every picture that is drawn."""
    drawn = []

    def draw_tiles(images: torch.Tensor, rows: int, shape: tuple, title: str, *labels: list[str]) -> Figure:
        drawn.append((images.flatten(1), *labels))
        figure = Figure()
        figure.add_subplot()
        return figure

    monkeypatch.setattr(pictures, "draw_tiles", draw_tiles)
    return drawn


@pytest.mark.parametrize(("has_closed_form", "order"), [(True, [1, 2, 0]), (False, [2, 0, 1])])
def test_traversals_begin_with_the_latent_that_is_used_most(has_closed_form, order, few, conditional_model, tiles):
    """By its KL, or else by how its means vary. All are around the first test image, with its label."""
    test_set = make_test_set(few, "none")
    mu = torch.randn(100, 3) * torch.tensor([2.0, 1.0, 3.0]) + torch.tensor([0.0, 50.0, 1.0])
    kl = torch.tensor([[0.1, 3.0, 2.0]]).expand(100, 3) if has_closed_form else None
    pictures.draw_traversals(conditional_model, test_set, mu, kl, "")
    images, rows, columns = tiles[0]
    assert rows == [f"latent {latent + 1}" for latent in order]
    assert columns == ["-3", "-2", "-1", "0", "1", "2", "3"]
    for place, image in enumerate(images):
        z = mu[:1].clone()
        z[0, order[place // 7]] = place % 7 - 3
        torch.testing.assert_close(image[None], conditional_model.decode(z, few.test_labels[:1]), atol=1e-5, rtol=1e-4)


def test_the_least_likely_are_reconstructed_with_their_labels(few: ImageData, conditional_model: VAE, tiles: list):
    test_set = make_test_set(few, "none")
    nll = torch.rand(100)
    pictures.draw_least_likely(conditional_model, test_set, nll, "")
    images, *_ = tiles[0]
    worst = sorted(range(100), key=lambda i: -nll[i])[:10]
    x = few.test_images[worst].flatten(1) / 255
    expected = torch.cat([x, conditional_model.reconstruct(x, few.test_labels[worst])])
    torch.testing.assert_close(images, expected)


def test_runs_compared(tmp_path: Path, call: Callable, fails: Callable, monkeypatch: pytest.MonkeyPatch):
    changes = ({}, {"lr": 0.003}, {"seed": 1, "model": conditional.ConditionalVAE})
    for change in changes:
        train.train("mnist-5k", **QUICK | change, out_dir=tmp_path)
    folders = sorted(tmp_path.iterdir())
    figures = []
    save = pictures.save_figure
    monkeypatch.setattr(evaluate, "save_figure", lambda figure, path: (figures.append(figure), save(figure, path)))
    call(evaluate.main, "--compare", *folders, "--out-dir", tmp_path / "pictures")
    assert (tmp_path / "pictures" / "compared.png").stat().st_size > 10_000
    (legend,) = figures[0].legends
    names = [text.get_text() for text in legend.get_texts()]
    ends = ("lr 0.0015, seed 0, class VAE", "lr 0.003, seed 0, class VAE", "lr 0.0015, seed 1, class ConditionalVAE")
    assert names == [f"{run.name}: {end}" for run, end in zip(folders, ends, strict=True)]
    history = runs.read_checkpoint(folders[1])["history"]
    shown = {"loss": "test_loss", "reconstruction": "test_reconstruction", "KL": "test_kl"}
    for axes, (title, name) in zip(figures[0].axes, shown.items(), strict=True):
        assert axes.get_title() == title
        assert axes.lines[1].get_ydata().tolist() == [row[name] for row in history]
    assert "no history" in fails(
        evaluate.main, "--compare", folders[0], Path(evaluate.__file__).parent / "weights/2d.pt"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Odd ones


def test_the_area_is_the_share_of_pairs():
    usual, others = torch.randint(0, 20, (60,)).float(), torch.randint(5, 30, (50,)).float()
    pairs = others[:, None] - usual
    expected = ((pairs > 0).double() + 0.5 * (pairs == 0)).mean().item()
    assert outliers.area_under_roc(usual, others) == pytest.approx(expected)


def test_what_nll_tells(tmp_path: Path, call: Callable, capsys: pytest.CaptureFixture):
    _, _, run = train.train("mnist-5k", **QUICK | {"epochs": 10}, out_dir=tmp_path)
    call(outliers.main, run, "--images=50", "--nll-samples=5")
    rows = dict(line[2:-2].rsplit(" | ", 2)[::2] for line in capsys.readouterr().out.splitlines() if " | " in line)
    assert float(rows["inverted"]) > 0.99


# ---------------------------------------------------------------------------------------------------------------------
# Encoding


def test_encoding_what_a_run_would_hold_out(few, tmp_path: Path, call: Callable, fails: Callable, monkeypatch):
    """Images, labels and draws are those that --hold-out and --seed ask for, and the model hears the labels."""
    model, _, run = train.train("mnist-5k", conditional.ConditionalVAE, **QUICK, out_dir=tmp_path)
    held = few.hold_out(30)
    monkeypatch.setattr(evaluate, "load_dataset", lambda *args: few.hold_out(args[3]))
    path = tmp_path / "new" / "encoded.npz"
    call(evaluate.main, run, "--save", path, "--hold-out", 30, "--seed", 7, "--nll-samples", 4)
    arrays = np.load(path, allow_pickle=False)
    assert arrays["label"].tolist() == [str(label) for label in held.test_labels.tolist()]
    q = model.requires_grad_(False).posterior(make_test_set(held, "dynamic").inputs, held.test_labels)
    torch.testing.assert_close(torch.from_numpy(arrays["mu"]), q.mu, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(torch.from_numpy(arrays["logvar"]), q.logvar, atol=1e-5, rtol=1e-4)
    expected, other = (
        evaluate.evaluate(model, held.test_images, nll_samples=4, seed=seed, labels=held.test_labels)["per_image"]
        for seed in (7, 0)
    )
    for name in ("neg_elbo", "nll", "effective_samples"):
        assert arrays[name] == pytest.approx(getattr(expected, name).numpy())
        assert arrays[name] != pytest.approx(getattr(other, name).numpy())
    before = path.read_bytes()
    assert "exists" in fails(evaluate.main, run, "--save", path)
    assert path.read_bytes() == before
    assert ".npz" in fails(evaluate.main, run, "--save", tmp_path / "encoded.npy")


@pytest.mark.parametrize("kind", ["folder", "npz"])
def test_encoding_all_of_a_path(kind: str, digits: ImageData, tmp_path: Path, call: Callable, fails: Callable):
    _, _, run = train.train("mnist-5k", **QUICK, out_dir=tmp_path)
    images, source = digits.test_images[:25, 0].numpy(), tmp_path / "mine"
    if kind == "npz":
        source = tmp_path / "mine.npz"
        np.savez(source, images=images, labels=np.arange(25) % 3)
    else:
        for i, image in enumerate(images):
            path = source / "abc"[i % 3] / f"{i:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    call(evaluate.main, run, "--save", tmp_path / "all.npz", "--dataset", source, "--binarize", "none")
    arrays = np.load(tmp_path / "all.npz", allow_pickle=False)
    numbers = [int(name.removesuffix(".png").rpartition("/")[2]) for name in arrays["name"]]
    assert sorted(numbers) == list(range(25))
    assert arrays["label"].tolist() == [("abc" if kind == "folder" else "012")[i % 3] for i in numbers]
    model = runs.load_checkpoint(run)[0].requires_grad_(False)
    _, _, mu = model.encode(torch.from_numpy(images[numbers]) / 255)  # each row is of the image that it names
    torch.testing.assert_close(torch.from_numpy(arrays["mu"]), mu, atol=1e-5, rtol=1e-4)
    np.savez(tmp_path / "small.npz", images=images[:, :9, :9])
    assert "784" in fails(evaluate.main, run, "--save", tmp_path / "no.npz", "--dataset", tmp_path / "small.npz")
    assert not (tmp_path / "no.npz").exists()
