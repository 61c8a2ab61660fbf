"""Commands that the documentation shows are commands that there are."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest
import typer

from synthrep_cli.main import app
from tests.docs.conftest import DOCS, ROOT

_COMMAND = re.compile(r"(?:^|`|\$ |\| |=\$\(|&& )synthrep ([a-z][^`#|&)\n]*)", re.MULTILINE)
PAGES = sorted([ROOT / "README.md", *DOCS.rglob("*.md")])


def complaint(words: list[str]) -> str | None:
    """What is wrong with the words after `synthrep`, if anything."""
    command: click.Command = typer.main.get_command(app)
    while hasattr(command, "commands") and words:
        if words[0] not in command.commands:
            return f"no command {words[0]}"
        command, words = command.commands[words[0]], words[1:]
    known = {name for parameter in command.params for name in parameter.opts} | {"--help"}
    unknown = [word for word in words if word.startswith("--") and word not in known]
    return f"{command.name} has no {', '.join(unknown)}" if unknown else None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_and_option_exists(page: Path) -> None:
    found = [match.split() for match in _COMMAND.findall(page.read_text())]
    assert [c for words in found if (c := complaint(words))] == []


def test_a_wrong_option_is_seen() -> None:
    assert complaint(["dataset", "verify", "D", "--fast"]) == "verify has no --fast"
    assert complaint(["fly"]) == "no command fly"
    assert complaint(["dataset", "verify", "D", "--root", "x"]) is None


def test_the_front_page_shows_commands() -> None:
    assert len(_COMMAND.findall((ROOT / "README.md").read_text())) > 8
