"""Base images where no registry answers: Debian's packages under the names of the real ones.

What they are not: the same bytes. Python is Debian's 3.11 and Redis Debian's 7.0; torch, which has
to come from somewhere, is copied from this environment, so that a worker's image is larger here.
As in the real one, `/data` of Redis' image belongs to a user of its own.
"""

from __future__ import annotations

import os
import re
import shutil
import sysconfig
import tempfile
from pathlib import Path

import yaml

from tests.compose.engine import REPOSITORY, Engine, run, say

TORCH_IMAGE = "synthrep-standin/python-torch:1"
_DEBIAN = "synthrep-standin/debian:1"
_CERTIFICATES = Path(os.environ.get("PIP_CERT", "/etc/ssl/certs/ca-certificates.crt"))
_TORCH = re.compile(r"(torch|torchvision|torchgen|functorch|triton|nvidia|cuda)([._-].*)?", re.I)
_PYTHON = f"""
FROM {_DEBIAN}
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends \\
      python3 python3-venv python3-pip && rm -rf /var/lib/apt/lists/* \\
    && rm -f /usr/lib/python3*/EXTERNALLY-MANAGED \\
    && ln -s /usr/bin/python3 /usr/local/bin/python
COPY certificates.crt /etc/ssl/certs/ca-certificates.crt
RUN printf '[global]\\ncert = /etc/ssl/certs/ca-certificates.crt\\n' > /etc/pip.conf
"""
_REDIS = f"""
FROM {_DEBIAN}
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends redis-server \\
    && rm -rf /var/lib/apt/lists/* && install -d -o redis -g redis /data
VOLUME /data
"""


def base_images(engine: Engine) -> dict[str, str]:
    """Sees to the base images; build arguments by target, empty where the real ones are here."""
    python, redis = _names()
    if not _is_reachable(engine, redis):
        say("no image registry answers: Debian's packages stand in for the base images")
        with tempfile.TemporaryDirectory() as folder:
            _build(engine, Path(folder), python, redis)
        return {"worker": TORCH_IMAGE, "train": TORCH_IMAGE}
    return {}


def _names() -> tuple[str, str]:
    recipe = (REPOSITORY / "services/generator/Dockerfile").read_text()
    (python,) = re.findall(r"^ARG PYTHON_IMAGE=(\S+)$", recipe, re.M)
    compose = yaml.safe_load((REPOSITORY / "docker-compose.yml").read_text())
    return python, compose["services"]["redis"]["image"]


def _is_reachable(engine: Engine, image: str) -> bool:
    if engine.has_image(_DEBIAN):
        return False
    return run(engine.client, "pull", "-q", image, limit_s=300, check=False).returncode == 0


def _build(engine: Engine, folder: Path, python: str, redis: str) -> None:
    if not engine.has_image(_DEBIAN):
        root = folder / "debian"
        run("debootstrap", "--variant=minbase", "--include=ca-certificates", "bookworm", str(root),
            limit_s=600)  # fmt: skip
        run("sh", "-c", f"tar -C {root} -c . | {engine.client} import - {_DEBIAN}", limit_s=300)
        shutil.rmtree(root)
    context = folder / "context"
    context.mkdir()
    shutil.copy(_CERTIFICATES, context / "certificates.crt")
    for image, recipe in ((python, _PYTHON), (redis, _REDIS)):
        if not engine.has_image(image):
            (context / "Dockerfile").write_text(recipe)
            engine.docker("build", "-q", "-t", image, str(context), limit_s=600)
    if not engine.has_image(TORCH_IMAGE):
        _add_torch(engine, python)


def _add_torch(engine: Engine, python: str) -> None:
    """Copy torch from this environment; pip finds it by PYTHONPATH and leaves it as it is."""
    packages = Path(sysconfig.get_paths()["purelib"])
    names = sorted(p.name for p in packages.iterdir() if _TORCH.fullmatch(p.name))
    copy = "mkdir -p /opt/torch && cd /from && cp -a " + " ".join(names) + " /opt/torch/"
    container = "synthrep-standin-torch"
    engine.docker("rm", "-f", container, check=False)
    engine.docker("run", "--name", container, "-v", f"{packages}:/from:ro", python,
                  "sh", "-c", copy, limit_s=900)  # fmt: skip
    change = ("--change", "ENV PYTHONPATH=/opt/torch", "--change", 'CMD ["python"]')
    engine.docker("commit", *change, container, TORCH_IMAGE, limit_s=900)
    engine.docker("rm", container)
