"""The page of docs/ and the explorer in a real browser, with the browser's own mouse, touch and key events."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

import evaluate
import runs
from assets.page import BROWSER, Browser, open_browser
from data import ImageData
from docs import make
from experiments.conditional import ConditionalVAE
from experiments.conv_flow import ConvFlowVAE
from experiments.vampprior import VampVAE
from model import VAE, DiagonalNormal, kl_by_latent
from pictures import tile
from tests.conftest import thinned
from utils import UserError

PAGE, WEIGHTS = make.ROOT / "docs" / "index.html", make.ROOT / "weights"
shown: dict[Browser, str | Path] = {}  # the page that is open
EXTENT = 4  # maps and sliders show latents from -EXTENT to EXTENT


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if not BROWSER:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    with open_browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def show(browser: Browser, tmp_path: Path) -> Iterator[Callable[..., Browser]]:
    """Opens a page, given as text or as a file. Fails at the end if anything went wrong in the page.

    With again=True, a page that is open already stays as the test before has left it, which is sooner done.
    """

    def open_page(page: str | Path, again: bool = False) -> Browser:
        if not again or shown.get(browser) != page:
            shown[browser] = page
            if isinstance(page, str):
                (tmp_path / "page.html").write_text(page, encoding="utf-8")
                page = tmp_path / "page.html"
            browser.open(page.as_uri())
        return browser

    browser.errors.clear()
    browser.resize(1280, 900)
    yield open_page
    browser.run("0")  # reads what the browser has to say
    assert browser.errors == []


@pytest.fixture(scope="module")
def few(digits: ImageData) -> ImageData:
    return thinned(digits, 5)


def rounded(model: VAE) -> VAE:
    """Rounds the networks' weights to 8 bits with a scale for each input, as the page has large ones."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            scales = layer.weight.detach().abs().amax(0) / 127
            layer.weight.data = (layer.weight.detach() / scales).round() * scales
    return model


@pytest.fixture(scope="module")
def models() -> dict[str, VAE]:
    """Like the models of docs/index.html, but small and untrained. Their weights are rounded already."""
    torch.manual_seed(0)
    vamp = VampVAE(num_pseudo_inputs=6, hidden_size=16, latent_size=3)
    models = {"main": VAE(hidden_size=16, latent_size=5), "map": VAE(hidden_size=16, latent_size=2), "vamp": vamp}
    return {role: rounded(model) for role, model in models.items()}


