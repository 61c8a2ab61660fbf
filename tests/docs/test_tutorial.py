"""Every command of the tutorial is run, in order, by a shell in one folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from synthrep_shared.client import SynthRep
from tests.docs.conftest import DOCS, ROOT, LiveStack, shell_blocks

pytestmark = [pytest.mark.e2e, pytest.mark.redis, pytest.mark.timeout(600)]

TUTORIAL = DOCS / "tutorial.md"
DONE_BY_THE_TEST = ("make install", ". .venv/bin/activate", "synthrep up")
"""Lines that the fixture does in its own way: an environment that is there, ports that are free."""

# `watch` is for people: the script leaves it as they do, when nothing is under way any more.
_PRELUDE = f"""\
PS4='+ $SECONDS s: '
set -euo pipefail
synthrep() {{
  if [ "$1" = watch ]; then
    "{sys.executable}" -m tests.docs.watch_until_done
  else
    "{Path(sys.executable).parent}/synthrep" "$@"
  fi
}}
"""


def script(stack: LiveStack) -> str:
    """The tutorial as one shell script against the stack."""
    lines = [
        line
        for block in shell_blocks(TUTORIAL)
        for line in block.splitlines()
        if line not in DONE_BY_THE_TEST
    ]
    text = "\n".join(lines).replace("localhost:8000", stack.generator_url)
    return _PRELUDE + text.replace("localhost:8001", stack.trainer_url) + "\n"


def test_what_is_left_out_is_in_the_tutorial() -> None:
    lines = {line for block in shell_blocks(TUTORIAL) for line in block.splitlines()}
    assert lines >= set(DONE_BY_THE_TEST)


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_every_command_of_the_tutorial_runs(live_stack: LiveStack) -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    modules = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | live_stack.environment | {"PATH": path, "PYTHONPATH": modules}
    done = subprocess.run(
        ["bash", "-x", "-c", script(live_stack)],
        cwd=live_stack.folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    with SynthRep(live_stack.generator_url, live_stack.trainer_url) as client:
        sizes = {view.name: view.images for view in client.datasets()}
        assert {name: sizes[name] for name in ("pets", "photos", "mine")} == {
            "pets": 64,
            "photos": 64,
            "mine": 16,
        }
        [run] = [run for run in client.runs() if run.request["dataset"] == "pets"]
        assert (run.state, run.step) == ("completed", 20)
        assert "things" in {labelled["name"] for labelled in client.probe_datasets()}
    assert list((live_stack.folder / "encoder").glob("*.safetensors"))
