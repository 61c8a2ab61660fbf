"""The compose file: whole in every combination, hardened, and closed but for what is published."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest

from tests.deployment.compose_rules import wiring
from tests.deployment.pod_rules import SERVICES
from tests.deployment.render import PROFILES, REPOSITORY, compose, tool

GPU_OFF = {"SYNTHREP_CPU_REPLICAS": "0"}
_SECRET_WORDS = re.compile("password|secret|token|_key$", re.IGNORECASE)


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    return compose(PROFILES)["services"]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "profiles", [c for n in range(4) for c in itertools.combinations(PROFILES, n)], ids=str
)
def test_every_combination_of_profiles_is_whole(profiles):
    found = compose(profiles, SYNTHREP_ROOT="s3://synthrep/data")["services"]
    assert ("s3" in found) == ("s3" in profiles)
    for name, service in found.items():
        for needed, how in service.get("depends_on", {}).items():
            assert needed in found or how["required"] is False, name


def test_it_starts_with_no_profile_and_no_edit():
    assert compose()["services"].keys() == {
        "init", "redis", "generator-api", "generator-reconciler", "generator-worker",
        "trainer-api", "trainer",
    }  # fmt: skip


def test_an_unknown_key_is_an_error(tmp_path):
    text = (REPOSITORY / "docker-compose.yml").read_text()
    broken = tmp_path / "docker-compose.yml"
    broken.write_text(text.replace("    stop_grace_period: 30s", "    stop_grace_perod: 30s"))
    result = tool("docker-compose", "-f", str(broken), "config", "-q")
    assert result.returncode != 0
    assert "stop_grace_perod" in result.stderr


def test_redis_is_reached_from_inside_alone(services):
    assert "ports" not in services["redis"]
    assert services["redis"]["networks"].keys() == {"back"}
    assert compose()["networks"]["back"]["internal"] is True
    for name in ("trainer-api", "trainer", "prometheus", "grafana", "s3"):
        assert "back" not in services[name]["networks"], name


def test_ports_are_published_on_loopback_only(services):
    published = [p for s in services.values() for p in s.get("ports", ())]
    assert len(published) == 4
    assert {port["host_ip"] for port in published} == {"127.0.0.1"}


def test_every_container_is_locked_down(services):
    for name, service in services.items():
        assert service["user"] == "10001:10001", name
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert "cap_add" not in service, name
        assert "privileged" not in service, name
        assert not any("docker.sock" in str(v) for v in service.get("volumes", ())), name


def test_every_container_has_limits(services):
    for name, service in services.items():
        assert service["deploy"]["resources"]["limits"].keys() == {"cpus", "memory", "pids"}, name
        assert service["logging"]["options"].keys() == {"max-size", "max-file"}, name


def test_images_are_pinned(services):
    for name, service in services.items():
        image, _, tag = service["image"].rpartition(":")
        assert image, name
        assert re.search(r"\d+\.\d+", tag), name


def test_secrets_come_in_files(services):
    for name, service in services.items():
        for variable, value in (service.get("environment") or {}).items():
            if _SECRET_WORDS.search(variable) and value:
                assert value.startswith("/run/synthrep/"), f"{name}: {variable}"
        for volume in service.get("volumes", ()):
            if volume["target"] == "/run/synthrep" and name != "init":
                assert volume.get("read_only") is True, name


def test_services_read_what_they_are_given(services):
    for name, service in services.items():
        for variable in service.get("environment") or {}:
            for prefix, settings in SERVICES.items():
                if variable.startswith(prefix):
                    field = variable.removeprefix(prefix).lower().removesuffix("_file")
                    assert field in settings.model_fields, f"{name}: {variable}"


def test_starts_wait_for_health_and_init(services):
    for name, service in services.items():
        if name in ("init", "models-pull"):
            continue
        assert service["healthcheck"]["test"], name
        seen, reached = {name}, False
        while seen:
            needed = services[seen.pop()].get("depends_on", {})
            reached = reached or "init" in needed
            seen |= {n for n, how in needed.items() if how["condition"] == "service_healthy"}
        assert reached, f"{name} may start before its secrets are there"


def test_workers_and_runs_may_end_well(services):
    workers = [n for n in services if n.startswith("generator-worker")]
    limit_s = SERVICES["SYNTHREP_GENERATOR_"].model_fields["job_limit_s"].default
    assert workers
    for name in workers:
        assert _seconds(services[name]["stop_grace_period"]) > limit_s, name
    grace_s = SERVICES["SYNTHREP_TRAINER_"].model_fields["grace_s"].default
    for name in ("trainer", "trainer-gpu"):
        assert _seconds(services[name]["stop_grace_period"]) > grace_s, name
        assert "shm_size" in services[name], name


def _seconds(text: str) -> float:
    units = {"h": 3600, "m": 60, "s": 1}
    return sum(float(n) * units[u] for n, u in re.findall(r"([\d.]+)([hms])", text))


def test_the_profile_gpu_reserves_devices_and_leaves_the_cpu_out():
    services = compose(["gpu"], **GPU_OFF)["services"]
    for name in ("generator-worker-gpu", "trainer-gpu"):
        (device,) = services[name]["deploy"]["resources"]["reservations"]["devices"]
        assert device["capabilities"] == ["gpu"]
        assert services[name]["build"]["args"] == {"TORCH_INDEX_URL": ""}
    for name in ("generator-worker", "trainer"):
        assert services[name]["deploy"]["replicas"] == 0
    assert services["models-pull"]["command"] == ["synthrep", "models", "pull", "sd15"]


def test_every_volume_belongs_to_the_user_from_the_first_start(services):
    """Init mounts each one where its image has a folder of the user's, and runs before all."""
    mounted = {v["source"]: v["target"] for v in services["init"]["volumes"]
               if v["type"] == "volume"}  # fmt: skip
    assert mounted.keys() == compose(PROFILES)["volumes"].keys()
    recipe = (REPOSITORY / "services/generator/Dockerfile").read_text()
    made = recipe.partition("install -d -o 10001 -g 10001 ")[2].partition("ENV ")[0]
    for target in mounted.values():
        assert target.removeprefix("/var/lib/synthrep/") in made.split(), target


