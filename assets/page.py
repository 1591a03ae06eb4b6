"""Films docs/index.html in Chromium, for assets/make.py."""

import contextlib
import io
import json
import math
import os
import shutil
import subprocess
import tempfile
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Browser:
    """A page in headless Chromium. The DevTools protocol drives it over a pipe, so no package is needed.

    `errors` collects the page's errors: exceptions, console.error, and requests for anything outside the page.
    """

    def __init__(self, read: int, write: int):
        self.replies, self.commands = os.fdopen(read, "rb", 0), os.fdopen(write, "wb", 0)
        self.buffer, self.number, self.session, self.errors, self.events = b"", 0, None, [], []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Sends a command and waits for its result. Raises RuntimeError for one that fails."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        self.commands.write(json.dumps(message).encode() + b"\0")
        while (reply := self._read()).get("id") != self.number:
            self._note(reply)
        if "error" in reply:
            raise RuntimeError(f"{method}: {reply['error']['message']}")
        return reply["result"]

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            if not (chunk := self.replies.read(1 << 20)):
                raise RuntimeError("Chromium ended")
            self.buffer += chunk
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        method, params = event.get("method"), event.get("params", {})
        self.events.append(method)
        if method == "Runtime.exceptionThrown":
            self.errors.append(params["exceptionDetails"].get("exception", {}).get("description", str(params)))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.errors.append(str(params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.errors.append(params["entry"]["text"])
        elif method == "Network.requestWillBeSent" and not params["request"]["url"].startswith(("file:", "data:")):
            self.errors.append(params["request"]["url"])

    def open(self, url: str) -> None:
        self.events.clear()
        self.call("Page.navigate", url=url)
        while "Page.loadEventFired" not in self.events:
            self._note(self._read())

    def run(self, script: str) -> Any:
        """The value of an expression, awaited if it is a promise. Raises RuntimeError if it throws."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise RuntimeError(result["exceptionDetails"]["exception"]["description"])
        return result["result"].get("value")

    def resize(
        self, width: int, height: int, scale: float = 1, phone: bool = False, dark: bool = False, still: bool = False
    ) -> None:
        """Sets the window's size and its user's preferences: dark colours, little motion."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": phone}
        self.call("Emulation.setDeviceMetricsOverride", **metrics)
        self.call("Emulation.setTouchEmulationEnabled", enabled=phone)
        preferences = {
            "prefers-color-scheme": "dark" if dark else "light",
            "prefers-reduced-motion": "reduce" if still else "no-preference",
        }
        features = [{"name": name, "value": value} for name, value in preferences.items()]
        self.call("Emulation.setEmulatedMedia", features=features)

    def place(self, selector: str, x: float = 0.5, y: float = 0.5) -> tuple[float, float]:
        """Scrolls to an element -> where a place in it, given in shares of its width and height, is on the screen."""
        return tuple(
            self.run(f"""(() => {{
            const element = document.querySelector({json.dumps(selector)});
            element.scrollIntoView({{ block: "nearest", behavior: "instant" }});
            const box = element.getBoundingClientRect();
            return [box.left + {x} * box.width, box.top + {y} * box.height];
        }})()""")
        )

    def point(self, kind: str, place: tuple[float, float], touch: bool = False) -> None:
        """Moves a mouse or a finger at a place on the screen. kind: press, move or release."""
        x, y = place
        if touch:
            kinds = {"press": "touchStart", "move": "touchMove", "release": "touchEnd"}
            points = [] if kind == "release" else [{"x": x, "y": y}]
            self.call("Input.dispatchTouchEvent", type=kinds[kind], touchPoints=points)
        else:
            kinds = {"press": "mousePressed", "move": "mouseMoved", "release": "mouseReleased"}
            held = {"button": "left", "buttons": int(kind != "release"), "clickCount": int(kind != "move")}
            self.call("Input.dispatchMouseEvent", type=kinds[kind], x=x, y=y, **held)

    def drag(self, places: list[tuple[float, float]], touch: bool = False) -> None:
        self.point("press", places[0], touch)
        for place in places[1:]:
            self.point("move", place, touch)
        self.point("release", places[-1], touch)

    def key(self, name: str, shift: bool = False) -> None:
        codes = {
            "Enter": 13,
            "PageUp": 33,
            "Home": 36,
            "ArrowLeft": 37,
            "ArrowUp": 38,
            "ArrowRight": 39,
            "ArrowDown": 40,
        }
        key = {"key": name, "windowsVirtualKeyCode": codes[name], "modifiers": 8 * shift}
        text = {"text": "\r"} if name == "Enter" else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", **key, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **key)

    def screenshot(self) -> bytes:
        """The window as PNG."""
        return b64decode(self.call("Page.captureScreenshot", format="png")["data"])


@contextlib.contextmanager
def open_browser(profile: Path) -> Iterator[Browser]:
    """Starts Chromium with its files in the folder `profile`, and ends it. Raises FileNotFoundError without it."""
    if not BROWSER:
        raise FileNotFoundError("no Chromium on this machine (Debian: apt-get install chromium)")
    (command_out, command_in), (reply_out, reply_in) = os.pipe(), os.pipe()
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--remote-debugging-pipe",
        f"--user-data-dir={profile}",
    ]
    pipes = f'exec 3<&{command_out} 4>&{reply_in}; exec "$@"'  # Chromium reads commands from 3, and replies to 4
    process = subprocess.Popen(
        ["bash", "-c", pipes, "bash", BROWSER, *flags],
        pass_fds=(command_out, reply_in),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(command_out)
    os.close(reply_in)
    try:
        browser = Browser(reply_out, command_in)
        yield browser
        browser.session = None
        browser.call("Browser.close")
    finally:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        process.kill()


def film(browser: Browser) -> Iterator[tuple[bytes, int]]:
    """Draws a 3, makes an 8 of it, and walks about the map -> screenshots, with the milliseconds to show each."""
    browser.run("document.querySelector('#draw .panels').scrollIntoView({ behavior: 'instant' })")
    for strokes in ([arc(0.35, -150, 90), arc(0.66, -90, 150)], [arc(0.66, 150, 270), arc(0.35, 90, 210)]):
        places = [browser.place("#pad", *point) for stroke in strokes for point in stroke]
        browser.point("press", places[0])
        for place in places[1:]:
            browser.point("move", place)
            yield still(browser), 80
        browser.point("release", places[-1])
        yield still(browser), 1200
    browser.run("document.querySelector('#walk .panels').scrollIntoView({ behavior: 'instant' })")
    route = "Array.from({ length: 46 }, (_, i) => Array.from(closedPath(stops.map(({ mu }) => mu), 7 + i / 15)))"
    places = [browser.place("#walk-map", 0.5 + x / 8, 0.5 - y / 8) for x, y in browser.run(route)]
    browser.point("press", places[0])
    for place in places[1:]:
        browser.point("move", place)
        yield still(browser), 80
    browser.point("release", places[-1])
    yield still(browser), 1000


def arc(y: float, start: float, end: float, steps: int = 8) -> list[tuple[float, float]]:
    """An arc of one of the two circles of an 8, from one angle to another, in degrees."""
    angles = [math.radians(start + (end - start) * i / steps) for i in range(steps + 1)]
    return [(0.5 + 0.17 * math.cos(angle), y + 0.155 * math.sin(angle)) for angle in angles]


def still(browser: Browser) -> bytes:
    """A screenshot, taken after the page has drawn its last change."""
    browser.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    return browser.screenshot()


def draw(path: Path, comment: str) -> None:
    """Writes the film as a GIF that carries the comment unseen. Raises FileNotFoundError without Chromium."""
    index = Path(__file__).parent.parent / "docs" / "index.html"
    with tempfile.TemporaryDirectory() as profile, open_browser(Path(profile)) as browser:
        browser.resize(900, 630)
        browser.open(index.as_uri())
        browser.run(
            "new Promise(done => { const wait = () => jobs.size ? requestAnimationFrame(wait) : done(); wait(); })"
        )
        shots, durations = zip(*film(browser), strict=True)
    frames = [
        Image.open(io.BytesIO(shot)).convert("RGB").resize((640, 448), Image.Resampling.LANCZOS) for shot in shots
    ]
    both = Image.new("RGB", (frames[0].width, 2 * frames[0].height))
    for i, frame in enumerate((frames[0], frames[-1])):
        both.paste(frame, (0, i * frame.height))
    palette = both.quantize(240, Image.Quantize.MAXCOVERAGE)  # one for all: what stays still is stored once
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    options = {"duration": list(durations), "loop": 0, "optimize": True, "comment": comment}
    frames[0].save(path, save_all=True, append_images=frames[1:], **options)
