"""`.env.example` is what the settings classes say.

Names, defaults and meanings come from the classes; what the client and several services read
beside them is listed here and held to the source. To write the file anew, run this one as a script.
"""

from __future__ import annotations

import json
import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, SecretStr

from synthrep_generator.settings import GeneratorSettings, ModelConfig
from synthrep_shared.client import GENERATOR_URL, TRAINER_URL
from synthrep_shared.keys import ApiKey
from synthrep_shared.settings import ServiceSettings
from synthrep_trainer.settings import TrainerSettings

REPOSITORY = Path(__file__).parents[2]
EXAMPLE = REPOSITORY / ".env.example"
SOURCES = ("shared", "services", "cli")
SERVICES: dict[str, type[ServiceSettings]] = {
    "Generator: API, reconciler and workers.": GeneratorSettings,
    "Trainer: API, launcher, train processes and probes.": TrainerSettings,
}
OTHERS = {
    "SYNTHREP_GENERATOR_URL": (GENERATOR_URL, "Address of the generator, for the client."),
    "SYNTHREP_TRAINER_URL": (TRAINER_URL, "Address of the trainer, for the client."),
    "SYNTHREP_API_KEY": ("", "Bearer key that the client sends to both; none: no header."),
    "SYNTHREP_PROBE_DATA": (
        "",
        "Folder of labelled sets where SYNTHREP_TRAINER_PROBE_DATA is unset.",
    ),
}
COMPOSE = {
    "COMPOSE_PROFILES": ("", "Profiles that are on: gpu, s3, observe; commas between."),
    "SYNTHREP_CPU_REPLICAS": ("1", "Workers and trainers on the CPU; 0 with the profile gpu."),
    "SYNTHREP_MODEL": ("sd15", "What the profile gpu pulls, see `synthrep models ls`."),
    "HF_TOKEN": ("", "Token of the model hub, for gated models."),
    "SYNTHREP_ROOT": ("", "`s3://synthrep/data` with the profile s3; none: a volume."),
    "SYNTHREP_S3_URL": ("http://s3:8333", "Address of the object store."),
    "SYNTHREP_STORE_INTERNAL": ("true", "`false` where the object store is elsewhere."),
    "AWS_REGION": ("us-east-1", "Region of the object store."),
    "SYNTHREP_LIMIT_WORKER_CPUS": (
        "2",
        "CPUs of a worker on the CPU, at most; a whole number, which torch takes, too.",
    ),
    "SYNTHREP_LIMIT_WORKER_MEMORY": ("4G", "Memory of a worker on the CPU, at most."),
    "SYNTHREP_LIMIT_TRAINER_CPUS": (
        "2",
        "CPUs of the trainer on the CPU, at most; a whole number, which torch takes, too.",
    ),
    "SYNTHREP_LIMIT_TRAINER_MEMORY": ("6G", "Memory of the trainer on the CPU, at most."),
    "SYNTHREP_PROMETHEUS_PORT": ("9090", "Port of Prometheus on this machine."),
    "SYNTHREP_GRAFANA_PORT": ("3000", "Port of Grafana on this machine."),
}
_INTERPOLATED = r"\$\{([A-Z0-9_]+)(?::-([^}]*))?\}"
_FIELDS: dict[str, type[BaseModel]] = {"models": ModelConfig, "api_keys": ApiKey}
FOR_TESTS = {"SYNTHREP_FAILPOINT", "SYNTHREP_FAILPOINT_MARKER"}
_READ = r'environ(?:\.get\(|\[)\s*"(SYNTHREP_[A-Z_]+)"'
HEADER = """\
Every setting with its default. Copy this file to `.env` and uncomment what is to differ;
`docker compose` reads it from there, a shell by `set -a; . ./.env; set +a`.
NAME_FILE may name a file that holds the value of NAME of a service, for secrets.
Lists and mappings are JSON. An unknown name with a service's prefix stops the service.
"""


def render() -> str:
    """The whole file."""
    lines = [*_comment(HEADER)]
    for title, settings in SERVICES.items():
        lines += ["", *_comment(title)]
        for name, field in settings.model_fields.items():
            lines += ["", *_comment(field.description or "")]
            if name in _FIELDS:
                lines += _fields_of(_FIELDS[name])
            value = _written(field.get_default(call_default_factory=True))
            lines.append(f"#{settings.model_config['env_prefix']}{name.upper()}={value}")
    lines += ["", "# Client, command and what several services read."]
    for name, (default, meaning) in OTHERS.items():
        lines += ["", *_comment(meaning), f"#{name}={default}"]
    lines += ["", "# What docker-compose.yml itself reads; the ports of the APIs above, too."]
    for name, (default, meaning) in COMPOSE.items():
        lines += ["", *_comment(meaning), f"#{name}={default}"]
    return "\n".join(lines) + "\n"


