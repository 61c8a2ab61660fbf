"""Which pods the network policies let speak to whom, and which they must and must not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from tests.deployment.render import (
    Document,
    component,
    environment,
    kustomize,
    of_kind,
    pods,
)

_REDIS_USERS = {"generator-api", "generator-reconciler", "generator-worker"}
_PORTS = {"http": 8000, "redis": 6379}
Peer = dict[str, Any]


def network(documents: Sequence[Document]) -> Iterator[str]:
    """All that has to be let through is, and Redis hears its own only."""
    templates = {component(t): t for _, t in pods(documents)}
    policies = [d["spec"] for d in of_kind(documents, "NetworkPolicy")]
    if not any(of_kind(documents, "Namespace")):
        yield from _training(templates, policies)
        return
    if {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]} not in policies:
        yield "no policy denies what no other allows"
    for name, template in templates.items():
        labels = template["metadata"]["labels"]
        if not _leaves(policies, labels, _namespace("kube-system"), 53, "UDP"):
            yield f"{name} cannot resolve names"
        if name != "redis":
            yield from _redis(name, labels, templates["redis"], policies)
        if environment(template, documents).get("TMPDIR") and (
            "s3://" in str(environment(template, documents))
            and not _leaves(policies, labels, {"ip": "203.0.113.1"}, 443)
        ):
            yield f"{name} cannot reach the object store"
    api = templates["generator-api"]["metadata"]["labels"]
    for name, labels in _trainers(templates):
        leaves = _leaves(policies, labels, {"labels": api}, "http")
        if not (leaves and _enters(policies, api, {"labels": labels}, "http")):
            yield f"{name} cannot reach generator-api"
    others = {"ScaledObject": "keda", "ServiceMonitor": "monitoring"}
    for kind, namespace in others.items():
        if any(of_kind(documents, kind)) and not _enters(
            policies, api, _namespace(namespace), "http"
        ):
            yield f"{namespace} cannot reach generator-api"
    for name, port in monitored(documents):
        labels = templates[name]["metadata"]["labels"]
        if not _enters(policies, labels, _namespace("monitoring"), port):
            yield f"monitoring cannot reach {port} of {name}"
    if "models-pull" in templates and not _leaves(
        policies, templates["models-pull"]["metadata"]["labels"], {"ip": "203.0.113.1"}, 443
    ):
        yield "models-pull cannot reach the hub"


def monitored(documents: Sequence[Document]) -> Iterator[tuple[str, str]]:
    """The pods, by component, and their ports that a PodMonitor has Prometheus ask."""
    for monitor in of_kind(documents, "PodMonitor"):
        asked = {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]}
        for _, template in pods(documents):
            if _selects(monitor["spec"]["selector"], template["metadata"]["labels"]):
                for port in template["spec"]["containers"][0].get("ports", ()):
                    if port["name"] in asked:
                        yield component(template), port["name"]


def _redis(
    name: str, labels: dict[str, str], redis: Document, policies: list[Any]
) -> Iterator[str]:
    target = {"labels": redis["metadata"]["labels"]}
    leaves = _leaves(policies, labels, target, "redis")
    enters = _enters(policies, redis["metadata"]["labels"], {"labels": labels}, "redis")
    if (leaves and enters) != (name in _REDIS_USERS):
        yield f"{name} {'can' if leaves and enters else 'cannot'} reach Redis"


def _trainers(templates: dict[str, Document]) -> Iterator[tuple[str, dict[str, str]]]:
    """Who asks the generator, with the pods of trainings that join what an overlay has made."""
    for name in ("trainer-api", "trainer"):
        yield name, templates[name]["metadata"]["labels"]
    for template in (t for _, t in pods(kustomize("training/job"))):
        yield component(template), template["metadata"]["labels"]


def _training(templates: dict[str, Document], policies: list[Any]) -> Iterator[str]:
    labels = templates["training"]["metadata"]["labels"]
    peer = {"labels": labels}
    for port in (29400, 40000):
        if not (_leaves(policies, labels, peer, port) and _enters(policies, labels, peer, port)):
            yield f"ranks of a training cannot speak to each other on port {port}"


def _namespace(name: str) -> Peer:
    return {"namespace": {"kubernetes.io/metadata.name": name}}


def _selects(selector: Any, labels: dict[str, str]) -> bool:
    wanted = selector.get("matchLabels", {})
    rules = selector.get("matchExpressions", ())
    return wanted.items() <= labels.items() and all(
        rule["operator"] == "In" and labels.get(rule["key"]) in rule["values"] for rule in rules
    )


def _fits(rule: Any, peers: Any, peer: Peer, port: int | str, protocol: str) -> bool:
    ports = rule.get("ports")
    wanted = {port, _PORTS.get(str(port), port)}
    if ports is not None and not any(
        p.get("port") in wanted and p.get("protocol", "TCP") == protocol for p in ports
    ):
        return False
    return any(
        ("ip" in peer and "ipBlock" in found)
        or ("namespace" in peer and "namespaceSelector" in found
            and _selects(found["namespaceSelector"], peer["namespace"]))
        or ("labels" in peer and "podSelector" in found and "namespaceSelector" not in found
            and _selects(found["podSelector"], peer["labels"]))
        for found in peers
    )  # fmt: skip


def _leaves(
    policies: list[Any], labels: dict[str, str], peer: Peer, port: int | str, protocol: str = "TCP"
) -> bool:
    return any(
        _fits(rule, rule.get("to", ()), peer, port, protocol)
        for policy in policies
        if _selects(policy["podSelector"], labels)
        for rule in policy.get("egress", ())
    )


def _enters(policies: list[Any], labels: dict[str, str], peer: Peer, port: int | str) -> bool:
    return any(
        _fits(rule, rule.get("from", ()), peer, port, "TCP")
        for policy in policies
        if _selects(policy["podSelector"], labels)
        for rule in policy.get("ingress", ())
    )
