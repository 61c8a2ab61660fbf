"""Pages and what they link to, gathered under one folder; links are checked and follow.

A page may link to anything in the repository. Markdown becomes a page, an image is copied, any
other text becomes a page that shows it and a folder one that lists it, all below `source/`, so that
the site is whole in itself.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

_DOCS = "docs"
_CODE = "builder"  # the only folder of docs/ that is no page
_SOURCE = "source"
_LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")
_EXTERNAL = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)
_FENCE = re.compile(r"\s*(```+|~~~+)")
_ASSETS = (".svg", ".png", ".jpg", ".ipynb")
_LANGUAGES = {".py": "python", ".yml": "yaml", ".yaml": "yaml", ".toml": "toml", ".json": "json"}


class BrokenLinkError(Exception):
    """A page links to what is not there."""


def stage_pages(root: Path, target: Path) -> None:
    """Copy `root/docs` and all that its pages link to into `target`.

    `target` may hold generated pages, which may be linked to as if they lay in `docs`. Raises
    BrokenLinkError with every link that leads nowhere.
    """
    stage = _Stage(root, target)
    for path in sorted((root / _DOCS).rglob("*")):
        relative = path.relative_to(root / _DOCS)
        if path.is_file() and relative.parts[0] != _CODE and "__pycache__" not in relative.parts:
            stage.add(path)
    if stage.broken:
        raise BrokenLinkError("links that lead nowhere: " + "; ".join(stage.broken))


class _Stage:
    def __init__(self, root: Path, target: Path) -> None:
        self._root, self._target = root.resolve(), target
        self._added: set[Path] = set()
        self.broken: list[str] = []

    def add(self, path: Path) -> Path:
        """Stage a file or folder unless that is done; returns its place in the target."""
        path = path.resolve()
        place = self._place(path)
        if path in self._added:
            return place
        self._added.add(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            names = sorted(p.name for p in path.iterdir() if p.name != "__pycache__")
            listing = "".join(f"- `{name}`\n" for name in names)
            place.write_text(f"# {path.relative_to(self._root)}\n\n{listing}")
        elif path.suffix in _ASSETS or (path.suffix != ".md" and self._is_docs(path)):
            shutil.copyfile(path, place)
        elif path.suffix == ".md":
            place.write_text(self._rewritten(path.read_text(), path, place))
        else:
            language = _LANGUAGES.get(path.suffix, "text")
            name = path.relative_to(self._root)
            place.write_text(f"# {name}\n\n````{language}\n{path.read_text()}\n````\n")
        return place

    def _is_docs(self, path: Path) -> bool:
        return path.is_relative_to(self._root / _DOCS)

    def _place(self, path: Path) -> Path:
        if self._is_docs(path) and not path.is_dir():
            return self._target / path.relative_to(self._root / _DOCS)
        place = self._target / _SOURCE / path.relative_to(self._root)
        if place.suffix in (*_ASSETS, ".md"):
            # A README would be the index of its folder, and its links would move with it.
            return place.with_stem("readme-page") if place.stem == "README" else place
        return place.with_name(f"{place.name.lstrip('.')}.md")

    def _rewritten(self, text: str, path: Path, place: Path) -> str:
        """The text with links to where their targets are staged; code blocks stay."""
        lines, fence = [], ""
        for line in text.splitlines(keepends=True):
            mark = _FENCE.match(line)
            if mark and not fence:
                fence = mark[1]
            elif mark and mark[1].startswith(fence):
                fence = ""
            elif not fence:
                line = _LINK.sub(lambda link: self._link(link, path, place), line)
            lines.append(line)
        return "".join(lines)

    def _link(self, link: re.Match[str], path: Path, place: Path) -> str:
        start, url, anchor, end = link[1], link[2], link[3] or "", link[4]
        if _EXTERNAL.match(url):
            return link[0]
        wanted = Path(os.path.normpath(path.parent / url))
        if wanted.exists() and wanted.is_relative_to(self._root):
            found = self.add(wanted)
        elif self._is_docs(wanted) and self._place(wanted).is_file():
            found = self._place(wanted)  # generated
        else:
            self.broken.append(f"{path.relative_to(self._root)} -> {url}")
            return link[0]
        return f"{start}{os.path.relpath(found, place.parent)}{anchor}{end}"
