"""The command line: it teaches, says what is wrong in one sentence, and speaks JSON."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import click
import httpx
import pytest
import typer.main
from click.testing import Result
from typer.testing import CliRunner

from synthrep_cli.main import app
from synthrep_shared.client import SynthRep
from synthrep_shared.messages import BatchRequest, MixtureComponent, QualityGate

BATCH = {
    "id": "b1", "dataset": "birds", "state": "running", "images_committed": 20,
    "prompts": {"accepted": 5, "queued": 1, "running": 1, "committed": 2, "failed": 1,
                "cancelled": 0},
    "images_per_s": 3.5, "eta_s": 12.0, "created_at": "2026-01-01T00:00:00Z",
}  # fmt: skip
RUN = {
    "id": "r1", "state": "queued", "request": {"dataset": "birds"}, "step": 0, "max_steps": 9,
    "images_seen": 0, "loss": None, "generated_per_trained": None, "images_per_s": None,
    "created_at": "2026-01-01T00:00:00Z", "error": None,
}  # fmt: skip
FAILURE = {"index": 3, "prompt": "a cat", "reason": "blank image", "attempts": 4}
SCORE = {"value": 0.5, "ci95": [0.4, 0.6]}
PROBE = {
    "id": "p1", "state": "completed", "request": {}, "dataset": "digits", "protocol": "linear",
    "metric": "accuracy", "value": 0.9, "ci95": [0.85, 0.95], "n_test": 100, "chosen": 1.0,
    "baselines": {"random_init": SCORE, "pixels": SCORE, "majority": {"value": 0.1}},
    "created_at": datetime(2026, 1, 1, tzinfo=UTC).isoformat(), "error": None,
}  # fmt: skip
DATASET = {"name": "birds", "shards": 3, "groups": 9, "images": 90, "bytes": 1_500_000,
           "last_seq": 3}  # fmt: skip

SPEAKING = ("main", "batch_commands", "dataset_commands", "run_commands")
"""Modules that have a client."""


def page(*items: Any) -> dict[str, Any]:
    return {"items": list(items), "next_cursor": None}


class Services:
    """Answers what the commands ask for, and keeps what they sent."""

    def __init__(self) -> None:
        self.answers: dict[str, Any] = {
            "POST /v1/batches": None,
            "GET /v1/batches": page(BATCH),
            "GET /v1/batches/b1": BATCH,
            "POST /v1/batches/b1/pause": BATCH | {"state": "paused"},
            "POST /v1/batches/b1/resume": BATCH,
            "POST /v1/batches/b1/cancel": BATCH | {"state": "cancelled"},
            "GET /v1/batches/b1/failures": page(FAILURE),
            "GET /v1/datasets": page(DATASET),
            "GET /v1/datasets/birds": DATASET,
            "POST /v1/runs": RUN,
            "GET /v1/runs": page(RUN),
            "GET /v1/runs/r1": RUN,
            "POST /v1/runs/r1/stop": RUN | {"state": "running"},
            "POST /v1/runs/r1/resume": RUN,
            "POST /v1/probes": PROBE | {"state": "running", "value": None, "ci95": None},
            "GET /v1/probes/p1": PROBE,
        }
        self.sent: list[Any] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content or b"null")
        self.sent.append(body)
        answer = self.answers.get(f"{request.method} {request.url.path}")
        if request.method == "POST" and request.url.path == "/v1/batches":
            answer = {"id": f"b{len(self.sent)}", "dataset": body["dataset"],
                      "prompts_accepted": len(body["prompts"]), "links": {}}  # fmt: skip
        if answer is None:
            problem = {"title": "Not Found", "status": 404, "detail": "there is no such batch"}
            return httpx.Response(404, json=problem)
        return httpx.Response(200, json=answer)


@pytest.fixture
def services(monkeypatch: pytest.MonkeyPatch) -> Services:
    """Stands for both services in every command."""
    stub = Services()
    client = partial(SynthRep, transport=httpx.MockTransport(stub))
    for module in SPEAKING:
        monkeypatch.setattr(f"synthrep_cli.{module}.SynthRep", client)
    monkeypatch.setattr("synthrep_cli.main.time.sleep", lambda _: None)
    return stub


def run(*arguments: str, **options: Any) -> Result:
    return CliRunner().invoke(app, list(arguments), **options)


def commands(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, command in group.commands.items():
        yield (*path, name)
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))


COMMANDS = list(commands(typer.main.get_command(app)))
PRINTING = [
    ("status",),
    ("status", "b1"),
    ("train", "--dataset", "birds", "--max-steps", "9"),
    ("probe", "r1", "--dataset", "digits"),
    ("batch", "pause", "b1"),
    ("batch", "resume", "b1"),
    ("batch", "cancel", "b1"),
    ("batch", "failures", "b1"),
    ("run", "ls"),
    ("run", "show", "r1"),
    ("run", "stop", "r1"),
    ("run", "resume", "r1"),
    ("dataset", "ls"),
    ("models", "ls"),  # the last: it asks no service
]


def find(path: tuple[str, ...]) -> click.Command:
    found = typer.main.get_command(app)
    for name in path:
        found = found.commands[name]
    return found


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_help_of_every_command_teaches_every_parameter(path):
    result = run(*path, "--help")
    assert result.exit_code == 0
    command = find(path)
    assert command.help
    assert command.help.splitlines()[0].endswith(".")
    assert command.help.split()[0] in result.output
    for parameter in command.params:
        assert parameter.help, f"{' '.join(path)}: {parameter.name} is not explained"


@pytest.mark.parametrize("path", [(), ("batch",), ("dataset",), ("models",), ("run",)], ids=str)
def test_a_group_without_a_command_shows_its_help(path):
    assert run(*path).output.strip().startswith("Usage")


def test_the_version_is_that_of_the_distribution():
    result = run("--version")
    assert result.exit_code == 0
    assert result.output == f"synthrep {metadata.version('synthrep')}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ("sing",),
        ("status", "--loudly"),
        ("status", "b1", "b2"),
        ("submit", "captions.txt"),
        ("submit", "captions.txt", "--dataset", "birds", "--images-per-prompt", "65"),
        ("submit", "captions.txt", "--dataset", "birds", "--seed", "-1"),
        ("submit", "-", "--dataset", "birds", "--quality-gate", "nsfw=1"),
        ("submit", "-", "--dataset", "birds", "--mixture", "on", "--mixture", "weight=0"),
        ("train",),
        ("train", "--dataset", "birds"),
        ("train", "--dataset", "Birds!", "--max-steps", "9"),
        ("train", "--dataset", "birds", "--config", "absent.json"),
        ("probe", "r1", "--dataset", "digits", "--protocol", "guess"),
        ("dataset", "sing"),
        ("demo", "--captions", "0"),
    ],
    ids=" ".join,
)
def test_wrong_usage_ends_with_status_2_and_says_why(services, arguments):
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.output
    assert services.sent == []


@pytest.mark.parametrize(("text", "reason"), [("{", "JSON"), ("[1]", "object")])
def test_a_config_that_is_no_json_object_is_wrong_usage(services, tmp_path, text, reason):
    (tmp_path / "run.json").write_text(text)
    result = run("train", "--dataset", "birds", "--config", str(tmp_path / "run.json"))
    assert result.exit_code == 2
    assert reason in result.stderr


def test_the_fields_of_a_config_are_sent(services, tmp_path):
    (tmp_path / "run.json").write_text('{"max_images": 512, "lr": 0.01, "dataset": "other"}')
    assert run("train", "--dataset", "birds", "--config", str(tmp_path / "run.json")).exit_code == 0
    assert services.sent[0] == {"dataset": "birds", "max_images": 512, "lr": 0.01}


def test_a_run_without_a_data_set_is_told_to_name_one(services):
    assert "--dataset" in run("train", "--max-steps", "9").stderr


@pytest.mark.parametrize(
    ("dataset", "options", "begins"),
    [
        ("birds", (), "when 64 captions have images, now 9 have"),
        ("birds", ("--captions-per-batch", "10"), "when 10 captions have images, now 9 have"),
        ("empty", (), "when 64 captions have images, now 0 have"),
        ("birds", ("--captions-per-batch", "9"), None),
    ],
)
def test_a_run_says_what_its_first_step_waits_for(services, dataset, options, begins):
    result = run("train", "--dataset", dataset, "--max-steps", "9", *options)
    assert result.exit_code == 0
    assert ("it begins" in result.stderr) == bool(begins)
    assert (begins or "") in result.stderr
    assert result.stdout == "r1  queued; follow it: synthrep watch\n"


def test_captions_a_step_are_sent(services):
    run("train", "--dataset", "birds", "--max-steps", "9", "--captions-per-batch", "9")
    assert services.sent[0] == {"dataset": "birds", "max_steps": 9, "captions_per_batch": 9}


def test_a_preset_is_sent_with_what_a_config_changes(services, tmp_path):
    (tmp_path / "mine.toml").write_text("[request]\nmax_images = 512\nlr = 0.01\n")
    options = ("--preset", "cc12m_vitb16_35ep", "--config", str(tmp_path / "mine.toml"))
    assert run("train", "--dataset", "birds", *options).exit_code == 0
    sent = services.sent[0]
    assert (sent["max_images"], sent["lr"], sent["captions_per_batch"]) == (512, 0.01, 1376)
    assert "max_steps" not in sent


@pytest.mark.parametrize("options", [("--preset", "nope"), ("--config", "mine.toml")])
def test_a_preset_that_is_none_is_wrong_usage(services, tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.toml").write_text("lr = 0.1")
    result = run("train", "--dataset", "birds", *options)
    assert result.exit_code == 2
    assert options[1] in result.stderr


def test_a_wrong_field_of_a_config_is_named(services, tmp_path):
    (tmp_path / "run.json").write_text('{"max_steps": 5, "learning_rate": 0.01}')
    result = run("train", "--dataset", "birds", "--config", str(tmp_path / "run.json"))
    assert result.exit_code == 2
    assert "learning_rate" in result.stderr


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> str:
    """An address where nothing listens, of both services."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{probe.getsockname()[1]}"
    monkeypatch.setenv("SYNTHREP_GENERATOR_URL", address)
    monkeypatch.setenv("SYNTHREP_TRAINER_URL", address)
    for module in SPEAKING:
        client = partial(SynthRep, sleep=lambda _: None)
        monkeypatch.setattr(f"synthrep_cli.{module}.SynthRep", client)
    return address


