"""The notebook runs from top to bottom, and its figures move the right way."""

from __future__ import annotations

import ast

import nbclient
import nbformat
import pytest

from tests.docs.conftest import DOCS, LiveStack

pytestmark = [pytest.mark.e2e, pytest.mark.redis, pytest.mark.timeout(300)]

NOTEBOOK = DOCS / "notebook.ipynb"


def test_the_notebook_runs(live_stack: LiveStack, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in live_stack.environment.items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=240, startup_timeout=180)
    client.execute()
    results = [
        output["data"]["text/plain"]
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if output["output_type"] == "execute_result"
    ]
    assert ast.literal_eval(results[1]) == ("completed", 8, 64)
    _, losses = ast.literal_eval(results[3])
    assert losses[-1] < losses[0]
    assert set(ast.literal_eval(results[4])) == {"trained", "untrained"}


def test_it_is_kept_without_results() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert all(not cell.outputs for cell in notebook.cells if cell.cell_type == "code")
