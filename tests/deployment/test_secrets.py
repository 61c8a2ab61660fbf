"""The secrets that a stack makes for itself are what its services take."""

from __future__ import annotations

import stat
import subprocess
import sys

import pytest

from synthrep_generator.settings import GeneratorSettings
from synthrep_shared.keys import KeyRing
from tests.deployment.render import REPOSITORY, compose, kustomize, pods


def make(folder):
    script = [sys.executable, str(REPOSITORY / "deploy/compose/init.py"), str(folder)]
    return subprocess.run(script, capture_output=True, text=True, check=True).stdout


def read(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_they_are_made_once_and_kept(tmp_path):
    assert "docker compose exec generator-api cat /run/synthrep/api-key" in make(tmp_path)
    first = read(tmp_path)
    (tmp_path / "redis-url").unlink()
    make(tmp_path)
    assert read(tmp_path) == first


def test_no_two_stacks_share_one_and_output_shows_none(tmp_path):
    texts = [make(tmp_path / name) for name in "ab"]
    a, b = (read(tmp_path / name) for name in "ab")
    assert [name for name in a if a[name] == b[name]] == []
    assert not any(secret in text for text in texts for secret in a.values())


def test_only_the_owner_reads_them(tmp_path):
    make(tmp_path)
    for path in tmp_path.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o400


def test_the_services_take_them(tmp_path, monkeypatch):
    make(tmp_path)
    monkeypatch.setenv("SYNTHREP_GENERATOR_HOST", "0.0.0.0")
    monkeypatch.setenv("SYNTHREP_GENERATOR_API_KEYS_FILE", str(tmp_path / "api-keys.json"))
    monkeypatch.setenv("SYNTHREP_GENERATOR_REDIS_URL_FILE", str(tmp_path / "redis-url"))
    settings = GeneratorSettings()
    password = (tmp_path / "redis-password").read_text()
    assert settings.redis_url.get_secret_value() == f"redis://:{password}@redis:6379/0"
    ring = KeyRing(settings.api_keys)
    operator, metrics = (
        ring.find(b"Bearer " + (tmp_path / name).read_bytes())
        for name in ("api-key", "metrics-key")
    )
    assert operator.is_admin
    assert metrics.sees_all
    assert metrics.scopes == {"read"}
    assert ring.find(b"Bearer guess") is None


@pytest.mark.parametrize("overlay", ["overlays/gpu", "overlays/prod"])
def test_pods_and_containers_read_files_that_are_made(tmp_path, overlay):
    make(tmp_path)
    made = read(tmp_path).keys()
    for _, template in pods(kustomize(overlay)):
        for volume in template["spec"]["volumes"]:
            assert {i["key"] for i in volume.get("secret", {}).get("items", ())} <= made
    for service in compose(["*"])["services"].values():
        for value in (service.get("environment") or {}).values():
            if value.startswith("/run/synthrep/"):
                assert value.removeprefix("/run/synthrep/") in made
