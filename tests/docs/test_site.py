"""The site builds strictly, is whole without a network, and covers what it should."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from docs.builder.__main__ import build
from docs.builder.openapi import api_page
from docs.builder.reference import generator_document, trainer_document
from docs.builder.stage import BrokenLinkError, stage_pages
from tests.docs.conftest import ROOT

_LOADED = re.compile(r"<(?:script|img|link|iframe|source)\b[^>]*?\b(?:src|href)=\"?(https?:)?//")
_CANONICAL = re.compile(r"<link rel=\"?canonical[^>]*>")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    folder = tmp_path_factory.mktemp("site") / "site"
    build(folder)
    return folder


def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        text = page.read_text()
        assert not _LOADED.search(_CANONICAL.sub("", text)), page
        assert 'class="mermaid"' not in text, "the theme fetches what draws it"


def test_every_decision_is_in_the_navigation(site: Path) -> None:
    index = (site / "index.html").read_text()
    for page in (ROOT / "docs" / "decisions").glob("*.md"):
        assert f"decisions/{page.stem}.html" in index


def test_reference_is_made_of_the_code(site: Path) -> None:
    python = (site / "reference" / "python.html").read_text()
    for name in ("multi_positive_contrastive_loss", "submit", "LogReader", "max_uses_per_image"):
        assert name in python
    assert "--images-per-prompt" in (site / "reference" / "cli.html").read_text()
    assert "SYNTHREP_GENERATOR_LEASE_S" in (site / "reference" / "settings.html").read_text()


@pytest.mark.parametrize("document", [generator_document, trainer_document])
def test_every_call_and_schema_is_on_the_page(document) -> None:
    described = document()
    page = api_page(described)
    for path, operations in described["paths"].items():
        for method in operations:
            assert f"`{method.upper()} {path}`" in page
    targets = set(re.findall(r"\]\(#([a-z0-9-]+)\)", page))
    assert targets <= set(re.findall(r"\{ #([a-z0-9-]+) \}", page))


def test_a_link_to_nothing_ends_the_build(tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(ROOT / "docs" / "how-to", root / "docs")
    with pytest.raises(BrokenLinkError, match=r"one-gpu\.md -> \.\./tutorial\.md"):
        stage_pages(root, tmp_path / "staged")


def test_what_a_page_links_to_becomes_a_page(tmp_path: Path) -> None:
    root, staged = tmp_path / "root", tmp_path / "staged"
    (root / "docs").mkdir(parents=True)
    (root / "README.md").write_text("[back](docs/index.md) ![picture](a.png)")
    (root / "a.png").write_bytes(b"png")
    (root / "code.py").write_text("x = 1\n")
    text = "[front](../README.md#top) [code](../code.py) [out](https://x.org) [all](../docs)"
    (root / "docs" / "index.md").write_text(f"{text}\n```\n[no](x.md)\n```\n")
    stage_pages(root, staged)
    index = (staged / "index.md").read_text()
    assert "[front](source/readme-page.md#top) [code](source/code.py.md)" in index
    assert "(https://x.org)" in index
    assert "[no](x.md)" in index
    assert "[back](../index.md)" in (staged / "source" / "readme-page.md").read_text()
    assert (staged / "source" / "a.png").read_bytes() == b"png"
    assert "- `index.md`" in (staged / "source" / "docs.md").read_text()
    assert "x = 1" in (staged / "source" / "code.py.md").read_text()
