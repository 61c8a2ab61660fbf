"""What every pod of the manifests has to be, and what its references have to find."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from pydantic import ValidationError

from synthrep_generator.settings import GeneratorSettings
from synthrep_shared.settings import ServiceSettings
from synthrep_trainer.settings import TrainerSettings
from tests.deployment.network_rules import monitored
from tests.deployment.render import (
    Document,
    component,
    compose,
    environment,
    of_kind,
    pods,
    title,
)

UID = 10001
SECRETS = {"synthrep", "object-store", "model-hub"}  # made by hand, see docs/deployment.md
SERVICES: dict[str, type[ServiceSettings]] = {
    "SYNTHREP_GENERATOR_": GeneratorSettings,
    "SYNTHREP_TRAINER_": TrainerSettings,
}
_FIGURES = {
    "generator-reconciler": ("metrics",),
    "generator-worker": ("metrics",),
    "trainer": ("metrics", "metrics-run", "metrics-probe"),
    "training": ("metrics-run",),
}
_RUN, _PROBE = (
    TrainerSettings(metrics_port=1).metrics_ports_of_runs[0] - 1,
    TrainerSettings(metrics_port=1).metrics_ports_of_probes[0] - 1,
)
_AFTER_THE_FIRST = {"metrics": 0, "metrics-run": _RUN, "metrics-probe": _PROBE}
_AGREED = (
    "SYNTHREP_GENERATOR_QUEUE",
    "SYNTHREP_GENERATOR_ROOT",
    "SYNTHREP_GENERATOR_REDIS_URL_FILE",
    "SYNTHREP_TRAINER_ROOT",
    "SYNTHREP_TRAINER_RUNS",
)


def security(documents: Sequence[Document]) -> Iterator[str]:
    """Not root, nothing writable, no capability, no token, no services' addresses in variables."""
    for name, template in pods(documents):
        spec = template["spec"]
        context = spec.get("securityContext", {})
        if (context.get("runAsNonRoot"), context.get("runAsUser")) != (True, UID):
            yield f"{name}: must run as uid {UID}"
        if context.get("seccompProfile") != {"type": "RuntimeDefault"}:
            yield f"{name}: needs the default seccomp profile"
        if spec.get("automountServiceAccountToken") is not False:
            yield f"{name}: mounts a token of the cluster's API"
        if spec.get("enableServiceLinks") is not False:
            # A service `synthrep-generator` would set SYNTHREP_GENERATOR_PORT=tcp://…
            yield f"{name}: enableServiceLinks must be false"
        for container in spec["containers"] + spec.get("initContainers", []):
            wanted = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True,
                      "capabilities": {"drop": ["ALL"]}}  # fmt: skip
            if container.get("securityContext") != wanted:
                yield f"{name}: {container['name']} is not locked down"


def resources(documents: Sequence[Document]) -> Iterator[str]:
    """Limits are set; memory and GPUs are asked for as limited; scratch space is bounded."""
    for name, template in pods(documents):
        for container in template["spec"]["containers"]:
            found = container.get("resources", {})
            limits, requests = found.get("limits", {}), found.get("requests", {})
            if not {"cpu", "memory", "ephemeral-storage"} <= limits.keys() & requests.keys():
                yield f"{name}: {container['name']} lacks requests or limits"
            for key in ("memory", "nvidia.com/gpu"):
                if limits.get(key) != requests.get(key):
                    yield f"{name}: {container['name']} asks for other {key} than its limit"
        for volume in template["spec"].get("volumes", ()):
            if "emptyDir" in volume and "sizeLimit" not in (volume["emptyDir"] or {}):
                yield f"{name}: volume {volume['name']} has no bound"


def images(documents: Sequence[Document]) -> Iterator[str]:
    """Images are those that compose builds or names, at a version."""
    known = {service["image"] for service in compose(["*"])["services"].values()}
    names = {image.rpartition(":")[0] for image in known}
    for name, template in pods(documents):
        for container in template["spec"]["containers"]:
            image, _, tag = container["image"].partition("@")[0].rpartition(":")
            if "@sha256:" in container["image"]:
                continue
            if not image or tag == "latest":
                yield f"{name}: image {container['image']} is not pinned"
            elif image in names and container["image"] not in known:
                yield f"{name}: compose builds no {container['image']}"
            elif not any(image.endswith(other) for other in names):
                yield f"{name}: image {image} is unknown to compose"


def references(documents: Sequence[Document]) -> Iterator[str]:
    """Accounts, priorities, settings, volumes and secrets that pods name are there."""
    there = {(d["kind"], d["metadata"]["name"]) for d in documents}
    is_whole = ("Namespace", "synthrep") in there  # training joins what an overlay has made
    for name, template in pods(documents):
        spec = template["spec"]
        wanted = {("ServiceAccount", spec.get("serviceAccountName"))}
        if "priorityClassName" in spec:
            wanted.add(("PriorityClass", spec["priorityClassName"]))
        mounted = {m["name"] for c in spec["containers"] for m in c.get("volumeMounts", ())}
        volumes = {v["name"]: v for v in spec.get("volumes", ())}
        given = volumes.keys() | {
            claim["metadata"]["name"]
            for stateful in of_kind(documents, "StatefulSet")
            if title(stateful) == name
            for claim in stateful["spec"]["volumeClaimTemplates"]
        }
        if mounted != given:
            yield f"{name}: volumes and mounts differ: {sorted(mounted ^ given)}"
        for volume in volumes.values():
            if claim := volume.get("persistentVolumeClaim"):
                wanted.add(("PersistentVolumeClaim", claim["claimName"]))
            if "secret" in volume and volume["secret"]["secretName"] not in SECRETS:
                yield f"{name}: nobody makes the secret {volume['secret']['secretName']}"
        for source in spec["containers"][0].get("envFrom", ()):
            if "configMapRef" in source:
                wanted.add(("ConfigMap", source["configMapRef"]["name"]))
        for kind, target in sorted(wanted - there, key=str) if is_whole else ():
            yield f"{name}: there is no {kind} {target}"


