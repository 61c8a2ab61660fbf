"""How pools grow, shrink and are replaced without loss, and how training is laid over hosts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import get_type_hints

from synthrep_generator.routes_service import router
from synthrep_generator.settings import GeneratorSettings
from synthrep_shared.messages import QueueView, ScaleView
from synthrep_trainer.settings import TrainerSettings
from tests.deployment.render import (
    Document,
    environment,
    kustomize,
    of_kind,
    pod_template,
    pods,
    title,
)

_FIGURES = {"/v1/scale": ScaleView, "/v1/queue": QueueView}
_CALM_S = 300
_DEPARTURE_S = 5
_UNITS = {"": 1, "m": Fraction(1, 1000), "Mi": 1 << 20, "Gi": 1 << 30}


def grace(documents: Sequence[Document]) -> Iterator[str]:
    """A pod is given the time that its service takes to end well."""
    for name, template in pods(documents):
        given_s = template["spec"].get("terminationGracePeriodSeconds", 30)
        found = environment(template, documents)
        if "generator-worker" in name:
            limit_s = float(found.get("SYNTHREP_GENERATOR_JOB_LIMIT_S", _default("job_limit_s")))
            if given_s <= limit_s:
                yield f"{name}: a grace of {given_s} s is no longer than a job of {limit_s:g} s"
        if name.startswith(("Deployment/trainer", "Job/training", "JobSet/training")) and (
            "api" not in name
        ):
            default = TrainerSettings.model_fields["grace_s"].default
            limit_s = float(found.get("SYNTHREP_TRAINER_GRACE_S", default))
            if given_s <= limit_s:
                yield f"{name}: a grace of {given_s} s is no longer than a checkpoint's {limit_s:g}"


def departures(documents: Sequence[Document]) -> Iterator[str]:
    """What a Service leads to goes on listening until the Service knows that it leaves."""
    for document in of_kind(documents, "Deployment"):
        template = document["spec"]["template"]
        container = template["spec"]["containers"][0]
        hook = container.get("lifecycle", {}).get("preStop", {})
        is_asked = any(port["name"] == "http" for port in container.get("ports", ()))
        if is_asked and hook.get("sleep", {}).get("seconds", 0) < _DEPARTURE_S:
            yield f"{title(document)}: a rollout refuses requests"


def _default(field: str) -> float:
    return float(GeneratorSettings.model_fields[field].default)


def gpu_pools(documents: Sequence[Document]) -> Iterator[str]:
    """A full pool can be rolled, and pods with a GPU reach nodes that have one."""
    for document in documents:
        template = pod_template(document)
        if template is None:
            continue
        name, spec = title(document), template["spec"]
        is_worker = "generator-worker" in name
        has_gpu = "nvidia.com/gpu" in spec["containers"][0]["resources"]["limits"]
        if document["kind"] == "Deployment" and (is_worker or has_gpu):
            strategy = document["spec"].get("strategy", {})
            surge = strategy.get("rollingUpdate", {}).get("maxSurge")
            if strategy.get("type") != "Recreate" and surge != 0:
                yield f"{name}: a rollout would wait for a GPU that its old pods hold"
        keys = {t.get("key") for t in spec.get("tolerations", ())}
        if has_gpu != ("nvidia.com/gpu" in keys) or has_gpu != ("nodeSelector" in spec):
            yield f"{name}: GPU, toleration and nodeSelector go together"


def triggers(documents: Sequence[Document]) -> Iterator[str]:
    """Autoscalers ask for a figure that the API gives, with a key, and do not end busy workers."""
    services = {d["metadata"]["name"]: d for d in of_kind(documents, "Service")}
    logins = {d["metadata"]["name"] for d in of_kind(documents, "TriggerAuthentication")}
    paths = {getattr(route, "path", "") for route in router.routes}
    for document in of_kind(documents, "ScaledObject", "ScaledJob"):
        name = title(document)
        for trigger in document["spec"]["triggers"]:
            facts = trigger["metadata"]
            match = re.fullmatch(r"http://([a-z-]+)\.synthrep\.svc:(\d+)(/.*)", facts["url"])
            if not match or match[1] not in services:
                yield f"{name}: {facts['url']} is no service"
                continue
            if int(match[2]) not in {p["port"] for p in services[match[1]]["spec"]["ports"]}:
                yield f"{name}: {match[1]} does not listen on {match[2]}"
            figure = _FIGURES.get(match[3])
            if match[3] not in paths or figure is None:
                yield f"{name}: the API has no figure {match[3]}"
            elif facts["valueLocation"] not in get_type_hints(figure):
                yield f"{name}: {match[3]} gives no {facts['valueLocation']}"
            if facts.get("authMode") != "bearer" or (
                trigger.get("authenticationRef", {}).get("name") not in logins
            ):
                yield f"{name}: the API wants a bearer key"


def scaled_objects(documents: Sequence[Document]) -> Iterator[str]:
    """Pools of Deployments: by the figure that counts running work, slowly downwards."""
    deployments = {d["metadata"]["name"]: d for d in of_kind(documents, "Deployment")}
    shares = Fraction(0)
    for document in of_kind(documents, "ScaledObject"):
        name, spec = title(document), document["spec"]
        target = deployments.get(spec["scaleTargetRef"]["name"])
        if target is None:
            yield f"{name}: there is no Deployment {spec['scaleTargetRef']['name']}"
        elif "replicas" in target["spec"]:
            yield f"{name}: each apply would reset the replicas"
        for trigger in spec["triggers"]:
            if not trigger["metadata"]["url"].endswith("/v1/scale"):
                yield f"{name}: the figure leaves out running work, so busy workers would be ended"
            shares += 1 / Fraction(trigger["metadata"]["targetValue"])
        down = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]["scaleDown"]
        is_slow = [(p["type"], p["value"], p["periodSeconds"]) for p in down["policies"]]
        if is_slow != [("Pods", 1, 60)] or down["stabilizationWindowSeconds"] < _CALM_S:
            yield f"{name}: scales down faster than one pod a minute"
        if spec.get("cooldownPeriod", 0) < _CALM_S:
            yield f"{name}: goes to zero too soon"
    if shares not in (0, 1):
        yield f"the pools together ask for {shares} of the workers wanted"


def scaled_jobs(documents: Sequence[Document]) -> Iterator[str]:
    """Pools of jobs: by the figure of waiting work, and each job ends by itself."""
    for document in of_kind(documents, "ScaledJob"):
        name, spec = title(document), document["spec"]
        template = pod_template(document)
        assert template is not None
        if spec.get("scalingStrategy", {}).get("strategy") != "accurate":
            yield f"{name}: only `accurate` adds the jobs in hand to those that wait"
        if any(t["metadata"]["url"].endswith("/v1/scale") for t in spec["triggers"]):
            yield f"{name}: the figure counts running work, which `accurate` adds once more"
        if float(environment(template, documents).get("SYNTHREP_GENERATOR_IDLE_EXIT_S", 0)) <= 0:
            yield f"{name}: its workers never end"
        if spec.get("rollout", {}).get("strategy") != "gradual":
            yield f"{name}: a change would end running jobs"


def quotas(documents: Sequence[Document]) -> Iterator[str]:
    """The namespace's quota admits every pool at its largest, and a training over hosts beside."""
    largest = {d["spec"]["scaleTargetRef"]["name"]: d["spec"]["maxReplicaCount"]
               for d in of_kind(documents, "ScaledObject")}  # fmt: skip
    wanted: dict[str, Fraction] = {}
    trainings = kustomize("training/job") if largest else []
    for document in (*documents, *trainings):
        template = pod_template(document)
        if template is None:
            continue
        spec = document["spec"]
        count = largest.get(document["metadata"]["name"], spec.get("replicas", 1))
        count = spec.get("maxReplicaCount", spec.get("parallelism", count))
        requests = template["spec"]["containers"][0]["resources"]["requests"]
        for key, value in requests.items():
            wanted[key] = wanted.get(key, Fraction(0)) + count * _amount(value)
    for quota in of_kind(documents, "ResourceQuota"):
        hard = quota["spec"]["hard"]
        for key, amount in wanted.items():
            if key != "ephemeral-storage" and (
                f"requests.{key}" not in hard or _amount(hard[f"requests.{key}"]) < amount
            ):
                yield f"{title(quota)}: requests.{key} admits less than {float(amount):g}"


