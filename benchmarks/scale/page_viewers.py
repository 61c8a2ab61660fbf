"""Who looks at the page: streams that are kept open, and the tab of a real browser."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from benchmarks.scale.usage import short

_PATIENCE_S = 120.0


@dataclass
class Viewer(threading.Thread):
    """Keeps the stream of one page open, and notes when it first names a group."""

    url: str
    events: int = 0
    num_bytes: int = 0
    seen: dict[str, float] = field(default_factory=dict)
    error: str = ""

    def __post_init__(self) -> None:
        super().__init__(daemon=True)
        self._stopped = threading.Event()

    __hash__ = threading.Thread.__hash__

    def stop(self) -> None:
        """End with the next event; raises RuntimeError if the stream ended before."""
        self._stopped.set()
        self.join(_PATIENCE_S)
        self.raise_fault()

    def raise_fault(self) -> None:
        """Raise RuntimeError if the stream ended by itself."""
        if self.error:
            raise RuntimeError(self.error)

    def run(self) -> None:
        """The thread: see the class."""
        try:
            with httpx.stream("GET", f"{self.url}/page/events", timeout=_PATIENCE_S) as response:
                response.raise_for_status()
                for line in response.iter_lines():
                    self._take(line)
                    if self._stopped.is_set():
                        return
            self.error = "the stream ended"
        except httpx.HTTPError as error:
            self.error = repr(error)

    def _take(self, line: str) -> None:
        self.num_bytes += len(line)
        self.events += line.startswith("event:")
        _, found, gid = line.partition('id="group-')
        if found:
            self.seen.setdefault(gid.partition('"')[0], time.time())


class Tab:
    """The page in a real browser."""

    def __init__(self, page: Any, browser: Any) -> None:
        self._page, self._browser = page, browser.new_browser_cdp_session()
        self._session = page.context.new_cdp_session(page)
        self._session.send("Performance.enable")
        self._before: dict[str, float] = {}
        self._first_bytes = 0

    def begin(self) -> None:
        """Count from here on."""
        self._page.evaluate(
            "window.updates = 0;"
            "document.body.addEventListener('htmx:sseMessage', () => { window.updates += 1; })"
        )
        self._before, self._first_bytes = self._metrics(), self._bytes()

    def end(self) -> dict[str, float]:
        """Memory, and the processor time that one event of the stream took."""
        after = self._metrics()
        busy_s = after["TaskDuration"] - self._before["TaskDuration"]
        updates = self._page.evaluate("window.updates")
        return {
            "tab_first_mb": short(self._first_bytes / 1e6),
            "tab_mb": short(self._bytes() / 1e6),
            "tab_heap_mb": short(after["JSHeapUsedSize"] / 1e6),
            "tab_nodes": int(after["Nodes"]),
            "tab_updates": updates,
            "tab_ms_per_update": short(1e3 * busy_s / max(updates, 1)),
        }

    def _bytes(self) -> int:
        """Memory of the process that shows the page."""
        processes = self._browser.send("SystemInfo.getProcessInfo")["processInfo"]
        return max(_private_bytes(p["id"]) for p in processes if p["type"] == "renderer")

    def _metrics(self) -> dict[str, float]:
        found = self._session.send("Performance.getMetrics")["metrics"]
        return {item["name"]: item["value"] for item in found}


@contextmanager
def open_tab(url: str) -> Iterator[Tab]:
    """The page at `url` in Chromium, for the block."""
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium") or shutil.which("google-chrome")
    options = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=options)
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.set_default_timeout(1000 * _PATIENCE_S)
        page.goto(url)
        yield Tab(page, browser)
        browser.close()


def _private_bytes(pid: int) -> int:
    """Memory of a process; what it shares with others counts in part."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
