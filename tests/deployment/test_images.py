"""The images: what is in them, that their entry points import, that recipes and YAML are clean."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from tests.deployment.render import REPOSITORY, compose, tool

DOCKERFILES = ("services/generator/Dockerfile", "services/trainer/Dockerfile")
TARGETS = {DOCKERFILES[0]: {"api", "worker"}, DOCKERFILES[1]: {"api", "train"}}
LIGHT = ("synthrep_generator.api", "synthrep_generator.reconciler", "synthrep_trainer.api",
         "synthrep_trainer.launcher")  # fmt: skip
HEAVY = {"torch", "diffusers", "transformers", "timm", "torchvision"}


def wanted(*arguments: str) -> set[str]:
    """What an image gets, with all that this draws in on this platform."""
    script = [sys.executable, "deploy/requirements.py", *arguments]
    lines = subprocess.run(script, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    found: set[str] = set()
    waiting = [(Requirement(line), frozenset[str]()) for line in lines.stdout.split("\n") if line]
    while waiting:
        requirement, extras = waiting.pop()
        marker = requirement.marker
        if marker and not any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            continue
        name = requirement.name.lower().replace("_", "-")
        key = f"{name}[{','.join(sorted(requirement.extras))}]"
        if key in found:
            continue
        found |= {key, name}
        try:
            needs = metadata.requires(name) or ()
        except metadata.PackageNotFoundError:
            continue
        waiting += [(Requirement(line), frozenset(requirement.extras)) for line in needs]
    return found


@pytest.mark.parametrize("file", DOCKERFILES)
def test_hadolint_has_nothing_to_say(file):
    result = tool("hadolint", "--no-color", file)
    assert result.returncode == 0, result.stdout


def test_yaml_is_clean():
    paths = ("docker-compose.yml", "deploy", "k8s", ".github")
    rules = "{extends: default, rules: {line-length: disable, document-start: disable, " \
            "braces: disable, brackets: disable, truthy: {check-keys: false}}}"  # fmt: skip
    result = tool("yamllint", "--strict", "-d", rules, *paths)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("arguments", [["shared[s3,trace]", "services/generator"],
                                       ["shared[s3,trace]", "services/trainer"]])  # fmt: skip
def test_an_api_image_has_no_torch(arguments):
    assert wanted(*arguments) & HEAVY == set()
    assert "fastapi" in wanted(*arguments)


def test_a_worker_image_has_torch():
    assert {"torch", "diffusers"} <= wanted("services/generator[worker]")


@pytest.mark.parametrize("file", DOCKERFILES)
def test_images_have_targets_labels_and_a_user(file):
    text = (REPOSITORY / file).read_text()
    assert set(re.findall(r"^FROM runtime AS (\S+)$", text, re.M)) == TARGETS[file]
    for label in ("title", "description", "licenses", "version", "revision"):
        assert f"org.opencontainers.image.{label}=" in text
    assert re.search(r"^USER 10001:10001$", text, re.M)
    assert "-c constraints.txt" in text
    assert not re.search(r"^# *syntax", text)
    assert ":latest" not in text


def modules() -> set[str]:
    """Modules that recipes, compose file and probes start."""
    commands = [
        json.loads(found)
        for file in DOCKERFILES
        for found in re.findall(r"^CMD (.*)$", (REPOSITORY / file).read_text(), re.M)
    ]
    commands += [s["command"] for s in compose()["services"].values() if s.get("command")]
    return {c[2] for c in commands if c[:2] == ["python", "-m"]}  # fmt: skip


def test_entry_points_exist():
    assert modules() == {*LIGHT, "synthrep_generator.worker"}
    for module in modules() | {"synthrep_trainer.train"}:
        assert importlib.util.find_spec(module), module


@pytest.mark.parametrize("module", LIGHT)
def test_what_an_api_image_starts_imports_without_torch(module):
    program = f"import sys; sys.modules.update(dict.fromkeys({sorted(HEAVY)})); import {module}"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("file", DOCKERFILES)
def test_what_recipes_copy_is_in_the_build_context(file):
    kept = [line[1:] for line in (REPOSITORY / ".dockerignore").read_text().splitlines()
            if line.startswith("!")]  # fmt: skip
    for sources in re.findall(r"^COPY (?!--from)(.*)$", (REPOSITORY / file).read_text(), re.M):
        for source in sources.split()[:-1]:
            assert (REPOSITORY / source).exists()
            assert any(Path(source).is_relative_to(k) for k in kept), source


def test_continuous_integration_runs_what_people_run():
    path = REPOSITORY / ".github/workflows/ci.yml"
    result = tool("check-jsonschema", "--builtin-schema", "vendor.github-workflows", str(path))
    assert result.returncode == 0, result.stdout
    workflow = yaml.safe_load(path.read_text())
    targets = set(re.findall(r"^([a-z0-9-]+):", (REPOSITORY / "Makefile").read_text(), re.M))
    for job in workflow["jobs"].values():
        assert "timeout-minutes" in job
        for command in filter(None, (step.get("run") for step in job["steps"])):
            verb = re.search(r"(?:^|\s)make ([a-z0-9-]+)$", command)
            assert command == "bash .ci/run" or (verb and verb[1] in targets), command


@pytest.mark.parametrize(
    ("name", "schema"),
    [("bug", "issue-forms"), ("idea", "issue-forms"), ("config", "issue-config")],
)
def test_the_issue_templates_are_what_the_forge_knows(name, schema):
    path = REPOSITORY / f".github/ISSUE_TEMPLATE/{name}.yml"
    result = tool("check-jsonschema", "--builtin-schema", f"vendor.github-{schema}", str(path))
    assert result.returncode == 0, result.stdout + result.stderr
