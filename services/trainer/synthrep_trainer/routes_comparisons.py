"""The route of comparisons: reads the report that `synthrep compare` leaves beside the runs."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path

from synthrep_shared.asgi import needs, problem_answers
from synthrep_shared.messages import ComparisonView
from synthrep_trainer.context import ContextDep
from synthrep_trainer.problems import not_found

router = APIRouter(prefix="/v1/comparisons", tags=["comparisons"])
_Name = Annotated[
    str, Path(pattern=r"^[a-z0-9][a-z0-9-]{0,63}$", description="Name in the configuration")
]


@router.get(
    "/{comparison_id}",
    response_model=ComparisonView,
    summary="The table of a comparison",
    responses=problem_answers(404, 503),
    openapi_extra=needs("read"),
)
def get(context: ContextDep, comparison_id: _Name) -> ComparisonView:
    """Row by probe set: mean and interval over seeds, and what that says."""
    path = context.place.root / "comparisons" / f"{comparison_id}.json"
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise not_found("comparison") from None
    return ComparisonView.model_validate_json(text)