@pytest.mark.parametrize("arguments", [*PRINTING[:-1], ("watch",)], ids=" ".join)
def test_a_service_that_does_not_answer_is_status_1_and_one_sentence(nobody, arguments):
    result = run(*arguments)
    assert result.exit_code == 1
    assert result.stdout.strip() == ""
    assert result.stderr.count("\n") == 1
    assert nobody in result.stderr
    assert "is the service running? `synthrep up` starts it" in result.stderr
    assert "SYNTHREP_GENERATOR_URL" in result.stderr


def test_a_refusal_is_status_1_and_one_sentence(services):
    result = run("status", "b9")
    assert result.exit_code == 1
    assert result.stderr == "synthrep: 404 Not Found: there is no such batch\n"
    assert result.stdout == ""


@pytest.mark.parametrize("arguments", PRINTING, ids=" ".join)
def test_json_is_for_programs_and_a_table_for_people(services, arguments):
    for_programs = run(*arguments, "--json")
    assert for_programs.exit_code == 0
    assert json.loads(for_programs.stdout)
    for_people = run(*arguments)
    assert for_people.exit_code == 0
    assert for_people.stdout
    with pytest.raises(json.JSONDecodeError):
        json.loads(for_people.stdout)


def test_every_command_that_prints_a_result_takes_json():
    groups = {("batch",), ("dataset",), ("models",), ("probe-sets",), ("run",)}
    silent = groups | {("demo",), ("up",), ("watch",)}
    for path in COMMANDS:
        options = {option for parameter in find(path).params for option in parameter.opts}
        assert ("--json" in options) == (path not in silent), path


