"""Metrics against brute force, pictures against what they must show, and the evaluate command."""

import json
import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributions import Bernoulli, Independent, Normal

import evaluate
import measure
import pictures
import runs
import train
from data import ImageData
from experiments.conditional import ConditionalVAE
from measure import make_test_set
from model import VAE
from tests.conftest import as_test_set, thinned


@pytest.fixture(scope="module")
def trained() -> VAE:
    """A two-dimensional model."""
    return runs.load_checkpoint(Path(evaluate.__file__).parent / "weights" / "2d.pt")[0].requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------------------
# Metrics


def test_elbo_equals_torch_distributions(trained: VAE, digits: ImageData):
    """At once, and, but for other draws of z, in batches."""
    test_set = make_test_set(digits, "threshold")
    torch.manual_seed(1)
    found = measure.encode(trained, test_set)
    bce, kl = found.reconstruction, found.kl
    torch.manual_seed(1)
    x_hat, logvar, mu, _ = trained(test_set.inputs)
    torch.testing.assert_close(bce, -Bernoulli(x_hat).log_prob(test_set.targets.flatten(1)).sum(1))
    posterior = Normal(mu, torch.exp(0.5 * logvar))
    torch.testing.assert_close(kl, torch.distributions.kl_divergence(posterior, Normal(0.0, 1.0)).sum(1))
    parts = measure.encode(trained, test_set, batch_size=77)
    torch.testing.assert_close(parts.kl, kl)
    assert parts.reconstruction.mean() == pytest.approx(bce.mean(), abs=1)


def test_nll_is_seeded_and_rounding_does_no_harm(trained: VAE, digits: ImageData, monkeypatch: pytest.MonkeyPatch):
    test_set = make_test_set(thinned(digits, 10), "dynamic")
    rounded, again, other = (measure.estimate_nll(trained, test_set, 100, seed)[0] for seed in (0, 0, 1))
    assert torch.equal(rounded, again)
    assert not torch.equal(rounded, other)
    monkeypatch.setattr(measure, "choose_precision", lambda *_, **__: "highest")
    exact, _ = measure.estimate_nll(trained, test_set, 100)
    assert rounded.mean().item() == pytest.approx(exact.mean().item(), abs=0.01)


def test_nll_of_extreme_logits():
    vae = VAE(4, 2, 1)
    torch.nn.init.constant_(vae.decoder.fc2.bias, 1e4)
    zeros = torch.zeros(3, 4)
    nll, _ = measure.estimate_nll(vae, as_test_set(zeros), 5)
    assert nll.tolist() == pytest.approx([4e4] * 3, rel=2**-8)  # of bfloat16


def test_active_units_are_those_that_vary():
    vae = VAE(4, 8, 3, encoder_layers=1).requires_grad_(False)
    vae.latent_z.mu.weight[0] = 0  # a constant mean
    x = torch.rand(500, 4)
    hidden = vae.encoder(x)
    for unit, variance in ((1, 0.008), (2, 0.012)):
        mean = hidden @ vae.latent_z.mu.weight[unit]
        vae.latent_z.mu.weight[unit] *= math.sqrt(variance) / mean.std()
    assert measure.is_active(vae.encode(x)[2]).tolist() == [False, False, True]
    assert measure.is_active(vae.encode(x)[2], threshold=0.005).tolist() == [False, True, True]


