"""That what pods are given fits together: ports, probes, folders, secrets, names, queues."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from deploy.compose.init import make_secrets
from synthrep_generator.model_catalogue import CATALOGUE
from synthrep_generator.routes_service import router as generator_routes
from synthrep_generator.settings import GeneratorSettings
from synthrep_trainer.routes_service import router as trainer_routes
from synthrep_trainer.settings import TrainerSettings
from tests.deployment.render import Document, component, environment, of_kind, pods, title

_APIS = {
    "generator-api": (GeneratorSettings().port, generator_routes),
    "trainer-api": (TrainerSettings().port, trainer_routes),
}
_OTHERS = {"TMPDIR", "AWS_REGION", "AWS_ENDPOINT_URL", "HF_HUB_OFFLINE", "HF_TOKEN"}
_SECRET = re.compile("password|secret|token|_keys?$", re.IGNORECASE)
_FOLDERS = ("ROOT", "RUNS", "MODEL_CACHE", "BATCH_SIZES", "HEARTBEAT", "TMPDIR")
_PULLS = ("generator-worker", "models-pull")  # who writes models
_TORCH = ("generator-worker", "trainer", "training")
_TOLERANCE_S = 60


@cache
def secret_keys() -> frozenset[str]:
    """What the Secret `synthrep` has, as docs/deployment.md has it made."""
    with TemporaryDirectory() as folder:
        return frozenset(make_secrets(Path(folder)))


def ports(documents: Sequence[Document]) -> Iterator[str]:
    """Containers listen where their program does; services, probes and monitors ask there."""
    templates = {component(t): t for _, t in pods(documents)}
    for name, template in templates.items():
        container = template["spec"]["containers"][0]
        named = {p["name"]: p["containerPort"] for p in container.get("ports", ())}
        wanted = {"redis": 6379} if name == "redis" else {}
        wanted = {"http": _APIS[name][0]} if name in _APIS else wanted
        if not wanted.items() <= named.items():
            yield f"{name} listens on {wanted}, not on {named}"
        for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
            asked = container.get(kind, {})
            get = asked.get("httpGet") or asked.get("tcpSocket") or {"port": next(iter(named), "")}
            if named and get["port"] not in named:
                yield f"{name}: {kind} asks the port {get['port']}"
            paths = {getattr(r, "path", "") for r in _APIS[name][1].routes} if name in _APIS else {}
            if "path" in get and get["path"] not in paths:
                yield f"{name}: {kind} asks for {get['path']}, which is not there"
    for service in of_kind(documents, "Service"):
        found = [t for t in templates.values() if service["spec"]["selector"].items()
                 <= t["metadata"]["labels"].items()]  # fmt: skip
        names = {p["name"]: p["containerPort"] for t in found
                 for p in t["spec"]["containers"][0].get("ports", ())}  # fmt: skip
        for port in service["spec"]["ports"]:
            target = port.get("targetPort", port["port"])
            if names.get(str(target), target) != port["port"]:
                yield f"{title(service)}: {port['port']} leads to {target}"


def monitors(documents: Sequence[Document]) -> Iterator[str]:
    """A StatefulSet has its Service, and Prometheus asks both APIs."""
    services = {s["metadata"]["name"]: s for s in of_kind(documents, "Service")}
    for stateful in of_kind(documents, "StatefulSet"):
        if stateful["spec"]["serviceName"] not in services:
            yield f"{title(stateful)}: there is no Service {stateful['spec']['serviceName']}"
    for monitor in of_kind(documents, "ServiceMonitor"):
        asked = monitor["spec"]["endpoints"][0]["port"]
        rules = monitor["spec"]["selector"].get("matchExpressions", [{"values": []}])
        for api in _APIS:
            given = {p["name"] for p in services[api]["spec"]["ports"]}
            if api not in rules[0]["values"] or asked not in given:
                yield f"{title(monitor)}: does not ask {api}"


def folders(documents: Sequence[Document]) -> Iterator[str]:
    """What settings name lies on a volume that may be written; files of secrets are mounted."""
    if not any(of_kind(documents, "ConfigMap")):
        return
    for name, template in pods(documents):
        spec, found = template["spec"], environment(template, documents)
        mounts = spec["containers"][0].get("volumeMounts", ())
        volumes = {v["name"]: v for v in spec.get("volumes", ())}
        files = {
            f"{mount['mountPath']}/{item['path']}"
            for mount in mounts
            for item in volumes.get(mount["name"], {}).get("secret", {}).get("items", ())
        }
        for variable, value in found.items():
            if variable.endswith("_FILE") and value not in files:
                yield f"{name}: {variable} names {value}, which is not mounted"
            is_read = "CACHE" in variable or "SIZES" in variable
            if (
                not variable.endswith(_FOLDERS)
                or "://" in value
                or (is_read and component(template) not in _PULLS)
            ):
                continue
            above = {str(path) for path in (PurePosixPath(value), *PurePosixPath(value).parents)}
            if not any(m["mountPath"] in above and not m.get("readOnly") for m in mounts):
                yield f"{name}: {variable} is {value}, where nothing can be written"
        if component(template) in _TORCH and not any(m["mountPath"] == "/dev/shm" for m in mounts):
            yield f"{name}: torch has no shared memory"
        if files and not spec["securityContext"].get("fsGroup"):
            yield f"{name}: its user cannot read the files of secrets without fsGroup"
        if spec.get("hostNetwork") or any("hostPath" in v for v in volumes.values()):
            yield f"{name}: uses its host's network or folders"
        if any("s3://" in value for value in found.values()):
            first = spec["containers"][0]["envFrom"][0]
            if first != {"secretRef": {"name": "object-store", "optional": True}}:
                yield f"{name}: has no credentials of the object store"
    modes = {tuple(d["spec"]["accessModes"]) for d in of_kind(documents, "PersistentVolumeClaim")}
    if any(of_kind(documents, "ScaledObject")) and modes != {("ReadWriteMany",)}:
        yield "volumes of pods on several nodes are ReadWriteMany"


def names(documents: Sequence[Document]) -> Iterator[str]:
    """Variables are known and hold no secret; keys of secrets, programs and models exist."""
    for name, template in pods(documents):
        container = template["spec"]["containers"][0]
        for variable in environment(template, documents):
            if not variable.startswith("SYNTHREP_") and variable not in _OTHERS:
                yield f"{name}: nobody knows {variable}"
        for entry in container.get("env", ()):
            if _SECRET.search(entry["name"]) and "value" in entry:
                yield f"{name}: {entry['name']} holds a secret in plain sight"
        command = container.get("command", [""])
        if command[:2] == ["python", "-m"] and not importlib.util.find_spec(command[2]):
            yield f"{name}: there is no module {command[2]}"
        if command[0] == "synthrep" and (
            command[:3] != ["synthrep", "models", "pull"] or command[3] not in CATALOGUE
        ):
            yield f"{name}: there is no {' '.join(command)}"
        if component(template) == "redis" and not ({"noeviction", "--appendonly"} <= set(command)):
            yield f"{name}: would lose work"
        if component(template) in _TORCH and not any(
            e["name"].endswith("_THREADS") for e in container.get("env", ())
        ):
            yield f"{name}: torch would count the CPUs of the node"
    for config in of_kind(documents, "ConfigMap"):
        for variable in config["data"]:
            if _SECRET.search(variable):
                yield f"{title(config)}: {variable} holds a secret in plain sight"
    for key in _asked_keys(documents):
        if key not in secret_keys():
            yield f"nobody makes the key {key} of the Secret synthrep"


def _asked_keys(documents: Sequence[Document]) -> Iterator[str]:
    for login in of_kind(documents, "TriggerAuthentication"):
        for reference in login["spec"]["secretTargetRef"]:
            # What KEDA's metrics-api calls the key of authMode bearer.
            yield reference["key"] if reference["parameter"] == "token" else reference["parameter"]
    for monitor in of_kind(documents, "ServiceMonitor"):
        yield monitor["spec"]["endpoints"][0]["authorization"]["credentials"]["key"]


def patience(documents: Sequence[Document]) -> Iterator[str]:
    """A probe ends nothing that is only slow: a model that loads, a long log that is read."""
    limit_s = GeneratorSettings().job_limit_s
    for name, template in pods(documents):
        container = template["spec"]["containers"][0]
        who = component(template)
        if who == "generator-worker" and _seconds(container.get("startupProbe")) <= limit_s:
            yield f"{name}: is ended while it loads a model"
        least_s = limit_s if who == "generator-reconciler" else _TOLERANCE_S
        if "livenessProbe" in container and _seconds(container["livenessProbe"]) < least_s:
            yield f"{name}: is ended after less than {least_s:g} s"


def _seconds(probe: Any) -> float:
    return float(probe["periodSeconds"] * probe.get("failureThreshold", 3)) if probe else 0.0


def meeting(documents: Sequence[Document]) -> Iterator[str]:
    """Ranks find the first one by a Service's name; Kueue's queues lead to enough of all."""
    services = {s["metadata"]["name"]: s["spec"] for s in of_kind(documents, "Service")}
    for job in of_kind(documents, "Job"):
        if job["metadata"]["name"] == "training":
            subdomain = job["spec"]["template"]["spec"].get("subdomain")
            if subdomain != "training" or not (
                services.get(subdomain, {}).get("publishNotReadyAddresses")
            ):
                yield f"{title(job)}: the first pod has no name"
            yield from _admitted(job, documents)
    for jobset in of_kind(documents, "JobSet"):
        network = jobset["spec"]["network"]
        if network.get("subdomain") != "training" or not network.get("enableDNSHostnames"):
            yield f"{title(jobset)}: the first pod has no name"


def _admitted(job: Document, documents: Sequence[Document]) -> Iterator[str]:
    queue = job["metadata"]["labels"].get("kueue.x-k8s.io/queue-name")
    if queue is None:
        return
    local = {d["metadata"]["name"]: d["spec"] for d in of_kind(documents, "LocalQueue")}
    whole = {d["metadata"]["name"]: d["spec"] for d in of_kind(documents, "ClusterQueue")}
    found = whole.get(local.get(queue, {}).get("clusterQueue", ""))
    if found is None:
        yield f"{title(job)}: the queue {queue} leads nowhere"
        return
    (group,) = found["resourceGroups"]
    quotas = {r["name"]: r["nominalQuota"] for r in group["flavors"][0]["resources"]}
    requests = job["spec"]["template"]["spec"]["containers"][0]["resources"]["requests"]
    if not requests.keys() <= quotas.keys() or (
        int(quotas["nvidia.com/gpu"]) < job["spec"]["parallelism"] * int(requests["nvidia.com/gpu"])
    ):
        yield f"{title(job)}: the queue {queue} never admits it"


def doors(documents: Sequence[Document]) -> Iterator[str]:
    """The namespace is restricted, users come in by its label alone, and addresses are right."""
    for namespace in of_kind(documents, "Namespace"):
        labels = namespace["metadata"]["labels"]
        if labels.get("pod-security.kubernetes.io/enforce") != "restricted":
            yield "the namespace enforces no restricted pods"
        policies = {d["metadata"]["name"]: d["spec"] for d in of_kind(documents, "NetworkPolicy")}
        sources = [i.get("from") for i in policies.get("api-from-users", {}).get("ingress", ())]
        label = {"namespaceSelector": {"matchLabels": {"synthrep.dev/may-call": "true"}}}
        if sources != [[label]]:
            yield "users have no way in, or everybody has one"
    services = {s["metadata"]["name"]: s for s in of_kind(documents, "Service")}
    for config in of_kind(documents, "ConfigMap"):
        url = config["data"].get("SYNTHREP_TRAINER_GENERATOR_URL", "")
        host, _, port = url.removeprefix("http://").partition(":")
        if url and int(port) not in [
            p["port"] for p in services.get(host, {"spec": {"ports": []}})["spec"]["ports"]
        ]:
            yield f"{title(config)}: there is no Service at {url}"
