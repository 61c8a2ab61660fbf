"""What is measured of the page: what viewers see, and how long after it was committed."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from benchmarks.scale.made_logs import next_record
from benchmarks.scale.page import lags, measure_page
from benchmarks.scale.page_viewers import Viewer
from synthrep_shared.commit_log import LogReader


class _Stream(BaseHTTPRequestHandler):
    """A page of two events that ends."""

    def do_GET(self) -> None:
        body = (
            b'event: images\ndata: <li id="group-aa">\ndata: <li id="group-bb">\n\nevent: runs\n\n'
        )
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def page() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Stream) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_viewer_notes_what_it_is_shown_and_that_its_stream_ended(page: str) -> None:
    viewer = Viewer(page)
    viewer.run()
    assert viewer.events == 2
    assert list(viewer.seen) == ["aa", "bb"]
    with pytest.raises(RuntimeError, match="the stream ended"):
        viewer.raise_fault()


def test_lags_count_from_the_commit_to_the_first_group_that_a_viewer_is_shown(
    tmp_path: Path,
) -> None:
    record = next_record(1, "b", 0, 3)
    record = record.model_copy(update={"created_at": datetime(2026, 1, 1, tzinfo=UTC)})
    path = tmp_path / "commits.jsonl"
    path.write_text(record.model_dump_json() + "\n")
    committed = record.created_at.timestamp()
    quick, slow, blind = (Viewer("http://nowhere") for _ in range(3))
    quick.seen = {record.groups[0].gid: committed + 2, record.groups[2].gid: committed + 0.5}
    slow.seen = {record.groups[1].gid: committed + 3}
    assert lags(LogReader(path), [quick, slow, blind]) == pytest.approx([500, 3000])


@pytest.mark.e2e
@pytest.mark.redis
@pytest.mark.long
def test_the_page_is_measured_over_a_small_log() -> None:
    if not (shutil.which("chromium") or shutil.which("google-chrome")):
        pytest.skip("needs Chromium (Debian's package chromium) or Chrome")
    found = measure_page(64, 2, warm_s=5, measured_s=5)
    assert found["update"]["answers"] > 0
    assert found["commit_to_viewer"]["p50_ms"] > 0
    assert 20 < found["tab_mb"] < 500
    assert found["tab_updates"] > 0
