"""The loop in small, with the real processes, the real model and an embedded Valkey."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from synthrep_cli.demo import DemoConfig, load_captions, run_demo
from synthrep_generator.settings import GeneratorSettings

pytestmark = [pytest.mark.e2e, pytest.mark.redis, pytest.mark.timeout(600)]

TINY = GeneratorSettings().models["tiny"].path


def processes_in(folder: Path) -> list[int]:
    """Processes whose environment names `folder`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if str(folder).encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
            except (FileNotFoundError, PermissionError, ProcessLookupError):
                continue
    return found


def test_captions_become_a_judged_encoder(tmp_path):
    config = DemoConfig(
        folder=tmp_path / "demo",
        captions=24,
        images_per_caption=4,
        max_images=32 * 40,
        captions_per_batch=8,
        probe_sets=("digits",),
    )
    output = io.StringIO()
    report = run_demo(config, load_captions(TINY / "captions.tsv", 24), Console(file=output))
    written = json.loads((config.folder / "report.json").read_text())
    assert written["groups_committed"] == report.groups_committed == 24
    assert written["images_generated"] == 96
    assert written["train_steps"] == 40
    assert written["images_trained"] == 1280
    assert [p["dataset"] for p in written["probes"]] == ["digits"]
    page = (config.folder / "report.html").read_text()
    assert page.count('<img alt=""') == 96
    assert not re.search(r"""(src|href|url)\s*[=(]\s*["']?(https?:)?//""", page)
    assert processes_in(config.folder) == []


def test_interrupt_stops_every_process(tmp_path):
    folder = tmp_path / "demo"
    program = [sys.executable, "-m", "synthrep_cli.main", "demo", "--folder", str(folder)]
    demo = subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(processes_in(folder)) < 5:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    demo.send_signal(signal.SIGINT)
    assert demo.wait(60) != 0
    assert processes_in(folder) == []
