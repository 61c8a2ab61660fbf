"""`python -m docs.builder [FOLDER]`: the documentation as a site that needs no network.

    docs/**, files that they link to ─┐
    pages made of the code           ─┴─▶ staged pages ─▶ Zensical, strict ─▶ FOLDER (site/)

The generator of the site knows neither our code nor files beside `docs/`, so both are staged as
pages first. A link to a file that is not there, or to a heading that is not there, ends the build.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from docs.builder.notebook import notebook_page
from docs.builder.reference import write_reference
from docs.builder.stage import BrokenLinkError, stage_pages

ROOT = Path(__file__).parents[2]


def build(output: Path, *, root: Path = ROOT) -> None:
    """Make the site of the documentation below `root` in a folder, which is replaced.

    Raises BrokenLinkError, and CalledProcessError where Zensical finds a fault.
    """
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        write_reference(work / "docs" / "reference", root=root)
        (work / "docs" / "notebook.md").write_text(notebook_page(root / "docs" / "notebook.ipynb"))
        stage_pages(root, work / "docs")
        config = work / "mkdocs.yml"
        config.write_text(yaml.safe_dump(_config(root), sort_keys=False))
        command = [sys.executable, "-m", "zensical", "build", "--strict", "-f", str(config)]
        subprocess.run(command, check=True, cwd=work)
        shutil.rmtree(output, ignore_errors=True)
        shutil.copytree(work / "site", output)


def _config(root: Path) -> dict[str, Any]:
    """mkdocs.yml, with the folders of the code as absolute paths, and folders of pages listed."""
    config: dict[str, Any] = yaml.safe_load((root / "mkdocs.yml").read_text())
    docs = root / "docs"
    for entry in config["nav"]:
        for title, place in entry.items():
            if isinstance(place, str) and (docs / place).is_dir():
                pages = sorted((docs / place).glob("*.md"))
                entry[title] = [str(page.relative_to(docs)) for page in pages]
    for plugin in config["plugins"]:
        if isinstance(plugin, dict) and "mkdocstrings" in plugin:
            python = plugin["mkdocstrings"]["handlers"]["python"]
            python["paths"] = [str(root / path) for path in python["paths"]]
    return config


def main() -> int:
    """Build; status 1 with a sentence where something is wrong."""
    parser = argparse.ArgumentParser(prog="docs.builder", description="Make the documentation.")
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "site")
    try:
        build(parser.parse_args().folder)
    except (BrokenLinkError, subprocess.CalledProcessError) as error:
        sys.stderr.write(f"docs: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
