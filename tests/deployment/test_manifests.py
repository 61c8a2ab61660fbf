"""The overlays keep every rule, and a copy that breaks one is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from tests.deployment import network_rules, pod_rules, scaling_rules
from tests.deployment.render import (
    KUSTOMIZATIONS,
    Document,
    component,
    compose,
    kustomize,
    of_kind,
    pod_template,
    pods,
    title,
)
from tests.deployment.schemas import schema_findings

RULES: tuple[Callable[[Sequence[Document]], Iterator[str]], ...] = (
    schema_findings,
    pod_rules.security,
    pod_rules.resources,
    pod_rules.images,
    pod_rules.references,
    pod_rules.settings,
    pod_rules.probes,
    pod_rules.figures,
    pod_rules.selectors,
    scaling_rules.grace,
    scaling_rules.departures,
    scaling_rules.gpu_pools,
    scaling_rules.triggers,
    scaling_rules.scaled_objects,
    scaling_rules.scaled_jobs,
    scaling_rules.quotas,
    scaling_rules.training,
    network_rules.network,
)


def findings(documents: Sequence[Document]) -> list[str]:
    malformed = list(schema_findings(documents))
    return malformed or [finding for rule in RULES for finding in rule(documents)]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("name", KUSTOMIZATIONS)
def test_rendered_manifests_keep_the_rule(name, rule):
    assert list(rule(kustomize(name))) == []


@pytest.mark.parametrize("name", [n for n in KUSTOMIZATIONS if n.startswith("overlays/")])
def test_an_overlay_has_the_workloads_of_the_compose_file(name):
    services = compose()["services"].keys() - {"init"}  # secrets are made by hand in a cluster
    found = {component(template) for _, template in pods(kustomize(name))}
    assert found - {"models-pull"} == services


def test_the_jobset_takes_the_place_of_the_job():
    assert [d["kind"] for d in kustomize("training/jobset")] == ["JobSet", "NetworkPolicy"]


def test_kueue_admits_the_job():
    (job,) = of_kind(kustomize("training/queued-s3"), "Job")
    assert job["spec"]["suspend"] is True
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "synthrep-training"


Mutation = Callable[[dict[str, Any]], object]


def _by_title(documents: Sequence[Document]) -> dict[str, Document]:
    return {title(document): document for document in documents}


def _spec(name: str) -> Callable[[dict[str, Document]], Any]:
    return lambda found: pod_template(found[name])["spec"]  # type: ignore[index]


def _container(name: str) -> Callable[[dict[str, Document]], Any]:
    return lambda found: _spec(name)(found)["containers"][0]


L4 = "Deployment/generator-worker-l4"
SPOT = "ScaledJob/generator-worker-spot"
MUTATIONS: dict[str, tuple[str, Mutation, str]] = {
    "a field that does not exist": (
        "prod", lambda d: d[L4]["spec"].update(replica=3), "replica"),
    "a field of the wrong type": (
        "prod", lambda d: d["Service/generator-api"]["spec"].update(ports="8000"), "8000"),
    "a kind that nobody knows": (
        "prod", lambda d: d["Service/redis"].update(kind="Servise"), "no schema"),
    "a misspelt field of a ScaledJob": (
        "prod", lambda d: d[SPOT]["spec"].update(pollingIntervall=5), "pollingIntervall"),
    "an API version that is gone": (
        "prod", lambda d: d["PodDisruptionBudget/redis"].update(apiVersion="policy/v1beta1"),
        "no schema"),
    "another queue": (
        "prod", lambda d: _container(L4)(d).update(
            env=[{"name": "SYNTHREP_GENERATOR_QUEUE", "value": "other"}]), "QUEUE"),
    "a queue's name that no service takes": (
        "prod", lambda d: d["ConfigMap/generator"]["data"].update(
            SYNTHREP_GENERATOR_QUEUE="Synth Rep"), "queue"),
    "a setting that nothing reads": (
        "prod", lambda d: d["ConfigMap/trainer"]["data"].update(
            SYNTHREP_TRAINER_GRACE="100"), "nothing reads"),
    "a short grace period": (
        "prod", lambda d: _spec(L4)(d).update(terminationGracePeriodSeconds=60), "grace of 60"),
    "a job limit above the grace period": (
        "prod", lambda d: d["ConfigMap/generator"]["data"].update(
            SYNTHREP_GENERATOR_JOB_LIMIT_S="3600"), "no longer than a job"),
    "a surge on a GPU pool": (
        "prod", lambda d: d[L4]["spec"]["strategy"]["rollingUpdate"].update(maxSurge="25%"),
        "rollout would wait"),
    "the default strategy on a GPU pool": (
        "prod", lambda d: d[L4]["spec"].pop("strategy"), "rollout would wait"),
    "no network rule for KEDA": (
        "prod", lambda d: d.pop("NetworkPolicy/api-from-keda"), "keda cannot reach"),
    "no network rule for Prometheus": (
        "prod", lambda d: d.pop("NetworkPolicy/api-from-prometheus"), "monitoring cannot"),
    "no network rule for the figures of workers": (
        "prod", lambda d: d.pop("NetworkPolicy/processes-from-prometheus"),
        "monitoring cannot reach metrics of generator-worker"),
    "a worker whose figures nobody can name": (
        "prod", lambda d: _container(L4)(d).pop("ports"), "names no port metrics"),
    "figures on another port": (
        "prod", lambda d: d["ConfigMap/trainer"]["data"].update(
            SYNTHREP_TRAINER_METRICS_PORT="9100"), "the first port is 9100"),
    "figures that Prometheus does not ask for": (
        "prod", lambda d: d["PodMonitor/synthrep"]["spec"]["podMetricsEndpoints"].pop(),
        "no monitor asks metrics-probe"),
    "no network rule for names": (
        "prod", lambda d: d.pop("NetworkPolicy/dns"), "cannot resolve"),
    "no network rule for S3": (
        "prod", lambda d: d.pop("NetworkPolicy/data-to-store"), "cannot reach the object store"),
    "no way from runs to the generator": (
        "prod", lambda d: d["NetworkPolicy/trainer-to-generator"]["spec"].update(
            podSelector={"matchLabels": {"app.kubernetes.io/component": "trainer-api"}}),
        "trainer cannot reach generator-api"),
    "no way into the generator for runs": (
        "prod", lambda d: d.pop("NetworkPolicy/generator-from-trainer"),
        "training cannot reach generator-api"),
    "Redis open to all": (
        "prod", lambda d: d["NetworkPolicy/redis-from-generator"]["spec"].update(
            ingress=[{"from": [{"podSelector": {}}]}])
        or d["NetworkPolicy/generator-to-redis"]["spec"].update(podSelector={}),
        "can reach Redis"),
    "nothing denied": (
        "prod", lambda d: d.pop("NetworkPolicy/default-deny"), "no policy denies"),
    "a container as root": (
        "prod", lambda d: _spec(L4)(d)["securityContext"].update(runAsUser=0), "uid 10001"),
    "a writable root": (
        "prod", lambda d: _container("Deployment/trainer")(d)["securityContext"].update(
            readOnlyRootFilesystem=False), "not locked down"),
    "services' addresses in variables": (
        "prod", lambda d: _spec(L4)(d).pop("enableServiceLinks"), "enableServiceLinks"),
    "an image of no version": (
        "prod", lambda d: _container(L4)(d).update(image="synthrep/generator-worker:latest"),
        "not pinned"),
    "an image that compose does not build": (
        "prod", lambda d: _container(L4)(d).update(image="synthrep/generator-worker:0.0.9"),
        "builds no"),
    "no disruption budget": (
        "prod", lambda d: d.pop("PodDisruptionBudget/generator-worker-l4"), "0 disruption"),
    "a budget that blocks drains": (
        "prod", lambda d: d["PodDisruptionBudget/generator-api"]["spec"].update(minAvailable=3),
        "blocks every drain"),
    "a budget that lets nobody go": (
        "prod", lambda d: d["PodDisruptionBudget/redis"]["spec"].update(maxUnavailable=0),
        "blocks every drain"),
    "a budget that keeps broken pods": (
        "prod", lambda d: d["PodDisruptionBudget/generator-worker-l4"]["spec"].pop(
            "unhealthyPodEvictionPolicy"), "block a drain"),
    "a selector that finds nothing": (
        "prod", lambda d: d["Service/trainer-api"]["spec"].update(
            selector={"app.kubernetes.io/component": "trainers"}), "finds no pod"),
    "less GPU asked for than limited": (
        "prod", lambda d: _container(L4)(d)["resources"]["requests"].pop("nvidia.com/gpu"),
        "asks for other nvidia.com/gpu"),
    "a GPU without toleration": (
        "prod", lambda d: _spec(L4)(d).pop("tolerations"), "go together"),
    "an autoscaler on a figure without running work": (
        "prod", lambda d: d["ScaledObject/generator-worker-l4"]["spec"]["triggers"][0]["metadata"]
        .update(url="http://generator-api.synthrep.svc:8000/v1/queue", valueLocation="depth"),
        "busy workers would be ended"),
    "an autoscaler on a field that is not there": (
        "prod", lambda d: d["ScaledObject/generator-worker-l4"]["spec"]["triggers"][0]["metadata"]
        .update(valueLocation="workers"), "gives no workers"),
    "an autoscaler on the wrong port": (
        "prod", lambda d: d["ScaledObject/generator-worker-l4"]["spec"]["triggers"][0]["metadata"]
        .update(url="http://generator-api.synthrep.svc:8080/v1/scale"), "does not listen"),
    "pools that ask for all the work each": (
        "prod", lambda d: d["ScaledObject/generator-worker-l4"]["spec"]["triggers"][0]["metadata"]
        .update(targetValue="1"), "pools together"),
    "an API that stops listening at once": (
        "prod", lambda d: _container("Deployment/trainer-api")(d).pop("lifecycle"),
        "refuses requests"),
    "a fast scale-down": (
        "prod", lambda d: d["ScaledObject/generator-worker-l4"]["spec"]["advanced"]
        ["horizontalPodAutoscalerConfig"]["behavior"]["scaleDown"]
        .update(stabilizationWindowSeconds=0), "faster than one pod"),
    "a pool of jobs that never end": (
        "prod", lambda d: _container(SPOT)(d).pop("env"), "never end"),
    "a pool of jobs by the default strategy": (
        "prod", lambda d: d[SPOT]["spec"].pop("scalingStrategy"), "accurate"),
    "a quota below the pools": (
        "prod", lambda d: d["ResourceQuota/synthrep"]["spec"]["hard"].update(
            {"requests.nvidia.com/gpu": "8"}), "admits less"),
    "a claim that is mounted nowhere": (
        "gpu", lambda d: d["StatefulSet/redis"]["spec"]["volumeClaimTemplates"][0][
            "metadata"].update(name="aof"), "mounts differ"),
    "a volume that is not there": (
        "gpu", lambda d: d.pop("PersistentVolumeClaim/data"), "no PersistentVolumeClaim data"),
    "an API that is gone while Redis is": (
        "prod", lambda d: _container("Deployment/generator-api")(d)["readinessProbe"].update(
            httpGet={"path": "/readyz", "port": "http"}), "end its answers"),
    "a probe that looks elsewhere": (
        "gpu", lambda d: d["ConfigMap/generator"]["data"].update(
            SYNTHREP_GENERATOR_HEARTBEAT="/tmp/beat"), "looks at /tmp/heartbeat"),
}  # fmt: skip


@pytest.mark.parametrize("what", MUTATIONS)
def test_a_broken_copy_is_refused(what):
    overlay, mutate, words = MUTATIONS[what]
    found = _by_title(kustomize(f"overlays/{overlay}"))
    mutate(found)
    refused = findings(list(found.values()))
    assert any(words in finding for finding in refused), refused


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("--module -- synthrep", "--module synthrep", "--run-path"),
        ("--nnodes=2", "--nnodes=3", "another number of hosts"),
        ("training-0.training", "training.synthrep", "meet nowhere"),
    ],
)
def test_a_broken_training_is_refused(old, new, words):
    documents = kustomize("training/job")
    (job,) = of_kind(documents, "Job")
    command = pod_template(job)["spec"]["containers"][0]["command"]
    command[-1] = command[-1].replace(old, new)
    assert any(words in finding for finding in findings(documents))
