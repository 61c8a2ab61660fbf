"""Alarms and dashboards ask for series that the services give, and ask in valid PromQL."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import promql_parser
import pytest
import torch
import yaml
from prometheus_client import generate_latest
from starlette.testclient import TestClient

from synthrep_generator import api as generator_api
from synthrep_generator.queues import QueueView
from synthrep_generator.reconciler import SweepFigures
from synthrep_generator.settings import GeneratorSettings
from synthrep_generator.worker_figures import WorkerFigures
from synthrep_trainer import api as trainer_api
from synthrep_trainer.launcher import Launcher
from synthrep_trainer.settings import TrainerSettings
from synthrep_trainer.training_figures import TrainingFigures
from tests.deployment.render import PROFILES, REPOSITORY, compose, kustomize, of_kind

ALERTS = yaml.safe_load((REPOSITORY / "deploy/compose/alerts.yml").read_text())
DASHBOARDS = sorted((REPOSITORY / "k8s/components/monitoring/dashboards").glob("*.json"))
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
    "disk_reserve", "skipped_steps", "probe_value",
])  # fmt: skip
def test_an_alarm_watches(what):
    """Queue age, no worker while work waits, failures, ratio, disk, loss, probes."""
    assert any(what in rule["expr"] for rule in RULES)