def _amount(quantity: str | int) -> Fraction:
    match = re.fullmatch(r"(\d+)(m|Mi|Gi)?", str(quantity))
    assert match, quantity
    return Fraction(int(match[1])) * _UNITS[match[2] or ""]


def training(documents: Sequence[Document]) -> Iterator[str]:
    """As many hosts as torchrun waits for, met at the first pod; flags before the module."""
    for document in of_kind(documents, "Job", "JobSet"):
        if document["metadata"]["name"] != "training":
            continue
        name, spec = title(document), document["spec"]
        template = pod_template(document)
        assert template is not None
        job = spec if document["kind"] == "Job" else spec["replicatedJobs"][0]["template"]["spec"]
        command = " ".join(template["spec"]["containers"][0]["command"])
        if f"--nnodes={job['completions']} " not in command or (
            job["completions"] != job["parallelism"] or job["completionMode"] != "Indexed"
        ):
            yield f"{name}: torchrun waits for another number of hosts"
        if " --module -- synthrep_trainer.train --run " not in command:
            yield f"{name}: torchrun would take --run for its own --run-path"
        first = "training-0" if document["kind"] == "Job" else "training-host-0-0"
        if f"--rdzv-endpoint={first}.training:29400" not in command or "is_host=" not in command:
            yield f"{name}: the ranks meet nowhere"
        rules = job["podFailurePolicy"]["rules"]
        if rules[0] != {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]}:
            yield f"{name}: a drained node counts as a failure"