@pytest.fixture(scope="module")
def emoji() -> tuple[VAE, ImageData]:
    """A model in colour, so small that the page has its weights in 16 bits, and 60 images of 8 x 12 pixels."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "latent_size": 6, "encoder_layers": 1, "activation": "silu"}
    model = ConvFlowVAE(288, shape=(3, 8, 12), width=4, likelihood="logistic", channels=3, **sizes).eval()
    for name, weights in model.named_parameters():
        if name.startswith(("decoder", "flow")):
            nn.init.normal_(weights, std=0.5 if name.startswith("decoder") else 0.05)
    model.log_scale.data = torch.tensor([-3.0, -2.0, -1.0])
    images, labels = torch.randint(256, (60, 3, 8, 12), dtype=torch.uint8), torch.zeros(60, dtype=torch.int64)
    return model, ImageData("emoji", ["emoji"], images, labels, images, labels)


@pytest.fixture(scope="module")
def page(models: dict[str, VAE], few: ImageData, emoji: tuple[VAE, ImageData]) -> str:
    return make.make_page("Page", [], models, few, emoji)


def idle(browser: Browser, script: str = "null", job: str = "") -> Any:
    """The value of an expression once the page has drawn everything, or what one of its jobs draws."""
    browser.run(f"""new Promise((done, fail) => {{
        setTimeout(() => fail(new Error("it never stops")), 20000);
        const busy = () => {f"jobs.has('{job}')" if job else "jobs.size"};
        const wait = () => busy() ? requestAnimationFrame(wait) : done();
        requestAnimationFrame(() => requestAnimationFrame(wait));
    }})""")
    return browser.run(script)


def show_emoji(browser: Browser) -> None:
    """Scrolls to the section in colour, which starts only then, and again while what is above it still grows."""
    browser.run("""new Promise((done, fail) => {
        setTimeout(() => fail(new Error("it never starts")), 20000);
        const wait = () => {
            if (document.querySelector("#emoji canvas")) return done();
            document.getElementById("emoji").scrollIntoView({ behavior: "instant" });
            requestAnimationFrame(wait);
        };
        wait();
    })""")
    idle(browser)


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?[\d.]*\d", text.replace("\N{MINUS SIGN}", "-"))]


# ---------------------------------------------------------------------------------------------------------------------
# The models


@pytest.mark.parametrize(
    "config",
    [
        {"latent_size": 2, "activation": "tanh"},
        {"latent_size": 50, "hidden_size": 512, "decoder_layers": 2, "activation": "silu"},
    ],
)
def test_computes_what_pytorch_does(config: dict, few: ImageData, show: Callable[..., Browser]):
    torch.manual_seed(0)
    model = VAE(**config).eval()
    for layer in model.modules():
        if isinstance(layer, nn.Linear):  # values as wide as a trained model's
            nn.init.normal_(layer.weight, std=1.8 / layer.in_features**0.5)
    rounded(model)
    z = 2 * torch.randn(5, config["latent_size"])
    browser = show(make.make_explorer(model, few, "caption"))
    result = browser.run(f"""(() => {{
        const list = values => Array.from(values), first = images.slice(0, 5), all = {z.tolist()};
        const posteriors = first.map(main.encode);
        return {{
          images: first.map(list), points: main.points.slice(0, 5).map(list), x_hat: all.map(z => list(main.decode(z))),
          mu: posteriors.map(p => list(p.mu)), std: posteriors.map(p => list(p.std)),
          kl: posteriors.map(p => list(klByLatent(p))),
          bce: all.map((z, i) => sum(bceByPixel(main.logits(z), first[i]))),
        }};
    }})()""")
    result = {name: torch.tensor(values) for name, values in result.items()}
    x = few.test_images.flatten(1) / 255
    x = x[torch.cdist(result["images"], x).argmin(1)]  # in the page's order
    with torch.no_grad():
        q, likelihood = model.posterior(x), model.likelihood(z)
        std = torch.exp(0.5 * q.logvar)
        expected = {"images": x, "mu": q.mu, "points": q.mu, "std": std, "x_hat": likelihood.mean}
    assert len(x.unique(dim=0)) == 5
    assert expected["x_hat"].std() > 0.2
    assert expected["mu"].std() > 0.2
    for name, values in expected.items():
        assert result[name].sub(values).abs().max() < 1e-3, name
    torch.testing.assert_close(result["kl"], kl_by_latent(q, model.prior()).detach(), atol=1e-2, rtol=0)
    torch.testing.assert_close(result["bce"], -likelihood.log_prob(x), atol=0, rtol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Drawings


def arc(x: float, y: float, width: float, height: float, start: float, end: float, steps: int = 7) -> list:
    angles = torch.linspace(start, end, steps + 1).deg2rad()
    return list(zip((x + width * angles.cos()).tolist(), (y + height * angles.sin()).tolist(), strict=True))


STROKES = {  # in shares of the drawing area, right and downwards
    "0": [arc(0.5, 0.5, 0.2, 0.3, -90, 270, 12)],
    "2": [[*arc(0.5, 0.35, 0.2, 0.17, -170, 30), (0.3, 0.8), (0.72, 0.8)]],
    "4": [[(0.35, 0.2), (0.3, 0.52), (0.7, 0.52)], [(0.64, 0.2), (0.62, 0.82)]],
    "7": [[(0.3, 0.22), (0.7, 0.22), (0.45, 0.82)]],
}


def covered_shares(strokes: list, pen: float, size: int = 28, fine: int = 4) -> Tensor:
    """(size, size): the share of each pixel within `pen` of a stroke, counted on a grid of fine * fine points each."""
    ticks = (torch.arange(size * fine) + 0.5) / fine
    points = torch.stack(torch.meshgrid(ticks, ticks, indexing="xy"), -1)
    covered = torch.zeros(size * fine, size * fine, dtype=torch.bool)
    for stroke in strokes:
        for start, end in pairwise(stroke):
            start, way = torch.tensor(start), torch.tensor(end) - torch.tensor(start)
            share = ((points - start) @ way / way.dot(way)).clamp(0, 1)
            covered |= (points - start - share[..., None] * way).norm(dim=-1) < pen
    return covered.view(size, fine, size, fine).float().mean((1, 3))


def test_drawn_digits_are_read_as_what_they_are(show: Callable[..., Browser]):
    browser = show(PAGE)
    (left, top), (right, _) = browser.place("#pad", 0, 0), browser.place("#pad", 1, 1)
    width = right - left
    read = {}
    for digit in STROKES:
        browser.run("document.getElementById('clear').click()")
        for stroke in STROKES[digit]:
            browser.drag([(left + x * width, top + y * width) for x, y in stroke])
        read[digit] = idle(browser, "document.getElementById('verdict').textContent", "draw")
        expected = torch.tensor(browser.run(f"Array.from(rasterize({json.dumps(STROKES[digit])}, 28, 28))"))
        torch.testing.assert_close(pixels(browser, "#read").flatten(), expected, atol=0.1, rtol=0)
        assert pixels(browser, "#rebuilt").flatten().sub(expected).norm() < 0.6 * expected.norm()
    assert read == {digit: f"Looks like {digit}" for digit in STROKES}


def pixels(browser: Browser, selector: str, rows: int = 0, colour: bool = False) -> Tensor:
    """A canvas, or its first rows: (H, W) in [0, 1], or (H, W, 3)."""
    data = browser.run(f"""(() => {{
        const canvas = document.querySelector("{selector}"), {{ width }} = canvas, height = {rows} || canvas.height;
        return [height, width, ...canvas.getContext("2d").getImageData(0, 0, width, height).data];
    }})()""")
    values = torch.tensor(data[2:]).view(data[0], data[1], 4) / 255
    return values[..., :3] if colour else values[..., 0]


# ---------------------------------------------------------------------------------------------------------------------
# The sections


def latents(browser: Browser) -> list[float]:
    """The walk's place, which its sliders show too."""
    z, shown = idle(browser, "[Array.from(walk.z), walk.sliders.map(slider => Number(slider.value))]")
    assert shown == pytest.approx(z, abs=0.006)
    return z


