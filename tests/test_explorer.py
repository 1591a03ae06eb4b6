"""The explorer's page in a real browser."""

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import evaluate
import utils
from data import ImageData, binarize_test_set
from model import VAE, kl_divergence
from utils import UserError

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def inputs_of(digits: ImageData) -> torch.Tensor:
    return binarize_test_set(digits.test_images, "dynamic")[0]


def run_in_browser(page: str, script: str, folder: Path) -> object:
    """What a script appended to the page leaves in `result`."""
    if not BROWSER:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    script += """;
        const output = document.createElement("pre");
        output.textContent = "RESULT" + JSON.stringify(result) + "END";
        document.body.replaceChildren(output)"""
    path = folder / "page.html"
    path.write_text(page.replace("</html>", f"<script>{script}</script></html>"))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}", "--dump-dom"]
    done = subprocess.run([BROWSER, *flags, path.as_uri()], capture_output=True, text=True, timeout=100)
    return json.loads(html.unescape(re.search("RESULT(.*?)END</pre>", done.stdout, re.DOTALL)[1]))


@pytest.mark.parametrize(
    "config",
    [
        {"latent_size": 2, "activation": "tanh"},
        {"latent_size": 20},
        {"latent_size": 50, "hidden_size": 512, "decoder_layers": 2, "activation": "silu"},
    ],
)
def test_decodes_as_pytorch_does(config: dict, digits: ImageData, tmp_path: Path):
    torch.manual_seed(0)
    model = VAE(**config)
    for layer in model.decoder.children():  # logits as wide as a trained model's
        torch.nn.init.normal_(layer.weight, std=1.8 / layer.in_features**0.5)
    page = evaluate.make_explorer(model, digits, inputs_of(digits), "caption")
    assert len(page) < 5e6
    z = 2 * torch.randn(5, config["latent_size"])
    result = run_in_browser(page, f"const result = {z.tolist()}.map(z => Array.from(decode(z)))", tmp_path)
    expected = model.decode(z)
    assert expected.std() > 0.2
    assert torch.tensor(result).sub(expected).abs().max() < 1e-4


def test_what_it_shows_and_does(digits: ImageData, tmp_path: Path):
    model = VAE(latent_size=5, hidden_size=16)
    inputs = inputs_of(digits)
    page = evaluate.make_explorer(model, digits, inputs, "mnist-5k </script>, epoch 3")
    script = """
        plane.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight", shiftKey: true}));
        const afterKey = [...z];
        document.getElementById("sample").click();
        const sampled = [...z];
        const slider = document.querySelector("#sliders input");
        slider.value = 1.5;
        slider.oninput();
        const result = {
          afterKey, sampled, slid: z[slider.dataset.latent], order: data.order, points: data.points.length,
          text: document.getElementById("about").textContent, last: data.points[499],
          sliders: document.querySelectorAll("#sliders input").length,
          dots: [...document.querySelectorAll("#legend i")].map(dot => dot.style.background)
        }
    """
    result = run_in_browser(page, script, tmp_path)
    first = result["order"][0]
    assert result["afterKey"] == [0.5 if i == first else 0 for i in range(5)]
    assert len({round(value, 6) for value in result["sampled"]}) == 5
    assert result["slid"] == 1.5
    assert (result["points"], result["sliders"]) == (500, 5)
    assert len(set(result["dots"]) - {""}) == 10  # colours that the browser understands
    assert "mnist-5k </script>, epoch 3" in result["text"]
    logvar, mu = evaluate.posteriors(model, inputs)
    torch.testing.assert_close(torch.tensor(result["last"]["mu"]), mu[-1], atol=1e-3, rtol=0)
    kl = kl_divergence(logvar, mu).mean(0)
    assert result["order"] == kl.argsort(descending=True).tolist()