def write_captions(folder: Path, count: int) -> str:
    (folder / "captions.txt").write_text("".join(f"caption {i}\n" for i in range(count)))
    return str(folder / "captions.txt")


def test_a_long_file_is_submitted_in_requests_of_a_thousand(services, tmp_path):
    file = write_captions(tmp_path, 2003)
    result = run("submit", file, "--dataset", "birds", "--seed", "4", "--json")
    assert result.exit_code == 0
    assert [b["prompts_accepted"] for b in json.loads(result.stdout)] == [1000, 1000, 3]
    assert [p for body in services.sent for p in body["prompts"]] == [
        f"caption {i}" for i in range(2003)
    ]
    settings = {k: v for k, v in services.sent[0].items() if k not in ("prompts", "dataset")}
    assert settings == {"model": "tiny", "images_per_prompt": 10, "seed": 4}


def test_submitting_tells_how_to_follow(services, tmp_path):
    result = run("submit", write_captions(tmp_path, 2), "--dataset", "birds")
    assert result.stdout.splitlines() == [
        "b1  2 captions accepted",
        "follow them: synthrep watch, or synthrep status b1",
    ]


def test_a_gate_and_a_mixture_are_submitted(services, tmp_path):
    result = run(
        "submit", write_captions(tmp_path, 2), "--dataset", "birds", "--quality-gate", "on",
        "--mixture", "guidance_scale=1.5,weight=2", "--mixture", "model=other",
    )  # fmt: skip
    assert result.exit_code == 0
    body = BatchRequest.model_validate_json(json.dumps(services.sent[-1]))
    assert body.quality_gate == QualityGate()
    assert body.mixture == (
        MixtureComponent(guidance_scale=1.5, weight=2.0),
        MixtureComponent(model="other"),
    )