@pytest.mark.parametrize("touch", [False, True])
def test_walk_follows_pointers(touch: bool, few: ImageData, show: Callable[..., Browser]):
    torch.manual_seed(0)
    browser = show(make.make_explorer(VAE(latent_size=3, hidden_size=16), few, "caption"))
    browser.resize(390, 844, phone=touch)
    first, second, third = browser.run("dots.fill([9, 9, 9]); dots[1] = [0.5, -1, 2]; map.order")
    mean = [0.5, -1, 2]
    width = browser.run("document.getElementById('walk-map').clientWidth")

    def place(right: float, up: float, off: float = 0) -> tuple[float, float]:
        x, y = (0.5 + right / (2 * EXTENT), 0.5 - up / (2 * EXTENT))
        return browser.place("#walk-map", x + off / width, y + off / width)

    def there() -> tuple[float, float]:
        z = latents(browser)
        return z[first], z[second]

    browser.point("press", place(mean[first], mean[second], off=2), touch)
    assert latents(browser) == mean
    browser.point("move", place(mean[first], mean[second], off=4), touch)  # a hand trembles
    assert latents(browser) == mean
    assert "the mean of an image of class 1" in browser.run("document.getElementById('walk-place').textContent")
    browser.point("move", place(-1.5, 2.5), touch)
    assert there() == pytest.approx((-1.5, 2.5), abs=0.03)
    assert latents(browser)[third] == mean[third]
    browser.point("move", place(4.3, -1), touch)  # outside
    assert there() == pytest.approx((EXTENT, -1), abs=0.03)
    browser.point("release", place(4.3, -1), touch)
    if not touch:
        browser.point("move", place(2, 2))
        assert there() == pytest.approx((EXTENT, -1), abs=0.03)
    browser.drag([place(3, -3)], touch)
    assert there() == pytest.approx((3, -3), abs=0.03)


