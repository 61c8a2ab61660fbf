"""Brings a model of the catalogue into the cache; the only code that goes to a model hub.

The hub is that of `HF_ENDPOINT`, the token that of `HF_TOKEN`. Files come one by one, each beside
its final name first, so that a pull that was cut off goes on where it stopped. A file whose size
or hash is not what the hub says is refused, and what is longer is cut off there. The disk keeps a
reserve, whatever is declared and sent. The manifest is written last.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HTTPError
from huggingface_hub.file_download import http_get
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import build_hf_headers, tqdm

from synthrep_generator.errors import ModelFilesMissingError, ModelHubError
from synthrep_generator.model_catalogue import LORA_FOLDER, CatalogueEntry
from synthrep_generator.model_files import (
    MANIFEST,
    FileRecord,
    Manifest,
    damaged_files,
    read_manifest,
    wrong_sizes,
)
from synthrep_shared.storage import publish_bytes, sha256_file

_INDEX = "model_index.json"
_TEXTS = (".json", ".txt", ".model")
_PLAIN_WEIGHTS = re.compile(r"^[\w-]+?(-\d{5}-of-\d{5})?\.safetensors$")
_SAFE_NAME = re.compile(r"^(\w[\w-]*/)?\w[\w.-]*$", re.ASCII)  # in the folder, or one below it
_UNUSED_PARTS = frozenset({"safety_checker", "feature_extractor", "image_encoder"})
_PICKLES = (".bin", ".ckpt", ".pt", ".pth")
_PARTIAL = ".part"
_READ_BYTES = 1 << 20
_MAX_INDEX_BYTES = 1 << 20
_RESERVE_BYTES = 1 << 30  # of the disk, which others write to as well


@dataclass(frozen=True)
class Progress:
    """What a pull tells while it runs: a file begins, bytes came."""

    on_file: Callable[[str, int], object] = lambda name, size: None
    on_bytes: Callable[[int], object] = lambda count: None


@dataclass(frozen=True)
class _Remote:
    """A file to fetch, and its name below the model's folder."""

    repo: str
    revision: str
    file: RepoSibling
    name: str


