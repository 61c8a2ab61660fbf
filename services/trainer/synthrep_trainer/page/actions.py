"""What people do on the page: look at a group, take it back, hand in captions, start and stop.

Each does what a call below `/v1` does, and shows that call as a curl command.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import HTTPException, Path, Request, Response
from fastapi.responses import HTMLResponse
from pydantic import ValidationError

from synthrep_shared.asgi import needs
from synthrep_shared.messages import BatchRequest, GroupView, ProbeRequest, RunRequest
from synthrep_trainer import routes_probes, routes_runs
from synthrep_trainer.context import CallerDep, ContextDep, RunId
from synthrep_trainer.page import forms
from synthrep_trainer.page.answers import FormDep, ViewerDep, done, make_router
from synthrep_trainer.page.door import PREFIX
from synthrep_trainer.page.refusals import html
from synthrep_trainer.page.rendering import render
from synthrep_trainer.page.sections import Viewer, neighbours

LARGE_PATHS = {f"{PREFIX}/{name}": 4 << 20 for name in ("batches", "preview/batches")}
"""Forms with captions, and the bytes that they may have."""
_KEPT = {"cache-control": "private, max-age=31536000, immutable"}
_SIGNATURES = (
    (b"\xff\xd8\xff", "image/jpeg"), (b"\x89PNG", "image/png"), (b"RIFF", "image/webp"),
)  # fmt: skip
GroupId = Annotated[str, Path(pattern="^[0-9a-f]{1,64}$")]
router = make_router()


@router.get(PREFIX + "/groups/{gid}", openapi_extra=needs("read"))
def group(viewer: ViewerDep, gid: GroupId) -> HTMLResponse:
    """Where the images of a group come from."""
    return html(_group(viewer, viewer.ask(lambda client: client.group(gid))))


def _group(viewer: Viewer, view: GroupView) -> str:
    url = f"{viewer.generator.public_url}/v1/groups/{view.gid}/reject"
    call = forms.curl(url, has_key=bool(viewer.keys.generator))
    return render("group.html", group=view, call=call, may_submit=viewer.caller.has("submit"))


@router.get(PREFIX + "/groups/{gid}/neighbours", openapi_extra=needs("read"))
def near(viewer: ViewerDep, gid: GroupId) -> HTMLResponse:
    """What a run takes for like the images of a group."""
    return html(neighbours(viewer, gid))


@router.get(PREFIX + "/groups/{gid}/images/{index}", openapi_extra=needs("read"))
def image(viewer: ViewerDep, gid: GroupId, index: Annotated[int, Path(ge=0, le=9999)]) -> Response:
    """One image, as it is stored."""
    data = viewer.ask(lambda client: client.image_bytes(gid, index))
    for signature, kind in _SIGNATURES:
        if data.startswith(signature):
            return Response(data, media_type=kind, headers=_KEPT)
    raise HTTPException(502, "what came is no image")


@router.post(PREFIX + "/groups/{gid}/reject", openapi_extra=needs("submit"))
def reject(viewer: ViewerDep, gid: GroupId) -> HTMLResponse:
    """Takes a group back."""
    return html(_group(viewer, viewer.ask(lambda client: client.reject(gid))))


@router.post(PREFIX + "/preview/{name}", openapi_extra=needs("read"))
def preview(request: Request, viewer: ViewerDep, name: str, form: FormDep) -> HTMLResponse:
    """The curl command that does what the form would do."""
    if name not in forms.FORMS:
        raise HTTPException(404, "there is no such form")
    try:
        asked = forms.request_from_form(name, form)
    except ValidationError as error:
        return html(render("unfinished.html", sentences=forms.problems(error.errors())))
    is_generators = name == "batches"
    base = viewer.generator.public_url if is_generators else _base(request)
    key = viewer.keys.generator if is_generators else viewer.keys.trainer
    call = forms.curl(base + forms.FORMS[name][1], body=forms.body_of(asked), has_key=bool(key))
    return html(render("call.html", call=call))


def _base(request: Request) -> str:
    """The trainer's address as the browser has it."""
    return str(request.base_url).rstrip("/")


@router.post(PREFIX + "/batches", openapi_extra=needs("submit"))
def submit_batch(viewer: ViewerDep, form: FormDep) -> HTMLResponse:
    """Hands captions in at the generator."""
    asked = forms.request_from_form("batches", form)
    assert isinstance(asked, BatchRequest)
    settings = asked.model_dump(mode="json", exclude_unset=True, exclude={"dataset", "prompts"})
    made = viewer.ask(lambda client: client.submit(asked.dataset, asked.prompts, **settings))
    return done(f"{made.prompts_accepted} captions accepted as batch {made.id}.")


@router.post(PREFIX + "/runs", openapi_extra=needs("submit"))
def submit_run(context: ContextDep, caller: CallerDep, form: FormDep) -> HTMLResponse:
    """Starts a training run."""
    asked = forms.request_from_form("runs", form)
    assert isinstance(asked, RunRequest)
    body = forms.body_of(asked).encode()
    return done(f"Run {routes_runs.submit(context, caller, Response(), body).id} is queued.")


@router.post(PREFIX + "/runs/{run_id}/{verb}", openapi_extra=needs("submit"))
def control_run(request: Request, viewer: ViewerDep, run_id: RunId, verb: str) -> HTMLResponse:
    """Stops a run, or goes on with it."""
    verbs = {"stop": routes_runs.stop, "resume": routes_runs.resume}
    if verb not in verbs:
        raise HTTPException(404, "a run can be stopped or resumed")
    view = verbs[verb](viewer.context, viewer.caller, run_id)
    told = "stops when its checkpoint is written" if verb == "stop" else "goes on in its turn"
    url = f"{_base(request)}/v1/runs/{view.id}/{verb}"
    call = forms.curl(url, has_key=bool(viewer.keys.trainer))
    return done(f"Run {view.id[:15]} {told}.", call)


@router.post(PREFIX + "/probes", openapi_extra=needs("probe"))
def submit_probe(context: ContextDep, caller: CallerDep, form: FormDep) -> HTMLResponse:
    """Starts a probe."""
    asked = forms.request_from_form("probes", form)
    assert isinstance(asked, ProbeRequest)
    body = forms.body_of(asked).encode()
    return done(f"Probe {routes_probes.submit(context, caller, Response(), body).id} is queued.")