def test_no_image_of_others_takes_a_fresh_volume_from_the_user(services):
    """The engine gives an empty volume to the owner of the folder that the image has there."""
    mounts = [(name, mount) for name, service in services.items() if "build" not in service
              for mount in service["volumes"]
              if mount["type"] == "volume" and not mount.get("read_only")]  # fmt: skip
    assert {name for name, _ in mounts} == {"redis", "s3", "prometheus", "grafana"}
    for name, mount in mounts:
        assert mount["volume"].get("nocopy") is True, name


@pytest.mark.parametrize("root", ["", "s3://synthrep/data"])
def test_services_fit_together(root):
    assert list(wiring(compose(PROFILES, SYNTHREP_ROOT=root)["services"])) == []


def _remove(services: dict[str, Any], name: str, key: str, value: str) -> None:
    services[name][key] = [v for v in services[name][key] if value not in str(v)]


@pytest.mark.parametrize(
    ("mutate", "words"),
    [
        (lambda s: _remove(s, "generator-worker", "volumes", "/data"), "nothing can be written"),
        (lambda s: _remove(s, "trainer", "tmpfs", "/tmp"), "HEARTBEAT is"),
        (lambda s: s["trainer-api"]["healthcheck"].update(
            test=["CMD", "http://127.0.0.1:8081/readyz"]), "asks 8081"),
        (lambda s: s["generator-api"]["healthcheck"].update(
            test=["CMD", "http://127.0.0.1:8000/ready"]), "asks 8000/ready"),
        (lambda s: s["trainer"]["environment"].update(SYNTHREP_TRAINER_HEARTBEAT="/tmp/beat"),
         "does not look at /tmp/beat"),
        (lambda s: s["trainer"]["environment"].update(SYNTHREP_TRAINER_ROOT="/tmp/data"),
         "services look for data sets in"),
        (lambda s: s["trainer"]["environment"].pop("AWS_ENDPOINT_URL"), "is not told AWS_ENDPOINT"),
        (lambda s: s["generator-worker"]["networks"].pop("back"), "cannot reach redis"),
        (lambda s: s["trainer"]["networks"].pop("store"), "cannot reach the object store"),
        (lambda s: s["trainer-api"]["environment"].update(
            SYNTHREP_TRAINER_GENERATOR_URL="http://generator:8000"), "nothing answers at"),
        (lambda s: s["redis"]["command"].remove("noeviction"), "would lose work"),
        (lambda s: s["redis"]["command"].remove("yes"), "would lose work"),
    ],
)  # fmt: skip
def test_services_that_do_not_fit_are_refused(mutate, words):
    services = compose(PROFILES)["services"]
    mutate(services)
    found = list(wiring(services))
    assert any(words in finding for finding in found), found
