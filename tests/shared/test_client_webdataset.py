"""A data set behind the generator's API, as webdataset sees it."""

from __future__ import annotations

import builtins
import hashlib
import io
import json
import tarfile
from collections import Counter
from typing import Any

import httpx
import pytest
import webdataset
from PIL import Image

from synthrep_shared.client import SynthRep
from synthrep_shared.errors import ServiceError, SynthRepError

ROBIN, WREN, CROW, GULL = (letter * 32 for letter in "abcd")


def jpeg(number: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (number, 0, 0)).save(stream, "JPEG", quality=95)
    return stream.getvalue()


def tar(gids: tuple[str, ...]) -> bytes:
    """Two images a group, the second with a large JSON, so that a shard takes several reads."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as shard:
        for gid in gids:
            for k in range(2):
                facts = {"gid": gid, "image_index": k, "caption": "x" * 60_000 * k}
                for suffix, data in (("jpg", jpeg(k)), ("json", json.dumps(facts).encode())):
                    member = tarfile.TarInfo(f"{gid}-{k}.{suffix}")
                    member.size = len(data)
                    shard.addfile(member, io.BytesIO(data))
    return stream.getvalue()


class Generator:
    """Two shards, the first with a group that is rejected later; breaks off each first read."""

    def __init__(self) -> None:
        self.shards = {"1.tar": tar((ROBIN, WREN)), "2.tar": tar((CROW, GULL))}
        self.records: list[dict[str, Any]] = [
            {"seq": 1, "kind": "shard", "name": "1.tar", "groups": [{"gid": ROBIN}, {"gid": WREN}]},
            {"seq": 2, "kind": "reject", "name": "", "groups": [{"gid": WREN}]},
            {"seq": 3, "kind": "failure", "name": "f", "groups": [{"gid": "e" * 32}]},
            {"seq": 4, "kind": "shard", "name": "2.tar", "groups": [{"gid": CROW}, {"gid": GULL}]},
        ]
        self.reads: Counter[str] = Counter()
        self.longest_read = 0

    def __call__(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path.removeprefix("/v1/datasets/pets/")
        if path == "records":
            after = int(request.url.params["after"])
            items = [record for record in self.records if record["seq"] > after]
            return httpx.Response(200, json={"items": items, "next_cursor": None})
        name = path.removeprefix("shards/")
        if name not in self.shards:
            return httpx.Response(404, json={"title": "Not Found", "status": 404})
        self.reads[name] += 1
        if self.reads[name] == 1:
            raise httpx.ReadError("broken off")
        first, last = request.headers["range"].removeprefix("bytes=").split("-")
        data = self.shards[name][int(first) : int(last) + 1]
        if not data:
            return httpx.Response(416, json={"title": "Range Not Satisfiable", "status": 416})
        self.longest_read = max(self.longest_read, len(data))
        return httpx.Response(206, content=data)


@pytest.fixture
def generator():
    return Generator()


@pytest.fixture
def synthrep(generator):
    with SynthRep(transport=httpx.MockTransport(generator), sleep=lambda _: None) as client:
        yield client


def test_samples_come_as_from_the_files_without_rejected_groups(synthrep, generator, tmp_path):
    pipeline = synthrep.to_webdataset("pets").decode("pil").to_tuple("jpg", "json")
    found = [(hashlib.sha256(image.tobytes()).hexdigest(), facts) for image, facts in pipeline]
    expected = []
    for name, data in generator.shards.items():
        (tmp_path / name).write_bytes(data)
        with (tmp_path / name).open("rb") as stream:
            files = webdataset.tariterators.tar_file_iterator(stream)
            samples = webdataset.tariterators.group_by_keys(
                {"__url__": name, **file} for file in files
            )
            for sample in webdataset.FluidWrapper(list(samples)).decode("pil"):
                if sample["json"]["gid"] != WREN:
                    image = hashlib.sha256(sample["jpg"].tobytes()).hexdigest()
                    expected.append((image, sample["json"]))
    assert found == expected
    assert [facts["gid"] for _, facts in found] == [ROBIN, ROBIN, CROW, CROW, GULL, GULL]
    assert generator.longest_read < len(generator.shards["1.tar"])
    assert min(generator.reads.values()) > 2


def test_every_pass_reads_the_log_anew(synthrep, generator):
    pipeline = synthrep.to_webdataset("pets")
    assert len(list(pipeline)) == 6
    generator.records.append({"seq": 5, "kind": "reject", "name": "", "groups": [{"gid": GULL}]})
    assert [sample["__key__"] for sample in pipeline] == [
        f"{gid}-{k}" for gid in (ROBIN, CROW) for k in range(2)
    ]


def test_a_pass_may_begin_after_a_position(synthrep):
    samples = list(synthrep.to_webdataset("pets", after=1))
    assert {sample["__url__"] for sample in samples} == {"pets/2.tar"}
    assert list(synthrep.to_webdataset("pets", after=4)) == []


@pytest.mark.parametrize(("worker", "name"), [(0, "pets/1.tar"), (1, "pets/2.tar")])
def test_workers_of_a_loader_share_the_shards(synthrep, monkeypatch, worker, name):
    monkeypatch.setattr(
        "webdataset.utils.pytorch_worker_info", lambda group=None: (0, 1, worker, 2)
    )
    assert {sample["__url__"] for sample in synthrep.to_webdataset("pets")} == {name}


def test_a_shard_that_is_gone_ends_the_pass(synthrep, generator):
    del generator.shards["2.tar"]
    with pytest.raises(ServiceError, match="404"):
        list(synthrep.to_webdataset("pets"))


def test_without_webdataset_it_says_what_to_install(synthrep, monkeypatch):
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "webdataset":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(SynthRepError, match="pip install webdataset"):
        synthrep.to_webdataset("pets")