def test_walk_by_keys_and_in_flight(page: str, models: dict[str, VAE], show: Callable[..., Browser]):
    torch.manual_seed(0)
    browser = show(page)
    model = models["map"]

    def marker() -> list[float]:
        return browser.run(
            "['cx', 'cy'].map(name => Number(document.querySelector('#walk-map .marker').getAttribute(name)))"
        )

    browser.run("document.getElementById('walk-map').focus({ preventScroll: true })")
    scrolled = browser.run("scrollY")
    browser.key("ArrowRight", shift=True)
    browser.key("ArrowDown")
    idle(browser)
    assert marker() == pytest.approx([50, 5])
    assert browser.run("scrollY") == scrolled
    z = torch.tensor([[0.5, -0.05]])
    torch.testing.assert_close(pixels(browser, "#walked").flatten(), model.decode(z)[0].detach(), atol=5e-3, rtol=0)
    tile = pixels(browser, "#walk-map canvas", 28)[:, -28:].flatten()  # of the map's upper right corner
    corner = model.decode(torch.tensor([[EXTENT * 23 / 24, EXTENT * 23 / 24]]))[0].detach()
    torch.testing.assert_close(tile, corner, atol=5e-3, rtol=0)

    stops = torch.tensor(browser.run("stops.map(({ mu }) => Array.from(mu))"))
    assert len(stops) == 10
    for still in (True, False):
        browser.resize(1280, 900, still=still)
        browser.run("document.getElementById('fly').focus()")
        browser.key("Enter")
        assert browser.run("document.getElementById('fly').textContent") == "Pause"
        browser.run("new Promise(done => setTimeout(done, 150))")
        distance = (stops[:, :2] * torch.tensor([100, -100]) - torch.tensor(marker())).norm(dim=1).min()
        assert (distance < 1e-3) == still  # it jumps from stop to stop if motion is not wanted
        browser.key("Enter")
        idle(browser)
        stopped = marker()
        browser.run("new Promise(done => setTimeout(done, 50))")
        assert marker() == stopped
        assert browser.run("document.getElementById('fly').textContent") == "Fly"


def test_mix(page: str, models: dict[str, VAE], show: Callable[..., Browser]):
    browser = show(page, again=True)
    model = models["main"]
    browser.run("document.querySelector('#mix .from-class').focus()")
    browser.key("ArrowDown")
    browser.run("document.querySelector('#mix .to-next').click(); document.querySelector('#mix .share').focus()")
    browser.key("ArrowRight")
    share = idle(browser, "Number(document.querySelector('#mix .share').value)")
    start, end = (pixels(browser, f"#mix .{name}").flatten() for name in ("from", "to"))
    assert share == 0.51
    assert browser.run("document.querySelector('#mix .share + span').textContent") == "51%"
    with torch.no_grad():
        mu = model.encode(torch.stack([start, end]))[2]
        path = model.decode(torch.lerp(mu[0], mu[1], torch.linspace(0, 1, 11)[:, None]))
        mixed = model.decode(torch.lerp(mu[0], mu[1], share))
    torch.testing.assert_close(pixels(browser, "#mix .mixed-latents").flatten(), mixed, atol=5e-3, rtol=0)
    torch.testing.assert_close(
        pixels(browser, "#mix .mixed-pixels").flatten(), torch.lerp(start, end, share), atol=5e-3, rtol=0
    )
    torch.testing.assert_close(pixels(browser, "#mix .path-latents"), tile(path, 1), atol=5e-3, rtol=0)
    chosen = torch.tensor(browser.run("[1, 18].map(i => Array.from(images[i]))"))  # the first 1, and the second 8
    torch.testing.assert_close(torch.stack([start, end]), chosen, atol=5e-3, rtol=0)