def test_evaluate_is_seeded(trained: VAE, digits: ImageData):
    images = digits.test_images[:50]
    first = evaluate.evaluate(trained, images, nll_samples=3, seed=4)
    again = evaluate.evaluate(trained, images, nll_samples=3, seed=4)
    assert torch.equal(first["per_image"].nll, again["per_image"].nll)
    assert first | {"per_image": None} == again | {"per_image": None}
    other = evaluate.evaluate(trained, images, nll_samples=3, seed=5)
    for name in ("neg_elbo", "nll"):
        assert first[name] != other[name]
    assert first["num_images"] == 50
    assert first["neg_elbo"] == pytest.approx(first["reconstruction"] + first["kl"])
    assert first["kl"] == pytest.approx(sum(first["kl_per_latent"]))
    of_images = first["per_image"]
    assert first["effective_samples"] == sorted(of_images.effective_samples.tolist())[24]
    for name in ("neg_elbo", "nll"):
        deviation = statistics.stdev(getattr(of_images, name).tolist())
        assert first[f"{name}_se"] == pytest.approx(deviation / math.sqrt(50))


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def picture(figure: "evaluate.Figure", rows: int) -> torch.Tensor:
    """The tiles of a figure: (rows, columns, 28, 28)."""
    pixels = torch.tensor(figure.axes[0].images[0].get_array())
    return pixels.view(rows, 28, -1, 28).transpose(1, 2)


def of_each_class(digits: ImageData, place: int) -> list[int]:
    """The index of the first (0) or last (-1) test image of each class."""
    return [int((digits.test_labels == label).nonzero()[place]) for label in range(10)]


def test_reconstructions_show_image_input_and_output(trained: VAE, digits: ImageData):
    test_set, firsts = make_test_set(digits, "dynamic"), of_each_class(digits, 0)
    images = digits.test_images[firsts, 0] / 255
    figure = pictures.draw_reconstructions(trained, test_set, "caption")
    tiles = picture(figure, 3)
    assert torch.equal(tiles[0], images)
    assert torch.equal(tiles[1], test_set.inputs[firsts, 0])
    torch.testing.assert_close(tiles[2].float(), trained.reconstruct(tiles[1].float()))
    assert "caption" in figure.axes[0].get_title()
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == digits.classes
    tiles = picture(pictures.draw_reconstructions(trained, make_test_set(digits, "none"), ""), 2)
    torch.testing.assert_close(tiles[1].float(), trained.reconstruct(images))


