"""The overlays fit together, and a copy that does not is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.deployment import wiring_rules
from tests.deployment.render import KUSTOMIZATIONS, kustomize, pod_template, title

RULES = (
    wiring_rules.ports,
    wiring_rules.monitors,
    wiring_rules.folders,
    wiring_rules.names,
    wiring_rules.patience,
    wiring_rules.meeting,
    wiring_rules.doors,
)
API, L4, TRAINER = (
    "Deployment/generator-api",
    "Deployment/generator-worker-l4",
    "Deployment/trainer",
)
PULL, SPOT, REDIS = "Job/models-pull", "ScaledJob/generator-worker-spot", "StatefulSet/redis"
Documents = dict[str, Any]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("name", KUSTOMIZATIONS)
def test_rendered_manifests_keep_the_rule(name, rule):
    assert list(rule(kustomize(name))) == []


def _spec(found: Documents, name: str) -> Any:
    return pod_template(found[name])["spec"]  # type: ignore[index]


def _container(found: Documents, name: str) -> Any:
    return _spec(found, name)["containers"][0]


def _without(volume: str, name: str) -> Callable[[Documents], None]:
    def mutate(found: Documents) -> None:
        for holder, key in ((_spec(found, name), "volumes"),
                            (_container(found, name), "volumeMounts")):  # fmt: skip
            holder[key] = [v for v in holder[key] if v["name"] != volume]

    return mutate


def _data(name: str, **values: str) -> Callable[[Documents], None]:
    return lambda found: found[f"ConfigMap/{name}"]["data"].update(values)


def _with_host_path(found: Documents) -> None:
    _spec(found, L4)["volumes"][-1] = {"name": "shm", "hostPath": {"path": "/dev/shm"}}


MUTATIONS: dict[str, tuple[str, Callable[[Documents], object], str]] = {
    "an API's port": (
        "overlays/prod", lambda d: _container(d, API)["ports"][0].update(containerPort=8080),
        "generator-api listens on"),
    "a service's target": (
        "overlays/prod", lambda d: d["Service/trainer-api"]["spec"]["ports"][0].update(
            targetPort="web"), "leads to web"),
    "a probe's path": (
        "overlays/prod", lambda d: _container(d, API)["readinessProbe"]["httpGet"].update(
            path="/ready"), "asks for /ready"),
    "a probe's port": (
        "overlays/prod", lambda d: _container(d, API)["livenessProbe"]["httpGet"].update(
            port="web"), "asks the port web"),
    "Redis' port": (
        "overlays/prod", lambda d: _container(d, REDIS)["ports"][0].update(containerPort=6380),
        "redis listens on"),
    "a headless service": (
        "overlays/prod", lambda d: d[REDIS]["spec"].update(serviceName="rediss"), "no Service"),
    "a monitor's port": (
        "overlays/prod", lambda d: d["ServiceMonitor/synthrep"]["spec"]["endpoints"][0].update(
            port="web"), "does not ask"),
    "a monitor's selector": (
        "overlays/prod", lambda d: d["ServiceMonitor/synthrep"]["spec"].update(
            selector={"matchLabels": {"app": "x"}}), "does not ask"),
    "a monitor's key": (
        "overlays/prod", lambda d: d["ServiceMonitor/synthrep"]["spec"]["endpoints"][0][
            "authorization"]["credentials"].update(key="metric"), "nobody makes the key metric"),
    "an autoscaler's key": (
        "overlays/gpu", lambda d: d["TriggerAuthentication/generator-scale"]["spec"][
            "secretTargetRef"][0].update(key="metric-key"), "nobody makes the key"),
    "an autoscaler's parameter": (
        "overlays/gpu", lambda d: d["TriggerAuthentication/generator-scale"]["spec"][
            "secretTargetRef"][0].update(parameter="bearer"), "nobody makes the key bearer"),
    "no volume for runs": ("overlays/gpu", _without("runs", TRAINER), "nothing can be written"),
    "no volume for heartbeats": ("overlays/gpu", _without("tmp", TRAINER), "HEARTBEAT is"),
    "no volume for data": ("overlays/gpu", _without("data", L4), "nothing can be written"),
    "no shared memory": ("overlays/gpu", _without("shm", TRAINER), "no shared memory"),
    "no volume for secrets": ("overlays/gpu", _without("secrets", L4), "not mounted"),
    "models that cannot be written": (
        "overlays/gpu", lambda d: [m.update(readOnly=True) for m in
                                   _container(d, L4)["volumeMounts"] if m["name"] == "models"],
        "nothing can be written"),
    "a file of keys": (
        "overlays/prod", _data("generator", SYNTHREP_GENERATOR_API_KEYS_FILE="/run/synthrep/k"),
        "not mounted"),
    "a folder of runs": (
        "overlays/gpu", _data("trainer", SYNTHREP_TRAINER_RUNS="/runs"), "nothing can be written"),
    "secrets of root": (
        "overlays/gpu", lambda d: _spec(d, API)["securityContext"].pop("fsGroup"), "fsGroup"),
    "a host's network": (
        "overlays/gpu", lambda d: _spec(d, API).update(hostNetwork=True), "its host's"),
    "a host's folder": ("overlays/gpu", _with_host_path, "its host's"),
    "a volume for one node": (
        "overlays/gpu", lambda d: d["PersistentVolumeClaim/runs"]["spec"].update(
            accessModes=["ReadWriteOnce"]), "ReadWriteMany"),
    "no credentials of the store": (
        "overlays/prod", lambda d: _container(d, SPOT)["envFrom"].pop(0), "no credentials"),
    "a variable that nobody knows": (
        "overlays/prod", _data("generator", AWS_REGIN="x"), "nobody knows AWS_REGIN"),
    "a switch that nobody knows": (
        "overlays/gpu", lambda d: _container(d, PULL)["env"][1].update(name="HF_HUB_OFLINE"),
        "nobody knows HF_HUB_OFLINE"),
    "a key in a variable": (
        "overlays/gpu", lambda d: _container(d, API).update(
            env=[{"name": "SYNTHREP_GENERATOR_API_KEYS", "value": "x" * 32}]), "plain sight"),
    "a key in a map": (
        "overlays/prod", _data("generator", AWS_SECRET_ACCESS_KEY="x"), "plain sight"),
    "a program": (
        "overlays/gpu", lambda d: _container(d, "Deployment/generator-reconciler").update(
            command=["python", "-m", "synthrep_generator.reconcile"]), "no module"),
    "a model": (
        "overlays/gpu", lambda d: _container(d, PULL)["command"].__setitem__(3, "sd99"), "sd99"),
    "a Redis that forgets": (
        "overlays/gpu", lambda d: _container(d, REDIS)["command"].__setitem__(-1, "allkeys-lru"),
        "lose work"),
    "all CPUs of the node": (
        "training/job", lambda d: _container(d, "Job/training").pop("env"), "count the CPUs"),
    "no patience with a model": (
        "overlays/gpu", lambda d: _container(d, L4)["startupProbe"].update(failureThreshold=2),
        "while it loads"),
    "no patience with a log": (
        "overlays/gpu", lambda d: _container(d, "Deployment/generator-reconciler")[
            "livenessProbe"].update(failureThreshold=4), "ended after less"),
    "a Job without names": (
        "training/job", lambda d: _spec(d, "Job/training").pop("subdomain"), "has no name"),
    "names of what is ready": (
        "training/job", lambda d: d["Service/training"]["spec"].pop("publishNotReadyAddresses"),
        "has no name"),
    "a JobSet without names": (
        "training/jobset", lambda d: d["JobSet/training"]["spec"]["network"].update(
            subdomain="train"), "has no name"),
    "a queue": (
        "training/queued-s3", lambda d: d["LocalQueue/synthrep-training"]["spec"].update(
            clusterQueue="x"), "leads nowhere"),
    "a small queue": (
        "training/queued-s3", lambda d: d["ClusterQueue/synthrep"]["spec"]["resourceGroups"][0][
            "flavors"][0]["resources"][3].update(nominalQuota="1"), "never admits"),
    "pods of any kind": (
        "overlays/gpu", lambda d: d["Namespace/synthrep"]["metadata"]["labels"].update(
            {"pod-security.kubernetes.io/enforce": "privileged"}), "no restricted pods"),
    "no way in": (
        "overlays/gpu", lambda d: d.pop("NetworkPolicy/api-from-users"), "no way in"),
    "open to all": (
        "overlays/gpu", lambda d: d["NetworkPolicy/api-from-users"]["spec"].update(ingress=[{}]),
        "everybody has one"),
    "another generator": (
        "overlays/gpu", _data("trainer", SYNTHREP_TRAINER_GENERATOR_URL="http://generator:8000"),
        "no Service at"),
}  # fmt: skip


def _findings(documents: list[Any]) -> Iterator[str]:
    for rule in RULES:
        yield from rule(documents)


@pytest.mark.parametrize("what", MUTATIONS)
def test_a_broken_copy_is_refused(what):
    name, mutate, words = MUTATIONS[what]
    found = {title(document): document for document in kustomize(name)}
    mutate(found)
    refused = list(_findings(list(found.values())))
    assert any(words in finding for finding in refused), refused
