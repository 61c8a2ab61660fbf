"""The route of comparisons: reads the report that `synthrep compare` leaves beside the runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from fastapi import APIRouter
from fastapi import Path as InPath

from synthrep_shared.asgi import needs, problem_answers
from synthrep_shared.messages import ComparisonView
from synthrep_trainer.context import Context, ContextDep
from synthrep_trainer.problems import not_found

router = APIRouter(prefix="/v1/comparisons", tags=["comparisons"])
NAME_PATTERN = r"^[a-z0-9][a-z0-9-]{0,63}$"
SUFFIX = ".json"
_Name = Annotated[str, InPath(pattern=NAME_PATTERN, description="Name in the configuration")]


def reports(context: Context) -> Path:
    """The folder of the reports; each is the name of its comparison with `SUFFIX`."""
    return context.place.root / "comparisons"


@router.get(
    "/{comparison_id}",
    response_model=ComparisonView,
    summary="The table of a comparison",
    responses=problem_answers(404, 503),
    openapi_extra=needs("read"),
)
def get(context: ContextDep, comparison_id: _Name) -> ComparisonView:
    """Row by probe set: mean and interval over seeds, and what that says."""
    try:
        text = (reports(context) / f"{comparison_id}{SUFFIX}").read_bytes()
    except FileNotFoundError:
        raise not_found("comparison") from None
    return ComparisonView.model_validate_json(text)