def test_sample(page: str, models: dict[str, VAE], show: Callable[..., Browser]):
    browser = show(page, again=True)
    normal, vampprior = (f"#sample figure:nth-child({i}) canvas" for i in (1, 2))
    idle(browser)
    before = pixels(browser, normal)
    browser.run("document.querySelector('#sample .again').click()")
    idle(browser)
    after = pixels(browser, normal)
    assert not torch.equal(before, after)
    browser.run("document.querySelector('#sample .temperature').focus()")
    browser.key("Home")
    idle(browser)
    assert browser.run("document.querySelector('#sample .temperature + span').textContent") == "0.00"
    tiles = pixels(browser, normal).unfold(0, 28, 28).unfold(1, 28, 28).reshape(36, 784)
    expected = models["main"].decode(torch.zeros(1, 5)).detach()
    torch.testing.assert_close(tiles, expected.expand(36, -1), atol=5e-3, rtol=0)
    others = pixels(browser, vampprior).unfold(0, 28, 28).unfold(1, 28, 28).reshape(36, 784)
    assert 1 < len(others.unique(dim=0)) <= 6  # one for each of the mixture's components


def test_loss(page: str, models: dict[str, VAE], show: Callable[..., Browser]):
    browser = show(page, again=True)
    model = models["main"]
    idle(browser)
    x = pixels(browser, "#loss-image").view(1, -1)
    own = model.posterior(x)
    browser.run("document.querySelector('#loss-sliders input').focus()")
    browser.key("PageUp")
    browser.key("ArrowRight")
    latent = browser.run("main.order[0]")
    mu = own.mu.detach().clone()
    mu[0, latent] = idle(browser, "Number(document.querySelector('#loss-sliders input').value)")
    assert (mu - own.mu)[0, latent].item() == pytest.approx(0.81, abs=0.011)
    bce, kl, total, before = numbers(browser.run("document.getElementById('nats').textContent"))

    def terms(q: DiagonalNormal) -> tuple[float, Tensor]:
        """The BCE, averaged over draws of z, and the KL of each latent."""
        return -model.likelihood(q.rsample((4000,))).log_prob(x).mean().item(), kl_by_latent(q, model.prior())[0]

    expected, kls = terms(DiagonalNormal(mu, own.logvar))
    expected_before, kls_before = terms(own)
    assert bce == pytest.approx(expected, rel=5e-3)
    assert kl == pytest.approx(kls.sum().item(), abs=0.06)
    assert total == pytest.approx(bce + kl, abs=0.11)
    assert before == pytest.approx(expected_before + kls_before.sum().item(), rel=5e-3)
    by_latent = browser.run("document.querySelector('#loss-sliders span').textContent")
    assert numbers(by_latent)[1] == pytest.approx(kls[latent].item(), abs=0.006)
    traversed = mu.repeat(13, 1)
    traversed[:, latent] = torch.linspace(-3, 3, 13)
    torch.testing.assert_close(
        pixels(browser, "#traversal"), tile(model.decode(traversed).detach(), 1), atol=5e-3, rtol=0
    )
    browser.run("document.getElementById('reset').click()")
    _, _, total, before = numbers(idle(browser, "document.getElementById('nats').textContent"))
    assert total == before