@pytest.mark.parametrize("pointer", ["mouse", "touch"])
def test_pointers_click_on_dots_and_drag(pointer: str, digits: ImageData, tmp_path: Path):
    torch.manual_seed(0)
    page = evaluate.make_explorer(VAE(latent_size=3, hidden_size=16), digits, inputs_of(digits), "caption")
    script = """
        data.points = [{mu: [0.5, -1, 2], label: 7}];
        plane.setPointerCapture = plane.hasPointerCapture = () => true;  // which made-up events have not
        const box = plane.getBoundingClientRect(), at = i => (i + 3.5) / 7 * box.width;
        const point = (type, a, b, off = 0) => {
          const place = {clientX: box.left + at(a) + off, clientY: box.top + at(-b) + off};
          plane.dispatchEvent(new PointerEvent(type, {pointerId: 1, pointerType: "POINTER", ...place}));
          return [...z];
        };
        const mu = data.points[0].mu, result = {order: data.order};
        result.clicked = point("pointerdown", mu[first], mu[second], 2);
        result.trembled = point("pointermove", mu[first], mu[second], 4);
        result.isChosen = chosen === data.points[0];
        result.dragged = point("pointermove", -1.5, 2.5);
        result.elsewhere = point("pointerdown", 3, -3);
        result.outside = point("pointermove", 9, -9);
    """
    result = run_in_browser(page, script.replace("POINTER", pointer), tmp_path)
    first, second, third = result["order"]
    assert result["clicked"] == result["trembled"] == [0.5, -1, 2]
    assert result["isChosen"]
    assert [result["dragged"][i] for i in (first, second)] == pytest.approx([-1.5, 2.5], abs=0.02)
    assert [result["elsewhere"][i] for i in (first, second)] == pytest.approx([3, -3], abs=0.02)
    assert [result["outside"][i] for i in (first, second)] == [3.5, -3.5]
    assert result["dragged"][third] == [0.5, -1, 2][third]


@pytest.mark.parametrize(
    ("config", "reason"),
    [({"latent_size": 1}, "two latents"), ({"input_size": 756}, "square"), ({"hidden_size": 3000}, "million")],
)
def test_what_it_refuses(config: dict, reason: str, digits: ImageData):
    if reason == "square":
        digits = replace(digits, train_images=digits.train_images[:, 1:], test_images=digits.test_images[:, 1:])
    with pytest.raises(UserError, match=reason):
        evaluate.make_explorer(VAE(**config), digits, inputs_of(digits), "")


class OtherMean(VAE):
    def mean(self, outputs: torch.Tensor) -> torch.Tensor:
        return outputs


class OtherPrior(VAE):
    def log_prior(self, z: torch.Tensor) -> torch.Tensor:
        return -z.abs().sum(-1)


@pytest.mark.parametrize("kind", [OtherMean, OtherPrior])
def test_refuses_what_it_could_not_decode(kind: type, digits: ImageData):
    with pytest.raises(UserError, match="prior N"):
        evaluate.make_explorer(kind(), digits, inputs_of(digits), "")


def test_best_likelihood_has_an_explorer(digits: ImageData):
    """The recipe's sizes; and what it can't show is refused before anything is computed."""
    model = VAE(hidden_size=768, latent_size=50, decoder_layers=2, activation="silu")
    evaluate.check_explorer(model, digits)


def test_command_writes_it(digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = VAE(hidden_size=8, latent_size=2)
    utils.save_checkpoint(tmp_path / "a.pt", {"model": model.config, "model_state_dict": model.state_dict()})
    args = [str(tmp_path / "a.pt"), "--dataset=mnist-5k", "--nll-samples=1", "--explorer"]
    monkeypatch.setattr("sys.argv", ["evaluate.py", *args])
    evaluate.main()
    page = (tmp_path / "explorer.html").read_text()
    assert "mnist-5k, binarize dynamic, latent size 2" in page
    assert not re.search(r"(src|href)=|url\(|fetch\(|https?://", page)  # needs no network
