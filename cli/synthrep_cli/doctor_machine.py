"""What `synthrep doctor` asks of the machine itself.

Each check judges facts that it is given, or the one file or folder that it is named; so a fault can
be shown to it without breaking a machine.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from synthrep_cli.doctor_findings import Finding
from synthrep_shared.storage import publish_bytes, temporary_path

OLDEST_PYTHON = (3, 11)
SHARED_MEMORY = Path("/dev/shm")
_TORCHVISION_AHEAD = 15  # torchvision 0.15 belongs to torch 2.0, 0.16 to 2.1, and so on
_MIN_SHARED_BYTES, _GOOD_SHARED_BYTES = 128 << 20, 1 << 30  # a container has 64 MiB unless told
_GOOD_FREE_BYTES = 10 << 30
_GPU_NODES = ("nvidia[0-9]*", "kfd")
_INSTALL = "install both again: pip install -c constraints.txt torch torchvision"


class Accelerator(NamedTuple):
    """What torch sees, and what there is for it to see."""

    names: tuple[str, ...]
    """GPUs that torch can use."""
    num_nodes: int
    """GPUs that the kernel has."""
    build: str
    """What torch was built for: `CUDA 13.0`, `ROCm 7.0`, `CPU`."""


def check_python(version: tuple[int, ...]) -> Finding:
    """Whether the interpreter is new enough."""
    shown, oldest = (".".join(map(str, v)) for v in (version, OLDEST_PYTHON))
    if version < OLDEST_PYTHON:
        step = f"make .venv again with a newer one: make PYTHON=python{oldest} install"
        return Finding(
            check="Python", state="fail", found=f"{shown} is older than {oldest}", next_step=step
        )
    return Finding(check="Python", state="ok", found=shown)


def installed_versions() -> dict[str, str]:
    """Versions of torch and torchvision, of those that are installed."""
    versions = {}
    for name in ("torch", "torchvision"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def check_torch(versions: Mapping[str, str]) -> Finding:
    """Whether torch and torchvision were made for each other."""
    if "torch" not in versions:
        return Finding(
            check="torch", state="warn", found="not installed: this machine can only ask services",
            next_step="to generate or train here: pip install 'synthrep[up]'",
        )  # fmt: skip
    found = ", ".join(f"{name} {version}" for name, version in versions.items())
    pair = [re.match(r"(\d+)\.(\d+)", versions.get(name, "")) for name in ("torch", "torchvision")]
    builds = {v.partition("+")[2] for v in versions.values() if "+" in v}
    if pair[0] and pair[1]:
        (major, minor), (_, vision) = ((int(m[1]), int(m[2])) for m in pair if m)
        if major == 2 and vision != minor + _TORCHVISION_AHEAD:
            fits = f"0.{minor + _TORCHVISION_AHEAD}"
            return Finding(
                check="torch", state="fail", next_step=_INSTALL,
                found=f"{found}: torch 2.{minor} needs torchvision {fits}",
            )  # fmt: skip
    if len(builds) > 1:
        return Finding(
            check="torch", state="fail", next_step=_INSTALL,
            found=f"{found}: they are built for different devices",
        )  # fmt: skip
    return Finding(check="torch", state="ok", found=found)


def find_accelerators(devices: Path = Path("/dev")) -> Accelerator:
    """Ask torch and the kernel; raises ImportError or OSError if torch does not load."""
    import torch

    version = torch.version
    build = next(
        (f"{kind} {number}" for kind, number in (("CUDA", version.cuda), ("ROCm", version.hip))
         if number),
        "CPU",
    )  # fmt: skip
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    nodes = [node for pattern in _GPU_NODES for node in devices.glob(pattern)]
    return Accelerator(tuple(map(torch.cuda.get_device_name, range(count))), len(nodes), build)


def check_device(wanted: str, accelerator: Accelerator) -> Finding:
    """Whether there is the device that a setting wants: `auto`, `cpu`, `cuda` or `cuda:N`."""
    names, num_nodes, build = accelerator
    number = int(wanted.partition(":")[2] or 0)
    if wanted.startswith("cuda") and number >= len(names):
        return Finding(
            check="device", state="fail",
            found=f"the settings want {wanted}, and torch ({build}) sees {len(names)} GPUs",
            next_step="look at nvidia-smi and CUDA_VISIBLE_DEVICES, or set …_DEVICE=auto",
        )  # fmt: skip
    if wanted != "cpu" and num_nodes and not names:
        return Finding(
            check="device", state="fail",
            found=f"this machine has a GPU, and torch ({build}) cannot use it",
            next_step="look at nvidia-smi and CUDA_VISIBLE_DEVICES; install the torch build that "
            "fits the driver",
        )  # fmt: skip
    if wanted != "cpu" and not names:
        return Finding(
            check="device", state="warn", found="no GPU: the CPU is used",
            next_step="good for the model `tiny`; larger models want a GPU",
        )  # fmt: skip
    return Finding(
        check="device", state="ok", found=", ".join(names) if wanted != "cpu" else "CPU, as set"
    )


def check_disk(name: str, folder: Path, free_bytes: int, reserve_bytes: int) -> Finding:
    """Whether a disk has room, beyond what is kept in reserve."""
    found = f"{_size(free_bytes)} free at {folder}"
    if free_bytes <= reserve_bytes:
        return Finding(
            check=name, state="fail",
            found=f"{found}, and {_size(reserve_bytes)} are kept in reserve: batches are refused",
            next_step="free some space, or name a folder on a larger disk",
        )  # fmt: skip
    if free_bytes < reserve_bytes + _GOOD_FREE_BYTES:
        return Finding(
            check=name, state="warn", found=found,
            next_step="100,000 images of 256 px take about 4 GiB",
        )  # fmt: skip
    return Finding(check=name, state="ok", found=found)


def check_shared_memory(folder: Path, free_bytes: int | None) -> Finding:
    """Whether processes of one run can exchange data; None: there is no such folder."""
    if free_bytes is None or free_bytes < _MIN_SHARED_BYTES:
        size = "is absent" if free_bytes is None else f"has {_size(free_bytes)} free"
        return Finding(
            check="shared memory", state="fail",
            found=f"{folder} {size}: several processes a run fail",
            next_step="in a container: docker run --shm-size=2g, or mount an emptyDir of Memory",
        )  # fmt: skip
    found = f"{_size(free_bytes)} free at {folder}"
    if free_bytes < _GOOD_SHARED_BYTES:
        return Finding(
            check="shared memory", state="warn", found=found,
            next_step="runs over several GPUs want 1 GiB and more",
        )  # fmt: skip
    return Finding(check="shared memory", state="ok", found=found)


def check_writable(name: str, folder: Path) -> Finding:
    """Whether files can be published in a folder, or in the one that it will be made in.

    Tries it: the owner's bits tell nothing about root, read-only mounts and quotas.
    """
    place = nearest_folder(folder)
    trial = temporary_path(place, "doctor")
    try:
        publish_bytes(b"", trial)
        trial.unlink()
    except OSError as error:
        return Finding(
            check=name, state="fail", found=f"{place} cannot be written: {error.strerror or error}",
            next_step=f"give it to user {os.getuid()}, or name another folder",
        )  # fmt: skip
    return Finding(check=name, state="ok", found=f"{place} can be written")


def nearest_folder(path: Path) -> Path:
    """The path itself, or the nearest thing above it that exists."""
    path = path.expanduser().absolute()
    while not os.path.lexists(path):
        path = path.parent
    return path


def free_shared_bytes(folder: Path) -> int | None:
    """Free space there, None where it is no folder."""
    return shutil.disk_usage(folder).free if folder.is_dir() else None


def python_version() -> tuple[int, ...]:
    """The interpreter's, three numbers."""
    return tuple(sys.version_info[:3])


def _size(num_bytes: int) -> str:
    return (
        f"{num_bytes / 2**30:,.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:,.0f} MiB"
    )