def test_emoji(page: str, emoji: tuple[VAE, ImageData], show: Callable[..., Browser]):
    model, dataset = emoji
    browser = show(page)
    assert browser.run("document.querySelector('#emoji canvas')") is None
    show_emoji(browser)
    z = torch.randn(4, 6)
    decoded = torch.tensor(
        browser.run(
            f"(() => {{ const {{ decode }} = readModel(data.emoji.model); "
            f"return {z.tolist()}.map(z => Array.from(decode(z))); }})()"
        )
    )
    with torch.no_grad():
        expected = model.decode(z)
        mu = model.posterior(dataset.test_images / 255).mean
        path = model.decode(
            torch.lerp(mu[make.STARTS["from"]], mu[make.STARTS["to"] + 1], torch.linspace(0, 1, 11)[:, None])
        )
        middle = model.decode(model.prior().invert(torch.zeros(1, 6))).expand(36, -1)
    assert expected.std() > 0.2
    assert decoded.view(4, 8, 12, 3).permute(0, 3, 1, 2).flatten(1).sub(expected).abs().max() < 1e-3
    browser.run("document.querySelector('#emoji .to-next').click()")
    browser.run("document.querySelector('#emoji .temperature').focus()")
    browser.key("Home")
    idle(browser)
    start = dataset.test_images[make.STARTS["from"]].permute(1, 2, 0) / 255
    shown = {"#emoji .from": start, "#emoji .path-latents": tile(path, 1, dataset.shape)}
    shown["#emoji .grids canvas"] = tile(middle, 6, dataset.shape)
    for selector, picture in shown.items():
        torch.testing.assert_close(pixels(browser, selector, colour=True), picture, atol=5e-3, rtol=0)
    draws = pixels(browser, "#emoji .grids figure:last-child canvas", colour=True)
    draws = draws.view(6, 8, 6, 12, 3).permute(0, 2, 4, 1, 3).reshape(36, -1)
    with torch.no_grad():
        assert torch.cdist(draws, model.decode(mu)).amin(1).max() < 0.1  # at temperature 0


# ---------------------------------------------------------------------------------------------------------------------
# The page as a whole


def test_everything_is_named_and_legible(page: str, show: Callable[..., Browser]):
    browser = show(page)
    for dark in (False, True):
        browser.resize(390, 844, phone=True, dark=dark)
        show_emoji(browser)
        assert browser.run("document.documentElement.scrollWidth") == 390
        low = browser.run("""[...document.querySelectorAll("button, select, input:not([type=checkbox]), nav a")]
            .filter(control => !control.hidden && control.getBoundingClientRect().height < 44)
            .map(control => control.outerHTML)""")
        assert low == []
        pale = browser.run("""(() => {
            const channel = c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
            const luminance = color => color.match(/[.\\d]+/g).slice(0, 3)
              .reduce((total, c, i) => total + [0.2126, 0.7152, 0.0722][i] * channel(c / 255), 0);
            const behind = element => {
              const color = getComputedStyle(element).backgroundColor;
              return color === "rgba(0, 0, 0, 0)" ? behind(element.parentNode) : color;
            };
            return [...document.querySelectorAll("h1, h2, p, a, button, select, figcaption, label, output, li, span")]
              .filter(element => {
                const [a, b] = [getComputedStyle(element).color, behind(element)].map(luminance).sort((a, b) => b - a);
                return (a + 0.05) / (b + 0.05) < 4.5;
              }).map(element => element.outerHTML);
        })()""")  # WCAG 2.1, success criterion 1.4.3
        assert pale == []
    nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
    roles = ("button", "slider", "combobox", "checkbox", "image", "application", "link", "heading", "region")
    named = [(node["role"]["value"], node["name"]["value"]) for node in nodes if node["role"]["value"] in roles]
    assert {role for role, _ in named} == set(roles)
    assert [role for role, name in named if not name] == []


def test_the_committed_page_is_what_its_command_makes():
    page = PAGE.read_text(encoding="utf-8")
    assert len(page.encode()) <= 6_500_000
    assert not re.search(r"""(src|href|action)=["']?(?!["']?(#|data:,))""", page)
    assert not re.search(r"url\(|fetch\(|XMLHttp|import\(|WebSocket", page)
    assert make.make_index(WEIGHTS) == page


