"""What the compose file and the overlays come to, as the tools themselves render them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).parents[2]
KUSTOMIZATIONS = ("overlays/dev-cpu", "overlays/gpu", "overlays/prod",
                  "training/job", "training/jobset", "training/queued-s3")  # fmt: skip
PROFILES = ("gpu", "s3", "observe")
Document = dict[str, Any]


def tool(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a tool of this environment at the repository's root; its status is the caller's."""
    path = Path(sys.executable).with_name(name)
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("SYNTHREP_")}
    return subprocess.run([path, *arguments], cwd=REPOSITORY, capture_output=True, text=True,
                          timeout=120, env=inherited | environment)  # fmt: skip


def kustomize(name: str) -> list[Document]:
    """The documents of `k8s/<name>`; a copy of one's own."""
    return [json.loads(text) for text in _kustomize(name)]


@cache
def _kustomize(name: str) -> list[str]:
    result = tool("kubectl", "kustomize", f"k8s/{name}")
    assert result.returncode == 0, result.stderr
    return [json.dumps(document) for document in yaml.load_all(result.stdout, yaml.CSafeLoader)]


def compose(profiles: Sequence[str] = (), **environment: str) -> Document:
    """The compose file with these profiles; a copy of one's own."""
    document: Document = json.loads(_compose(tuple(profiles), tuple(environment.items())))
    return document


@cache
def _compose(profiles: tuple[str, ...], environment: tuple[tuple[str, str], ...]) -> str:
    arguments = [part for profile in profiles for part in ("--profile", profile)]
    result = tool("docker-compose", *arguments, "config", "--format", "json", **dict(environment))
    assert result.returncode == 0, result.stderr
    return result.stdout


def of_kind(documents: Sequence[Document], *kinds: str) -> Iterator[Document]:
    """The documents of these kinds."""
    return (document for document in documents if document["kind"] in kinds)


def title(document: Document) -> str:
    """How a finding names it."""
    return f"{document['kind']}/{document['metadata']['name']}"


def pod_template(document: Document) -> Document | None:
    """The template of a workload's pods, None for what makes no pods."""
    spec = document.get("spec", {})
    match document["kind"]:
        case "Deployment" | "StatefulSet" | "Job":
            template = spec["template"]
        case "ScaledJob":
            template = spec["jobTargetRef"]["template"]
        case "JobSet":
            template = spec["replicatedJobs"][0]["template"]["spec"]["template"]
        case _:
            return None
    assert isinstance(template, dict)
    return template


def pods(documents: Sequence[Document]) -> Iterator[tuple[str, Document]]:
    """Title and pod template of every workload."""
    for document in documents:
        template = pod_template(document)
        if template is not None:
            yield title(document), template


def component(template: Document) -> str:
    """Which workload a pod belongs to."""
    return str(template["metadata"]["labels"].get("app.kubernetes.io/component"))


def environment(template: Document, documents: Sequence[Document]) -> dict[str, str]:
    """What the first container finds in its environment, of values that the documents hold."""
    (container, *_) = template["spec"]["containers"]
    maps = {d["metadata"]["name"]: d["data"] for d in of_kind(documents, "ConfigMap")}
    found: dict[str, str] = {}
    for source in container.get("envFrom", ()):
        if "configMapRef" in source:
            found |= maps.get(source["configMapRef"]["name"], {})
    for entry in container.get("env", ()):
        from_limit = "resourceFieldRef" in entry.get("valueFrom", {})
        found[entry["name"]] = "1" if from_limit else entry.get("value", "")
    return found