def pull_model(
    alias: str,
    entry: CatalogueEntry,
    cache: Path,
    *,
    verify: bool = False,
    progress: Progress | None = None,
) -> tuple[Manifest, bool]:
    """The manifest of the model in the cache, and whether anything had to be fetched.

    What is here is judged by sizes, with `verify` by hashes too. Raises ModelHubError if the hub
    does not give the files, or gives other ones than it says.
    """
    progress = progress or Progress()
    folder = cache.expanduser() / alias
    manifest = None
    with suppress(ModelFilesMissingError):  # a malformed one is written anew
        manifest = read_manifest(folder)
    if manifest is not None and _is_current(manifest, entry):
        judge = damaged_files if verify else wrong_sizes
        damaged = judge(folder, manifest)
        if not damaged:
            return manifest, False
        for name in damaged:
            (folder / name).unlink(missing_ok=True)
    endpoint = os.environ.get("HF_ENDPOINT") or None
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return _fetch_all(alias, entry, folder, _Hub(endpoint, progress)), True
    except GatedRepoError as error:
        raise ModelHubError(
            f"{entry.repo} is gated: accept its licence ({entry.licence}) on the hub, then set "
            "HF_TOKEN to a token of that account"
        ) from error
    except (HfHubHTTPError, HTTPError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelHubError(f"the hub does not give {entry.repo}: {reason}") from error


def choose_files(index: Mapping[str, Any], names: list[str], variant: str | None) -> list[str]:
    """The files of a repository that a pipeline needs: texts, and safetensors of one variant.

    Raises ModelHubError for a part whose weights are there as a pickle only.
    """
    names = [name for name in names if _SAFE_NAME.match(name)]
    chosen = [name for name in names if name == _INDEX or name.upper().startswith("LICENSE")]
    for part, value in index.items():
        if not isinstance(value, list) or not any(value) or part in _UNUSED_PARTS:
            continue
        files = {name: name.removeprefix(f"{part}/") for name in names if _is_in(name, part)}
        weights = [name for name, short in files.items() if short.endswith(".safetensors")]
        wanted = [name for name in weights if variant and f".{variant}" in files[name]]
        wanted = wanted or [name for name in weights if _PLAIN_WEIGHTS.match(files[name])]
        if not wanted and (weights or any(short.endswith(_PICKLES) for short in files.values())):
            raise ModelHubError(f"the part {part} has no safetensors that could be taken")
        chosen += wanted
        chosen += [name for name, short in files.items() if short.endswith(_TEXTS)]
    return chosen


class _BoundedFile(io.FileIO):
    """A file to append to, up to `max_bytes` and as long as the disk has more than its reserve."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        super().__init__(path, "ab")
        self._path, self._max_bytes = path, max_bytes

    def write(self, data: Any, /) -> int:
        """Write all of `data`; raises ModelHubError past a bound, and removes what cannot be."""
        if self.tell() + len(data) > self._max_bytes:
            self._path.unlink(missing_ok=True)
            raise ModelHubError(
                f"the hub says that {self._path.stem} has {self._max_bytes} bytes, and sends more"
            )
        _check_room(self._path.parent, len(data))
        left = memoryview(data)
        while left:
            left = left[super().write(left) :]
        return len(data)


class _Hub:
    """Files of a hub, checked on arrival."""

    def __init__(self, endpoint: str | None, progress: Progress) -> None:
        self._endpoint, self._progress = endpoint, progress
        self._api = HfApi(endpoint=endpoint)

    def files(self, repo: str, revision: str | None) -> tuple[str, dict[str, RepoSibling]]:
        """The commit that a revision stands for, and its files by name."""
        info = self._api.model_info(repo, revision=revision, files_metadata=True)
        if info.sha is None or info.siblings is None:
            raise ModelHubError(f"the hub does not list the files of {repo}")
        if revision is not None and info.sha != revision:
            raise ModelHubError(f"the hub gives {info.sha} of {repo}; {revision} is pinned")
        return info.sha, {file.rfilename: file for file in info.siblings}

    def fetch(self, remote: _Remote, folder: Path) -> FileRecord:
        """Bring a file, or the rest of it, unless it is here as the hub has it."""
        size = _declared_bytes(remote)
        final = folder / remote.name
        self._progress.on_file(remote.name, size)
        if not final.exists():
            final.parent.mkdir(parents=True, exist_ok=True)
            partial = final.with_name(final.name + _PARTIAL)
            self._download(remote, partial, size)
            if not _is_as_promised(partial, remote.file):
                partial.unlink()
                raise ModelHubError(f"{remote.name} of {remote.repo} is not what the hub says")
            partial.replace(final)
        elif not _is_as_promised(final, remote.file):
            final.unlink()
            return self.fetch(remote, folder)
        else:
            self._progress.on_bytes(size)
        return FileRecord(name=remote.name, bytes=size, sha256=sha256_file(final))

    def _download(self, remote: _Remote, partial: Path, size: int) -> None:
        have = partial.stat().st_size if partial.exists() else 0
        if have > size:
            partial.unlink()
            have = 0
        self._progress.on_bytes(have)
        on_bytes = self._progress.on_bytes

        class Told(tqdm):
            def update(self, n: float | None = 1) -> bool | None:
                on_bytes(int(n or 0))
                return None

        url = hf_hub_url(
            remote.repo,
            remote.file.rfilename,
            revision=remote.revision,
            endpoint=self._endpoint,
        )
        with _BoundedFile(partial, size) as stream:
            http_get(
                url,
                stream,
                resume_size=have,
                headers=build_hf_headers(),
                expected_size=size,
                tqdm_class=Told,
            )


def _fetch_all(alias: str, entry: CatalogueEntry, folder: Path, hub: _Hub) -> Manifest:
    revision, files = hub.files(entry.repo, entry.revision)
    if _INDEX not in files:
        raise ModelHubError(f"{entry.repo} has no {_INDEX}: it is no pipeline of diffusers")
    index = _Remote(entry.repo, revision, files[_INDEX], _INDEX)
    if _declared_bytes(index) > _MAX_INDEX_BYTES:
        raise ModelHubError(f"{_INDEX} of {entry.repo} is said to have {index.file.size} bytes")
    hub.fetch(index, folder)
    names = choose_files(_read_index(folder), list(files), entry.settings.get("variant"))
    remotes = [_Remote(entry.repo, revision, files[name], name) for name in names]
    for lora in entry.loras:
        lora_revision, found = hub.files(lora.repo, lora.revision)
        if lora.name not in found:
            raise ModelHubError(f"{lora.repo} has no {lora.name}")
        name = f"{LORA_FOLDER}/{lora.name}"
        remotes.append(_Remote(lora.repo, lora_revision, found[lora.name], name))
    _check_all_fit(folder, remotes)
    manifest = Manifest(
        alias=alias,
        repo=entry.repo,
        revision=revision,
        licence=entry.licence,
        files=tuple(hub.fetch(remote, folder) for remote in remotes),
    )
    publish_bytes(manifest.model_dump_json(indent=1).encode(), folder / MANIFEST, replace=True)
    return manifest


def _read_index(folder: Path) -> dict[str, Any]:
    try:
        index = json.loads((folder / _INDEX).read_text())
    except ValueError as error:
        raise ModelHubError(f"{_INDEX} is no JSON") from error
    if not isinstance(index, dict):
        raise ModelHubError(f"{_INDEX} describes no pipeline")
    return index


def _check_all_fit(folder: Path, remotes: list[_Remote]) -> None:
    _check_room(folder, sum(_declared_bytes(r) for r in remotes if not (folder / r.name).exists()))


def _check_room(folder: Path, num_bytes: int) -> None:
    """Raises ModelHubError if the disk would have less than its reserve after so many bytes."""
    free = shutil.disk_usage(folder).free
    if num_bytes + _RESERVE_BYTES > free:
        raise ModelHubError(
            f"{num_bytes} bytes are to come, {free} are free at {folder}, and {_RESERVE_BYTES} of "
            "them are kept free"
        )


def _declared_bytes(remote: _Remote) -> int:
    """The size that the hub has of a file; raises ModelHubError where it has none."""
    size = remote.file.size
    if size is None or size < 0:
        raise ModelHubError(f"the hub does not say how large {remote.name} of {remote.repo} is")
    return size


def _is_current(manifest: Manifest, entry: CatalogueEntry) -> bool:
    has_loras = {f"{LORA_FOLDER}/{lora.name}" for lora in entry.loras} <= {
        file.name for file in manifest.files
    }
    return has_loras and manifest.repo == entry.repo and entry.revision in (None, manifest.revision)


def _is_in(name: str, part: str) -> bool:
    return name.startswith(f"{part}/") and name.count("/") == 1


def _is_as_promised(path: Path, file: RepoSibling) -> bool:
    """Whether a file has the size and hash that the hub has of it: of LFS, or of git."""
    if path.stat().st_size != file.size:
        return False
    if file.lfs is not None:
        return sha256_file(path) == file.lfs.sha256
    digest = hashlib.sha1(f"blob {file.size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as stream:
        while chunk := stream.read(_READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest() == file.blob_id
