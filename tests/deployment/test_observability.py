"""Alarms and dashboards ask for series that the services give, and ask in valid PromQL."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, get_args

import promql_parser
import pytest
import torch
import yaml
from prometheus_client import CollectorRegistry, generate_latest
from starlette.testclient import TestClient

from synthrep_generator import api as generator_api
from synthrep_generator.queues import QueueView
from synthrep_generator.reconciler import SweepFigures
from synthrep_generator.settings import GeneratorSettings
from synthrep_generator.worker_figures import STATES as WORKER_STATES
from synthrep_generator.worker_figures import WorkerFigures
from synthrep_shared.messages import PromptCounts
from synthrep_shared.messages.fields import State
from synthrep_trainer import api as trainer_api
from synthrep_trainer.launcher import Launcher
from synthrep_trainer.settings import TrainerSettings
from synthrep_trainer.training_figures import TrainingFigures
from tests.deployment.render import PROFILES, REPOSITORY, compose, kustomize, of_kind

ALERTS = yaml.safe_load((REPOSITORY / "deploy/compose/alerts.yml").read_text())
DASHBOARDS = sorted((REPOSITORY / "k8s/components/monitoring/dashboards").glob("*.json"))
STATES_OF = {
    "synthrep_generator_prompts": set(PromptCounts.model_fields) - {"accepted", "running"},
    "synthrep_generator_workers": set(WORKER_STATES),
    "synthrep_trainer_runs": set(get_args(State)),
}
_ENDINGS = ("total", "bucket", "sum", "count")
RULES = [rule for group in ALERTS["groups"] for rule in group["rules"]]


class IdleBacklog:
    """A Redis with nothing in it."""

    def queue_view(self):
        return QueueView(depth=0, running=0)

    def running_prompts(self):
        return {}

    def workers(self):
        return []

    def nudge(self):
        pass


class NoWaits:
    """A stream that has not waited."""

    ratio_waits, ratio_wait_s = 0, 0.0


def answered(app) -> str:
    with TestClient(app) as client:
        return client.get("/metrics").text


def names(text: str) -> Iterator[str]:
    for name, kind in re.findall(r"^# TYPE (\S+) (\S+)$", text, re.M):
        yield name
        if kind == "histogram":
            yield from (f"{name}_{part}" for part in ("bucket", "sum", "count"))


def labels_of(*registries: CollectorRegistry) -> dict[str, set[str]]:
    """The labels of each series, whether it has a value yet or not."""
    found: dict[str, set[str]] = {}
    for registry in registries:
        for collector in registry._collector_to_names:
            own = getattr(collector, "_labelnames", ())
            for family in collector.collect():
                labels = {*own, *getattr(family, "_labelnames", ())}
                for name in (family.name, *(f"{family.name}_{e}" for e in _ENDINGS)):
                    found[name] = labels
    return found


def app_of(service):
    while not hasattr(service, "state"):  # behind what is wrapped around it
        service = service._app
    return service


@pytest.fixture(scope="module")
def labels(tmp_path_factory) -> dict[str, set[str]]:
    folder = tmp_path_factory.mktemp("labels")
    settings = TrainerSettings(root=folder / "data", runs=folder / "runs")
    generator = generator_api.create_app(GeneratorSettings(root=folder / "data"), IdleBacklog())
    training = TrainingFigures("r1", torch.device("cpu"), rank=0, stream=NoWaits())
    return labels_of(
        app_of(generator).state.registry,
        app_of(trainer_api.create_app(settings)).state.registry,
        WorkerFigures().registry,
        SweepFigures().registry,
        Launcher(settings).registry,
        training.registry,
    )


@pytest.fixture(scope="module")
def series(tmp_path_factory) -> set[str]:
    folder = tmp_path_factory.mktemp("metrics")
    settings = TrainerSettings(root=folder / "data", runs=folder / "runs")
    generator = generator_api.create_app(GeneratorSettings(root=folder / "data"), IdleBacklog())
    training = TrainingFigures("r1", torch.device("cpu"), rank=0, stream=NoWaits())
    texts = [answered(generator), answered(trainer_api.create_app(settings))]
    for registry in (
        WorkerFigures().registry,
        SweepFigures().registry,
        Launcher(settings).registry,
        training.registry,
    ):
        texts.append(generate_latest(registry).decode())
    return {name for text in texts for name in names(text)}


def selectors(node: Any) -> Iterator[Any]:
    """The series that an expression asks for."""
    if isinstance(node, promql_parser.VectorSelector):
        yield node
    for part in ("lhs", "rhs", "expr", "vector_selector"):
        yield from selectors(getattr(node, part, None)) if hasattr(node, part) else ()
    for argument in getattr(node, "args", ()):
        yield from selectors(argument)


def strangers(expression: str, labels: dict[str, set[str]]) -> Iterator[str]:
    """Series, labels and states in an expression that nothing gives, so that it is never true."""
    tree = promql_parser.parse(expression)
    found = list(selectors(tree))
    known: set[str] = set()
    for selector in found:
        own = {"instance", "job"} | labels.get(selector.name, {"le"})
        known |= own | ({"le"} if selector.name.endswith("_bucket") else set())
        if selector.name != "up" and selector.name not in labels:
            yield selector.name
        for matcher in selector.matchers.matchers:
            if matcher.name not in own:
                yield f"{selector.name}: {matcher.name}"
            states = STATES_OF.get(selector.name, set())
            if matcher.name == "state" and not states >= set(matcher.value.split("|")):
                yield f"{selector.name}: {matcher.value}"
    for group in re.findall(r"\bby \(([^)]*)\)", expression):
        yield from sorted({name.strip() for name in group.split(",")} - known)


def expressions() -> Iterator[tuple[str, str]]:
    for rule in RULES:
        yield rule["alert"], rule["expr"]
    for path in DASHBOARDS:
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel["targets"]:
                yield f"{path.name}: {panel['title']}", target["expr"]


@pytest.mark.parametrize(("where", "expression"), list(expressions()))
def test_what_is_asked_for_is_valid_and_exists(series, where, expression):
    promql_parser.parse(expression)
    asked = set(re.findall(r"synthrep_(?:generator|trainer)_\w+", expression))
    assert asked, where
    assert asked <= series, where


@pytest.mark.parametrize(("where", "expression"), list(expressions()))
def test_labels_that_are_asked_for_are_given(labels, where, expression):
    assert list(strangers(expression, labels)) == [], where


@pytest.mark.parametrize(
    ("expression", "stranger"),
    [
        ("sum(synthrep_generator_prompts{status='failed'}) > 0", "status"),
        ("sum(synthrep_generator_prompts{state='waiting'}) > 0", "waiting"),
        ("max by (runs) (synthrep_trainer_run_loss) > 1", "runs"),
        ("min(synthrep_redis_up) == 0", "synthrep_redis_up"),
        ("max(synthrep_trainer_probe_value{probe='digits'})", "probe"),
    ],
)
def test_an_expression_that_is_never_true_is_refused(labels, expression, stranger):
    assert any(stranger in found for found in strangers(expression, labels))


def test_legends_name_labels_that_are_left():
    for path in DASHBOARDS:
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel["targets"]:
                groups = re.findall(r"\bby \(([^)]*)\)", target["expr"])
                left = {name.strip() for group in groups[:1] for name in group.split(",")}
                named = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
                assert named <= left, panel["title"]


def test_alarms_are_the_same_on_one_machine_and_in_a_cluster():
    (rules,) = of_kind(kustomize("overlays/prod"), "PrometheusRule")
    assert rules["spec"] == ALERTS


def test_every_alarm_says_what_to_do():
    assert len(RULES) >= 10
    for rule in RULES:
        assert rule["labels"]["severity"] in ("warning", "critical"), rule["alert"]
        assert rule["annotations"].keys() == {"summary", "action"}, rule["alert"]


def test_dashboards_are_provisioned_on_one_machine_and_in_a_cluster():
    (dashboard,) = [d for d in of_kind(kustomize("overlays/prod"), "ConfigMap")
                    if d["metadata"]["labels"].get("grafana_dashboard")]  # fmt: skip
    assert list(dashboard["data"]) == [path.name for path in DASHBOARDS]
    grafana = compose(["observe"])["services"]["grafana"]
    mounted = {v["target"]: v["source"] for v in grafana["volumes"] if v["type"] == "bind"}
    assert mounted["/etc/grafana/dashboards"].endswith("k8s/components/monitoring/dashboards")
    provider = REPOSITORY / "deploy/compose/grafana/dashboards/synthrep.yml"
    (found,) = yaml.safe_load(provider.read_text())["providers"]
    assert found["options"]["path"] == "/etc/grafana/dashboards"


def test_prometheus_scrapes_every_service_with_the_key_that_reads_figures():
    config = yaml.safe_load((REPOSITORY / "deploy/compose/prometheus.yml").read_text())
    services = compose(["observe"])["services"]
    jobs = {job["job_name"]: job for job in config["scrape_configs"]}
    for name in ("generator-api", "trainer-api"):
        (target,) = jobs[name]["static_configs"][0]["targets"]
        host, _, port = target.partition(":")
        assert str(services[host]["ports"][0]["target"]) == port
        assert jobs[name]["authorization"]["credentials_file"] == "/run/synthrep/metrics-key"


def test_prometheus_finds_every_process_that_is_no_api():
    config = yaml.safe_load((REPOSITORY / "deploy/compose/prometheus.yml").read_text())
    whole = compose(PROFILES)
    assert whole["networks"]["watch"]["internal"] is True
    asked: set[tuple[str, int]] = set()
    for job in config["scrape_configs"]:
        for found in job.get("dns_sd_configs", ()):
            asked |= {(name, found["port"]) for name in found["names"]}
        for found in job.get("static_configs", ()):
            asked |= {(h, int(p)) for h, _, p in (t.partition(":") for t in found["targets"])}
    expected = set()
    for name, service in whole["services"].items():
        kind = name.partition("-")[0]
        if kind not in ("generator", "trainer") or name.endswith("-api"):
            continue
        assert "watch" in service["networks"], name
        first = int(service["environment"][f"SYNTHREP_{kind.upper()}_METRICS_PORT"])
        settings = TrainerSettings(metrics_port=first)
        ports = [*settings.metrics_ports()]
        if kind == "trainer":
            ports += [*settings.metrics_ports_of_runs, *settings.metrics_ports_of_probes]
        expected |= {(name, port) for port in ports}
    assert expected
    assert expected <= asked
    assert "watch" in whole["services"]["prometheus"]["networks"]
    known = whole["services"].keys() | {"localhost"}
    assert {name for name, _ in asked} <= known


@pytest.mark.parametrize("what", [
    "oldest_unfinished", "workers_wanted", 'state="failed"', "generated_per_trained",
    "disk_reserve", "skipped_steps", "probe_value", "absent(",
])  # fmt: skip
def test_an_alarm_watches(what):
    """Queue age, no worker while work waits, failures, ratio, disk, loss, probes, silence."""
    assert any(what in rule["expr"] for rule in RULES)