def test_prior_samples_are_decoded_draws(trained: VAE, digits: ImageData):
    state = torch.get_rng_state()
    tiles = picture(pictures.draw_prior_samples(trained, make_test_set(digits, "none"), "", seed=5), 10)
    assert torch.equal(torch.get_rng_state(), state)
    z = torch.randn(100, 2, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(tiles.reshape(100, 784), trained.decode(z))


def test_interpolations_start_and_end_at_the_images(trained: VAE, digits: ImageData):
    test_set = make_test_set(digits, "threshold")
    figure = pictures.draw_interpolations(trained, test_set, measure.encode(trained, test_set).mu, "")
    tiles, lasts = picture(figure, 5), digits.test_images[of_each_class(digits, -1)].flatten(1) / 255
    torch.testing.assert_close(tiles[:, [0, -1]].flatten(2), torch.stack([lasts[:5], lasts[5:]], 1))
    torch.testing.assert_close(tiles[:, 1].flatten(1), trained.reconstruct(lasts[:5]))
    torch.testing.assert_close(tiles[:, -2].flatten(1), trained.reconstruct(lasts[5:]))
    middle = trained.decode((trained.encode(lasts[:5])[2] + trained.encode(lasts[5:])[2]) / 2)
    torch.testing.assert_close(tiles[:, 6].flatten(1), middle)
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert labels == [f"{i} to {i + 5}" for i in range(5)]


class Shaded(VAE):
    """Draws an image of one shade for each class."""

    def likelihood(self, z: torch.Tensor, y: torch.Tensor | None = None) -> Independent:
        logits = (y / 10).logit(1e-4)[:, None].expand(*z.shape[:-1], 784)
        return Independent(Bernoulli(logits=logits), 1)


def test_a_run_is_evaluated_with_its_labels(digits: ImageData, tmp_path: Path, no_pictures: None):
    few_digits, model = thinned(digits, 10), Shaded(784, 4, 2)
    _, _, run = train.train(few_digits, model, epochs=1, lr=1e-9, out_dir=tmp_path)
    metrics = evaluate.evaluate_run(run, model, few_digits, nll_samples=1)
    expected = evaluate.evaluate(model, few_digits.test_images, nll_samples=1, labels=few_digits.test_labels)
    del expected["per_image"]
    assert {name: metrics[name] for name in expected} == expected


def test_one_gray_target_is_enough_to_be_no_likelihood():
    targets = torch.zeros(3, 4)
    model, labels = VAE(4, 2, 1), torch.zeros(3, dtype=torch.int64)
    assert measure.is_likelihood(model, as_test_set(targets, labels))
    targets[2, 3] = 0.5
    assert not measure.is_likelihood(model, as_test_set(targets, labels))


def test_labels_reach_the_pictures_and_the_metrics(digits: ImageData):
    model, test_set = Shaded(784, 4, 2), make_test_set(digits, "dynamic")
    samples = picture(pictures.draw_prior_samples(model, test_set, ""), 10).mean((2, 3))
    torch.testing.assert_close(samples, (torch.arange(10) / 10).clamp(1e-4)[:, None].expand(10, 10))
    shown = picture(pictures.draw_reconstructions(model, test_set, ""), 3)[2].mean((1, 2))
    torch.testing.assert_close(shown, (torch.arange(10) / 10).clamp(1e-4))
    walks = picture(pictures.draw_interpolations(model, test_set, torch.zeros(len(test_set.labels), 2), ""), 5)
    walks = walks[:, 1:-1].mean((2, 3))  # without the images at their ends
    start = (torch.arange(5) / 10).clamp(1e-4)
    end = torch.arange(5, 10) / 10
    torch.testing.assert_close(walks, torch.stack([start] * 5 + [end] * 6, 1))  # they change in the middle
    for weight in model.latent_z.parameters():
        torch.nn.init.zeros_(weight)  # the posterior is the prior, so that every importance weight is p(x|y)
    metrics = evaluate.evaluate(model, digits.test_images, nll_samples=20, labels=digits.test_labels)
    p = (digits.test_labels / 10).clamp(1e-4)[:, None]
    expected = -Bernoulli(p).log_prob(test_set.targets.flatten(1)).sum(1).mean().item()
    assert metrics["reconstruction"] == pytest.approx(expected, rel=1e-4)
    assert metrics["nll"] == pytest.approx(expected, rel=1e-4)


def test_colour_is_drawn_in_colour():
    images = torch.rand(6, 3, 4, 5)
    picture = pictures.tile(images, 2, (3, 4, 5))
    assert picture.shape == (8, 15, 3)
    assert torch.equal(picture[4:, 5:10], images[4].permute(1, 2, 0))
    axes = pictures.draw_tiles(images, 2, (3, 4, 5), "", ["a", "b"], ["c", "d", "e"]).axes[0]
    torch.testing.assert_close(torch.tensor(axes.images[0].get_array()), picture)
    assert (axes.get_yticks().tolist(), axes.get_xticks().tolist()) == ([2, 6], [2.5, 7.5, 12.5])


def test_manifold_is_the_priors_quantiles(trained: VAE, digits: ImageData):
    figure = pictures.draw_manifold(trained, digits.shape, "", steps=4)
    tiles = picture(figure, 4)
    quantile = Normal(0.0, 1.0).icdf
    for row, column in ((0, 0), (3, 1), (2, 3)):
        z = quantile(torch.tensor([(column + 0.5) / 4, (3 - row + 0.5) / 4]))  # z_2 grows upwards
        torch.testing.assert_close(tiles[row, column].flatten(), trained.decode(z))
    labels = [text.get_text() for text in figure.axes[0].get_xticklabels()]
    assert labels == ["-1.2", "-0.3", "0.3", "1.2"]
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == labels[::-1]


def test_manifold_of_another_prior_has_its_quantiles():
    """Of each latent, without a formula, and decoded with the first label."""
    model = ConditionalVAE(784, 10, hidden_size=16, latent_size=2).requires_grad_(False)
    prior = Normal(torch.tensor([1.0, -5.0]), torch.tensor([1.0, 3.0]))
    model.prior = lambda y: Independent(prior, 1)
    images, (x, y) = pictures.decode_manifold(model, 4)
    shares = torch.tensor([0.125, 0.375, 0.625, 0.875])[:, None]
    quantiles = prior.icdf(shares)
    torch.testing.assert_close(torch.tensor(x), quantiles[:, 0], atol=0.1, rtol=0)
    torch.testing.assert_close(torch.tensor(y), quantiles[:, 1].flip(0), atol=0.3, rtol=0)
    z = torch.tensor([(across, up) for up in y for across in x])
    torch.testing.assert_close(images, model.decode(z, torch.zeros(16, dtype=torch.int64)))


def test_latent_usage_shows_which_latents_are_active():
    """Those whose means vary. A latent with a large KL and the same mean for every image is not one of them."""
    mu = torch.tensor([1.0, 0.0, 3.0, 1.0]) * torch.randn(100, 4)
    kl = torch.tensor([[0.5, 4.0, 3.0, 0.001]]).expand(100, 4)
    axes = pictures.draw_latent_usage(mu, kl, "").axes[0]
    heights = {bars.get_label(): [bar.get_height() for bar in bars] for bars in axes.containers}
    assert heights == {"active: 3": pytest.approx([3, 0.5, 0.001]), "not active: 1": [4]}
    places = [bar.get_x() + bar.get_width() / 2 for bars in axes.containers for bar in bars]
    assert places == pytest.approx([1, 2, 3, 0])


@pytest.mark.parametrize("latent_size", [1, 2, 5])
def test_latent_space_shows_the_posterior_means(latent_size: int, digits: ImageData):
    vae, digits = VAE(784, 32, latent_size), replace(digits, classes=["_", "_1", *digits.classes[2:]])
    test_set = make_test_set(digits, "none")
    axes = pictures.draw_latent_space(test_set, measure.encode(vae, test_set).mu, "").axes[0]
    points = torch.tensor(axes.collections[0].get_offsets().data).float()
    mu = vae.encode(digits.test_images / 255)[2].detach()
    if latent_size == 2:
        torch.testing.assert_close(points, mu)
    elif latent_size == 1:
        torch.testing.assert_close(points, torch.cat([mu, digits.test_labels[:, None].float()], 1))
    else:  # the plane of the largest variance, that of the two largest eigenvalues
        variances = torch.linalg.eigvalsh(torch.cov(mu.T)).flip(0)
        torch.testing.assert_close(points.var(0), variances[:2], rtol=1e-3, atol=0)
        assert f"({variances[0] / variances.sum():.0%}" in axes.get_xlabel()
        assert f"({variances[1] / variances.sum():.0%}" in axes.get_ylabel()
    assert [text.get_text().strip() for text in axes.get_legend().get_texts()] == digits.classes
    colors = torch.tensor(axes.collections[0].get_facecolors())[:, :3]
    for label, dot in enumerate(axes.get_legend().legend_handles):
        (color,) = colors[digits.test_labels == label].unique(dim=0)
        torch.testing.assert_close(color, torch.tensor(dot.get_facecolor())[0, :3])
    assert len(colors.unique(dim=0)) == 10


# ---------------------------------------------------------------------------------------------------------------------
# The command

PICTURES = {"reconstructions.png", "prior_samples.png", "interpolations.png", "latent_space.png", "latent_usage.png"}
PICTURES |= {"completions.png", "traversals.png", "least_likely.png"}


def save_run(run: Path, model: VAE, **extra: object) -> Path:
    run.mkdir(parents=True)
    checkpoint = {"model_state_dict": model.state_dict(), "optimizer_state_dict": {}, "model": model.config}
    runs.save_checkpoint(run / "checkpoint.pt", checkpoint | extra)
    return run


@pytest.mark.usefixtures("short_chains")
def test_command(trained: VAE, digits: ImageData, tmp_path: Path, call: Callable, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "save_figure", lambda figure, path: path.touch())  # rendering takes most of the time
    monkeypatch.chdir(tmp_path)
    save_run(tmp_path / "runs" / "001-a", VAE(784, 4, 3))
    run = save_run(tmp_path / "runs" / "002-b", trained, options={"dataset": "mnist-5k", "binarize": "threshold"})
    call(evaluate.main, "--nll-samples", "3", "--seed", "9")
    names = PICTURES | {"manifold.png", "metrics.json", "checkpoint.pt"}
    assert {path.name for path in run.iterdir()} == names
    metrics = json.loads((run / "metrics.json").read_text())
    expected = evaluate.evaluate(trained, digits.test_images, "threshold", 3, seed=9)
    del expected["per_image"]
    assert metrics == expected | {"dataset": "mnist-5k", "hold_out": 0, "binarize": "threshold"}
    output = capsys.readouterr().out
    assert "mnist-5k binarized by a threshold, 2 latents" in output
    assert f"{metrics['neg_elbo']:.2f} nats per image" in output
    assert f"{metrics['nll']:.2f} nats per image, standard error {metrics['nll_se']:.2f}" in output

    other = tmp_path / "other" / "place"
    call(evaluate.main, run / "checkpoint.pt", "--nll-samples", "1", "--binarize", "none", "--out-dir", other)
    gray = json.loads((other / "metrics.json").read_text())
    assert (gray["binarize"], gray["nll"], gray["nll_se"]) == ("none", None, None)
    assert json.loads((run / "metrics.json").read_text()) == metrics
    printed = capsys.readouterr().out
    assert "not likelihoods" in printed
    assert " nll " not in printed


@pytest.mark.usefixtures("short_chains")
def test_command_on_an_original_checkpoint(tmp_path: Path, call: Callable, monkeypatch, digits: ImageData):
    vae = VAE(784, 16, 4)
    kept = {name: vae.config[name] for name in ("input_size", "hidden_size", "latent_size")}
    path = tmp_path / "vae.pt"
    monkeypatch.setattr(evaluate, "save_figure", lambda figure, path: path.touch())
    torch.save({"model_state_dict": vae.state_dict(), "optimizer_state_dict": {}, "model": kept}, path)
    call(evaluate.main, path, "--dataset", "mnist-5k", "--nll-samples", "2")
    metrics = json.loads((tmp_path / "vae" / "metrics.json").read_text())
    expected = evaluate.evaluate(vae, digits.test_images, "dynamic", 2)
    assert all(metrics[name] == expected[name] for name in expected.keys() - {"per_image"})
    assert {path.name for path in tmp_path.iterdir()} == {"vae.pt", "vae"}
    assert {path.name for path in (tmp_path / "vae").iterdir()} == PICTURES | {"metrics.json"}


def test_bad_calls(tmp_path: Path, fails: Callable, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "train one" in fails(evaluate.main)
    assert "nowhere" in fails(evaluate.main, "nowhere")
    run = save_run(tmp_path / "run", VAE(9, 4, 3))
    assert "9 values" in fails(evaluate.main, run, "--dataset", "mnist-5k")
    for option, value in (
        ("--nll-samples", "0"),
        ("--seed", str(10**20)),
        ("--device", "cuda"),
        ("--binarize", "often"),
        ("--dataset", "imagenet"),
    ):
        assert option.strip("-") in fails(evaluate.main, run, option, value).replace("cuda device", "device cuda")
    (run / "checkpoint.pt").write_bytes(b"PK damaged")
    assert "damaged" in fails(evaluate.main, run)
    assert {path.name for path in run.iterdir()} == {"checkpoint.pt"}


def test_one_image_has_no_standard_error(digits: ImageData):
    metrics = evaluate.evaluate(VAE(784, 16, 3), digits.test_images[:1], nll_samples=2)
    assert metrics["neg_elbo_se"] == metrics["nll_se"] == 0