def test_rounded_weights_cost_little(show: Callable[..., Browser]):
    """The committed page's models and those in weights/ reconstruct alike, and the negative ELBO at the mean agrees."""
    browser = show(PAGE, again=True)
    losses, x, decoded, points = map(
        torch.tensor,
        browser.run("""(() => {
            const loss = (posterior, x) => sum(klByLatent(posterior)) + sum(bceByPixel(main.logits(posterior.mu), x));
            const emoji = readModel(data.emoji.model), first = images.slice(0, 100), points = emoji.points.slice(0, 10);
            return [
              first.map(x => loss(main.encode(x), x)), first.map(x => Array.from(x)),
              points.map(z => Array.from(emoji.decode(z))), points.map(z => Array.from(z)),
            ];
        })()"""),
    )
    main, emoji = (runs.load_checkpoint(WEIGHTS / f"{name}.pt")[0] for name in ("default", "emoji"))
    with torch.no_grad():
        q = main.posterior(x)
        expected = kl_by_latent(q, main.prior()).sum(-1) - main.likelihood(q.mean).log_prob(x)
        pictures = emoji.decode(points).view(-1, 3, 32, 32).permute(0, 2, 3, 1).flatten(1)
    assert losses.mean().item() == pytest.approx(expected.mean().item(), abs=0.2)
    assert decoded.sub(pictures).abs().mean() < 1 / 255


def with_another_decoder() -> VAE:
    model = VAE(hidden_size=8)
    model.decoder = nn.Linear(20, 784)
    return model


@pytest.mark.parametrize(
    ("make_model", "reason"),
    [
        (lambda: VAE(latent_size=1), "two latents"),
        (lambda: VAE(hidden_size=3000), "million"),
        (lambda: VAE(100), "other images"),
        (VampVAE, "prior"),
        (lambda: VAE(likelihood="logistic"), "likelihood"),
        (ConditionalVAE, "posterior"),
        (with_another_decoder, "decoder"),
    ],
)
def test_what_the_explorer_refuses(make_model: Callable[[], VAE], reason: str, few: ImageData):
    with pytest.raises(UserError, match=reason):
        make.make_explorer(make_model(), few, "")