def _comment(text: str) -> Iterator[str]:
    for line in text.splitlines():
        indent = "  " if line.startswith("- ") else ""
        for part in textwrap.wrap(line, 98, subsequent_indent=indent):
            yield f"# {part}"


def _fields_of(model: type[BaseModel]) -> Iterator[str]:
    for name, field in model.model_fields.items():
        value = None if field.is_required() else field.get_default(call_default_factory=True)
        default = "" if field.is_required() else f" Default {_written(value) or 'none'}."
        yield from _comment(f"- {name}: {' '.join((field.description or '').split())}{default}")


def _written(value: Any) -> str:
    """A default as an environment variable has it."""
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    if isinstance(value, dict):
        if not value:
            return ""
        models = {
            alias: model.model_dump(mode="json", exclude_defaults=True)
            for alias, model in value.items()
        }
        for fields in models.values():
            fields["path"] = _relative(Path(fields["path"]))
        return f"'{json.dumps(models)}'"
    if isinstance(value, tuple):
        return json.dumps(list(value))
    if isinstance(value, Path):
        return _relative(value)
    return "" if value is None else str(value)


def _relative(path: Path) -> str:
    return str(path.relative_to(REPOSITORY) if path.is_absolute() else path)


def documented() -> dict[str, str]:
    """The commented-out variables of the file, by name."""
    found = {}
    for line in EXAMPLE.read_text().splitlines():
        if match := re.fullmatch(r"#([A-Z][A-Z0-9_]*)=(.*)", line):
            assert match[1] not in found, f"{match[1]} stands there twice"
            found[match[1]] = "".join(shlex.split(match[2]))
    return found


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SYNTHREP_PROBE_DATA", *documented()):
        monkeypatch.delenv(name, raising=False)


def test_no_setting_is_missing_and_none_is_stale():
    names = {
        f"{settings.model_config['env_prefix']}{name.upper()}"
        for settings in SERVICES.values()
        for name in settings.model_fields
    }
    assert documented().keys() - names - OTHERS.keys() - COMPOSE.keys() == set(), "stale"
    assert (names | OTHERS.keys()) - documented().keys() == set(), "missing"


def test_every_other_variable_that_the_source_reads_is_documented():
    read = {
        name
        for folder in SOURCES
        for path in (REPOSITORY / folder).rglob("*.py")
        for name in re.findall(_READ, path.read_text())
    }
    assert read - FOR_TESTS - documented().keys() == set(), "missing"
    assert OTHERS.keys() - read == set(), "stale"


def test_what_the_compose_file_reads_is_documented_with_its_default():
    text = (REPOSITORY / "docker-compose.yml").read_text()
    read = dict(re.findall(_INTERPOLATED, text))
    assert read.keys() | {"COMPOSE_PROFILES"} == COMPOSE.keys() | {
        "SYNTHREP_GENERATOR_PORT", "SYNTHREP_TRAINER_PORT",
    }  # fmt: skip
    for name, (default, _) in COMPOSE.items():
        if default:
            assert read[name] == default, name


@pytest.mark.parametrize("settings", SERVICES.values())
def test_a_service_takes_the_whole_file_uncommented_and_finds_its_defaults(monkeypatch, settings):
    default = settings()
    for name, value in documented().items():
        if value:
            monkeypatch.setenv(name, value)
    found = settings()
    for name in settings.model_fields:
        assert _written(getattr(found, name)) == _written(getattr(default, name)), name


def test_the_file_is_what_the_settings_classes_say():
    assert EXAMPLE.read_text() == render(), f"run: python {Path(__file__).relative_to(REPOSITORY)}"


def test_no_path_of_this_machine_is_in_the_file():
    assert str(REPOSITORY) not in EXAMPLE.read_text()
    assert [v for v in documented().values() if v.startswith("/")] == []
    (tiny,) = json.loads(documented()["SYNTHREP_GENERATOR_MODELS"]).values()
    assert tiny["path"] == "models/tiny"


if __name__ == "__main__":
    EXAMPLE.write_text(render())
