"""A notebook as a page: its text and its code, without results."""

from __future__ import annotations

import json
from pathlib import Path


def notebook_page(notebook: Path) -> str:
    """Markdown of the cells in order, with a link to the notebook itself."""
    cells = json.loads(notebook.read_text())["cells"]
    parts = [_cell(cell["cell_type"], "".join(cell["source"])) for cell in cells]
    parts.insert(
        1, f"This page is [a notebook]({notebook.name}) that a test runs from top to bottom."
    )
    return "\n\n".join(parts) + "\n"


def _cell(kind: str, source: str) -> str:
    return source if kind == "markdown" else f"```python\n{source}\n```"
