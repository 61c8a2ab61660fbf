"""The pages of reference that are made of the code: command, both APIs, recipes."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

import typer
from starlette.testclient import TestClient
from typer.cli import get_docs_for_click

from docs.builder.openapi import api_page
from synthrep_cli.main import app
from synthrep_generator.api import create_app as create_generator
from synthrep_generator.settings import GeneratorSettings
from synthrep_shared.presets import load_preset, preset_names
from synthrep_trainer.api import create_app as create_trainer
from synthrep_trainer.settings import TrainerSettings

_KEY = "documentation-reads-with-this-key"
# What the headings say anyway: "Usage", and lists of commands whose descriptions are cut off.
_REPEATED = re.compile(r"\*\*Usage\*\*:\n\n|\*\*Commands\*\*:\n\n(?:\* .*\n)+")
_HEADERS = {"authorization": f"Bearer {_KEY}"}


def write_reference(folder: Path, *, root: Path) -> None:
    """Write `cli.md`, `generator-api.md`, `trainer-api.md`, `presets.md` and `settings.md`."""
    folder.mkdir(parents=True, exist_ok=True)
    pages = {
        "settings": settings_page((root / ".env.example").read_text()),
        "cli": cli_page(),
        "generator-api": api_page(generator_document()),
        "trainer-api": api_page(trainer_document()),
        "presets": presets_page(),
    }
    for name, text in pages.items():
        (folder / f"{name}.md").write_text(text)


def generator_document() -> dict[str, Any]:
    """What `GET /openapi.json` of the generator answers, where there are keys."""
    with tempfile.TemporaryDirectory() as folder:
        settings = GeneratorSettings.model_validate({"root": folder, "api_keys": [_KEY]})
        return _document(create_generator(settings))


def trainer_document() -> dict[str, Any]:
    """What `GET /openapi.json` of the trainer answers, where there are keys."""
    with tempfile.TemporaryDirectory() as folder:
        values = {"root": folder, "runs": f"{folder}/runs", "api_keys": [_KEY]}
        return _document(create_trainer(TrainerSettings.model_validate(values)))


def _document(service: Any) -> dict[str, Any]:
    answer = TestClient(service, headers=_HEADERS).get("/openapi.json")
    answer.raise_for_status()
    document: dict[str, Any] = answer.json()
    return document


def cli_page() -> str:
    """Every command with its arguments and options, as `--help` has them."""
    command = typer.main.get_command(app)
    context = typer.Context(command)
    text = get_docs_for_click(obj=command, ctx=context, name="synthrep", title="The command")
    return _REPEATED.sub("", text)


def settings_page(example: str) -> str:
    """Every setting, as the file of examples has them, which a test holds to the classes."""
    return f"# Settings\n\nThe file `.env.example`, whole.\n\n```bash\n{example}```\n"


def presets_page() -> str:
    """A table of the published recipes, and what each of them costs."""
    lines = [
        "# Recipes",
        "",
        "`synthrep train --preset NAME --dataset D` starts one. Expected values are the published",
        "ones, with their protocol; none of these was run at full size by this project.",
        "",
        "| recipe | objective | encoder | images a step | steps | expected |",
        "|---|---|---|---|---|---|",
    ]
    costs = []
    for name in preset_names():
        preset = load_preset(name)
        request = preset.request
        images = request["captions_per_batch"] * request.get("images_per_caption", 1)
        expected = "<br>".join(
            f"{e.dataset}, {e.protocol}: {100 * e.value:.1f} %" for e in preset.expected
        )
        lines.append(
            f"| [`{name}`](#{name}) | {request['objective']} | {request['model']} | {images:,} "
            f"| {request['max_steps']:,} | {expected or '–'} |"
        )
        commands = "\n".join(preset.commands)
        cost = " ".join(preset.cost.split())
        costs += ["", f"## {name} {{ #{name} }}", "", f"```text\n{commands}\n```", "", cost]
    return "\n".join([*lines, *costs, ""])