def test_standard_input_is_submitted(services):
    assert run("submit", "-", "--dataset", "birds", input="a robin\na wren\n").exit_code == 0
    assert services.sent[0]["prompts"] == ["a robin", "a wren"]


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_a_file_without_captions_is_status_1(services, tmp_path, content):
    (tmp_path / "captions.txt").write_text(content)
    result = run("submit", str(tmp_path / "captions.txt"), "--dataset", "birds")
    assert result.exit_code == 1
    assert "holds no captions" in result.stderr
    assert services.sent == []


@pytest.mark.parametrize(
    ("arguments", "exit_code"),
    [(("train", "--dataset", "Birds!", "--max-steps", "9"), 2), (("dataset", "verify", "B!"), 1)],
)
def test_a_name_that_is_none_is_told_the_rule(services, arguments, exit_code):
    result = run(*arguments)
    assert result.exit_code == exit_code
    assert "has 1-64 of a-z, 0-9, _ and -" in result.stderr
    assert "^[" not in result.stderr


def test_a_refusal_names_a_command_in_place_of_a_route(services):
    services.answers["GET /v1/probes/p1"] = PROBE | {
        "state": "failed", "error": "no such set, see GET /v1/probe-datasets",
    }  # fmt: skip
    result = run("probe", "r1", "--dataset", "digits")
    assert result.stderr.endswith("see `synthrep probe-sets ls`\n")


def test_a_failed_probe_is_status_1(services):
    services.answers["GET /v1/probes/p1"] = PROBE | {"state": "failed", "error": "no such file"}
    result = run("probe", "r1", "--dataset", "digits")
    assert result.exit_code == 1
    assert result.stderr == "synthrep: the probe failed: no such file\n"


@pytest.mark.parametrize(
    ("what", "key"), [("r1", "run_id"), ("runs/r1/checkpoints/step-000000001", "checkpoint")]
)
def test_a_run_or_a_checkpoint_is_probed(services, what, key):
    run("probe", what, "--dataset", "digits", "--protocol", "knn")
    assert services.sent[0] == {key: what, "dataset": "digits", "protocol": "knn"}


def interrupt(_: float) -> None:
    raise KeyboardInterrupt


def test_runs_are_listed_shown_stopped_and_resumed(services):
    listed = run("run", "ls").stdout
    assert re.search(r"r1 .* birds .* queued .* 0/9", listed)
    shown = run("run", "show", "r1").stdout.splitlines()
    assert shown == ["r1  queued: step 0 of 9 on birds, loss –", "  dataset = birds"]
    assert "paused once its checkpoint is written" in run("run", "stop", "r1").stdout
    assert run("run", "resume", "r1").stdout.startswith("r1  queued")


def test_what_a_run_waits_for_is_said(services, monkeypatch):
    waiting = RUN | {"state": "running", "waiting_for": "captions: 16 of 64 are there"}
    services.answers |= {"GET /v1/runs": page(waiting, RUN), "GET /v1/runs/r1": waiting}
    said = "waits for captions: 16 of 64 are there"
    assert run("run", "show", "r1").stdout.splitlines()[1] == said
    assert run("run", "ls").stdout.splitlines()[-1] == f"r1 {said}"
    monkeypatch.setattr("synthrep_cli.main.time.sleep", interrupt)
    assert run("watch").stdout.splitlines()[-1] == f"r1 {said}"


def test_a_run_that_failed_says_why(services):
    services.answers["GET /v1/runs/r1"] = RUN | {"state": "failed", "error": "no images"}
    assert "error: no images\n" in run("run", "show", "r1").stdout


def test_watch_shows_batches_and_runs_until_interrupted(services, monkeypatch):
    services.answers["GET /v1/runs"] = page(RUN | {"step": 3, "loss": 2.5, "state": "running"})
    monkeypatch.setattr("synthrep_cli.main.time.sleep", interrupt)
    result = run("watch")
    assert result.exit_code == 130
    assert result.stdout.endswith("╯\n") or result.stdout.endswith("┘\n")
    assert re.search(r"b1 .* running .* 3/5 captions .* 3.5 images/s", result.stdout)
    assert re.search(r"r1 .* running .* step 3/9 .* 2.5", result.stdout)


@pytest.mark.parametrize(("verb", "state"), [("pause", "paused"), ("cancel", "cancelled")])
def test_a_batch_is_steered_and_says_where_it_is(services, verb, state):
    result = run("batch", verb, "b1")
    assert result.exit_code == 0
    assert result.output.startswith(f"b1  {state}: 2 of 5 captions committed, 1 failed")


def test_failures_come_with_their_reasons(services):
    assert "blank image" in run("batch", "failures", "b1").output
    assert run("batch", "cancel", "b2").exit_code == 1