def settings(documents: Sequence[Document]) -> Iterator[str]:
    """The services read what they are given, accept it, and agree on what they share."""
    if not any(of_kind(documents, "ConfigMap")):
        return
    agreed: dict[str, str] = {}
    for name, template in pods(documents):
        found = environment(template, documents)
        for prefix, service in SERVICES.items():
            given = {k: v for k, v in found.items() if k.startswith(prefix)}
            yield from _refused(name, prefix, service, given)
        for key in _AGREED:
            if key in found and agreed.setdefault(key, found[key]) != found[key]:
                yield f"{name}: {key} is {found[key]} here and {agreed[key]} elsewhere"
        if component(template).startswith("generator-"):
            missing = [k for k in _AGREED if "GENERATOR" in k and k not in found]
            yield from (f"{name}: {key} is not set" for key in missing)


def _refused(
    name: str, prefix: str, service: type[ServiceSettings], given: dict[str, str]
) -> Iterator[str]:
    values: dict[str, object] = {}
    for variable, value in given.items():
        field = variable.removeprefix(prefix).lower()
        if field.removesuffix("_file") in service.model_fields and field.endswith("_file"):
            values[field.removesuffix("_file")] = "from-a-file"
        elif field.split("__")[0] in service.model_fields:
            values[field] = value
        else:
            yield f"{name}: nothing reads {variable}"
    try:
        service.model_validate(values)
    except ValidationError as error:
        yield f"{name}: {error}"


def probes(documents: Sequence[Document]) -> Iterator[str]:
    """What runs for long is probed; the probes look at the heartbeat that the settings name."""
    for document in of_kind(documents, "Deployment", "StatefulSet", "ScaledJob"):
        ((name, template),) = pods([document])
        (container,) = template["spec"]["containers"]
        for kind in ("startupProbe", "livenessProbe"):
            if kind not in container:
                yield f"{name}: no {kind}"
        heartbeat = environment(template, documents).get("SYNTHREP_GENERATOR_HEARTBEAT") or (
            environment(template, documents).get("SYNTHREP_TRAINER_HEARTBEAT")
        )
        for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
            command = " ".join(container.get(kind, {}).get("exec", {}).get("command", ()))
            for path in re.findall(r"/tmp/[a-z]+", command):
                if path != heartbeat:
                    yield f"{name}: {kind} looks at {path}, the heartbeat is {heartbeat}"
            if "readyz" in str(container.get(kind)) and (
                kind == "livenessProbe" or "generator" in name
            ):
                yield f"{name}: Redis' absence would restart it, or end its answers: {kind}"


def figures(documents: Sequence[Document]) -> Iterator[str]:
    """What is no API names the ports at which it answers Prometheus; a monitor asks them all."""
    asked = set(monitored(documents))
    has_monitor = any(of_kind(documents, "PodMonitor"))
    for name, template in pods(documents):
        who, found = component(template), environment(template, documents)
        named = template["spec"]["containers"][0].get("ports", ())
        ports = {port["name"]: port["containerPort"] for port in named}
        for port in _FIGURES.get(who, ()):
            if port not in ports:
                yield f"{name}: names no port {port}"
            elif has_monitor and (who, port) not in asked:
                yield f"{name}: no monitor asks {port}"
        first = found.get(f"SYNTHREP_{who.partition('-')[0].upper()}_METRICS_PORT")
        for port in _AFTER_THE_FIRST.keys() & ports.keys() if first else ():
            if ports[port] != int(first) + _AFTER_THE_FIRST[port]:
                yield f"{name}: {port} is {ports[port]}, the first port is {first}"


def selectors(documents: Sequence[Document]) -> Iterator[str]:
    """Selectors find pods, never by version; every Deployment has a budget that lets it drain."""
    labels = [template["metadata"]["labels"] for _, template in pods(documents)]

    def finds(selector: dict[str, str]) -> bool:
        return any(selector.items() <= found.items() for found in labels)

    for document in of_kind(documents, "Deployment", "StatefulSet"):
        selector = document["spec"]["selector"]["matchLabels"]
        own = document["spec"]["template"]["metadata"]["labels"]
        if not selector.items() <= own.items():
            yield f"{title(document)}: its selector does not find its pods"
        if "app.kubernetes.io/version" in selector:
            yield f"{title(document)}: a version in a selector cannot be changed"
        budgets = [b["spec"] for b in of_kind(documents, "PodDisruptionBudget")
                   if b["spec"]["selector"]["matchLabels"].items() <= own.items()]  # fmt: skip
        if len(budgets) != 1:
            yield f"{title(document)}: has {len(budgets)} disruption budgets"
        elif budgets[0].get("minAvailable", 0) >= document["spec"].get("replicas", 1) or (
            budgets[0].get("maxUnavailable") == 0
        ):
            yield f"{title(document)}: its budget blocks every drain"
        elif budgets[0].get("unhealthyPodEvictionPolicy") != "AlwaysAllow":
            yield f"{title(document)}: pods that are not ready block a drain"
    for document in of_kind(documents, "Service"):
        if not finds(document["spec"]["selector"]):
            yield f"{title(document)}: finds no pod"