def test_command_writes_the_explorer(few: ImageData, fails: Callable, call: Callable, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(evaluate, "load_dataset", lambda *_: few)
    path = tmp_path / "default.pt"
    assert "other images" in fails(make.main, shutil.copy(WEIGHTS / path.name, path))
    runs.save_checkpoint(path, runs.read_checkpoint(path) | few.checksums())
    call(make.main, path)
    page = (tmp_path / "default" / "explorer.html").read_text(encoding="utf-8")
    assert "mnist-5k binarized by sampling, 20 latents, epoch 20" in page


@pytest.mark.parametrize("latent_size", [2, 6])
def test_the_latents_come_in_the_order_of_their_kl(latent_size: int, few: ImageData):
    """But two are the axes of a map, and keep their places."""
    torch.manual_seed(0)
    model = VAE(hidden_size=16, latent_size=latent_size)
    model.latent_z.mu.weight.data[1] *= 5
    content = make.make_explorer(model, few, "")
    order = json.loads(re.search(r'"order":(\[[\d,]*\])', content)[1])
    _, logvar, mu = model.encode(few.test_images / 255)
    kl = kl_divergence(Normal(mu, torch.exp(0.5 * logvar)), Normal(0, 1)).mean(0)
    largest_first = sorted(range(latent_size), key=lambda latent: -kl[latent])
    assert largest_first[0] == 1
    assert order == ([0, 1] if latent_size == 2 else largest_first)


# ---------------------------------------------------------------------------------------------------------------------
# Erase


def test_completions_follow_the_conditional_distribution(show: Callable[..., Browser]):
    """Of images of four pixels, for which a grid over two latents gives it. What was erased makes no difference."""
    torch.manual_seed(0)
    model = VAE(input_size=4, hidden_size=8, latent_size=2)
    for weights in model.parameters():
        nn.init.normal_(weights, std=0.8)
    for weights in model.latent_z.parameters():
        weights.data /= 4
    model.latent_z.logvar.bias.data += 0.5  # wide proposals, which need fewer steps
    images, labels = torch.randint(256, (20, 1, 2, 2), dtype=torch.uint8), torch.arange(20) % 2
    browser = show(make.make_explorer(model, ImageData("tiny", ["0", "1"], images, labels, images, labels), "caption"))
    chain = """((pixels, count) => {
        const chain = complete(main, pixels, [0, 0, 1, 1], generator(0)), states = [];
        while (states.length < count) states.push(chain.next().value);
        return states.map(({ z, logits }) => [...z, ...logits.slice(2)]);
    })"""
    states = torch.tensor(browser.run(f"{chain}([0.9, 0.2, 0, 0], 25000)"))
    assert torch.equal(states[:100], torch.tensor(browser.run(f"{chain}([0.9, 0.2, 1, 1], 100)")))
    ticks = torch.linspace(-6, 6, 241)
    grid = torch.cartesian_prod(ticks, ticks)
    with torch.no_grad():
        logits = model.decoder.logits(grid)
    seen = torch.distributions.Bernoulli(logits=logits[:, :2]).log_prob(torch.tensor([1.0, 0.0])).sum(1)
    weights = torch.softmax(model.prior().log_prob(grid) + seen, 0)

    def features(z: Tensor, logits: Tensor) -> Tensor:
        """Of the latents, two moments. Of the erased pixels, the probabilities of each and of both."""
        p = torch.sigmoid(logits)
        return torch.cat([z, z**2, z.prod(1, keepdim=True), p, p.prod(1, keepdim=True)], 1)

    expected = weights @ features(grid, logits[:, 2:])
    torch.testing.assert_close(features(states[:, :2], states[:, 2:]).mean(0), expected, atol=0.05, rtol=0)


def test_only_what_is_erased_is_filled_in(show: Callable[..., Browser]):
    """With a finger and by the keyboard, and of a drawing too. Other completions follow on demand."""
    browser = show(PAGE)
    browser.resize(390, 844, phone=True)

    def check() -> tuple[Tensor, Tensor]:
        """The erased pixels, (28, 28), and the completions, (6, 28, 28)."""
        drawing, eraser = idle(browser) or pixels(browser, "#read"), pixels(browser, "#eraser", colour=True)
        filled = [pixels(browser, f"#completions :nth-child({i})", colour=True) for i in range(1, 7)]
        erased = eraser[..., 0] != eraser[..., 2]
        for picture in (eraser, *filled):
            assert torch.equal(picture[~erased], drawing[~erased][:, None].expand(-1, 3))
            assert (picture[..., 0] != picture[..., 2])[erased].all()
        distances = torch.pdist(torch.stack(filled)[:, erased, 0])
        assert distances.min() > 0.1
        return erased, torch.stack(filled)[..., 0]

    top = torch.arange(28)[:, None].expand(28, 28) < 14
    assert torch.equal(check()[0], top)
    browser.run("document.querySelector('#parts button:nth-of-type(2)').focus()")
    browser.key("Enter")
    assert torch.equal(check()[0], ~top)
    browser.run("document.getElementById('clear').click()")
    browser.run("document.querySelector('#parts button:last-child').click()")
    for stroke in STROKES["4"]:
        browser.drag([browser.place("#pad", *point) for point in stroke], touch=True)
    path = [(0.2, 0.3), (0.2, 0.6), (0.7, 0.6)]
    browser.drag([browser.place("#eraser", *point) for point in path], touch=True)
    erased, before = check()
    shares = covered_shares([[(28 * x, 28 * y) for x, y in path]], pen=2.5)
    assert erased[shares > 0.8].all()
    assert not erased[shares < 0.2].any()
    browser.run("document.getElementById('others').click()")
    again, after = check()
    assert torch.equal(erased, again)
    assert torch.cdist(before.flatten(1), after.flatten(1)).min() > 0.1
