"""A data set behind a generator's API: the same batches, whatever the network does."""

from __future__ import annotations

import json
import socket
import tempfile
import threading
import time
from datetime import UTC, datetime
from itertools import count

import httpx
import pytest
import uvicorn
from pydantic import SecretStr
from starlette.responses import Response

from synthrep_generator.api import create_app
from synthrep_generator.intake import BatchHeader, write_batch
from synthrep_generator.queues import QueueView
from synthrep_generator.settings import GeneratorSettings
from synthrep_shared.commit_log import read_log
from synthrep_shared.keys import ApiKey
from synthrep_shared.messages import GenerationSettings, RunRequest
from synthrep_shared.storage import spool_folder
from synthrep_trainer import train
from synthrep_trainer.errors import LogChangedError, RunError
from synthrep_trainer.order import SamplingPlan
from synthrep_trainer.recorder import RunRecorder
from synthrep_trainer.runs import Workplace
from synthrep_trainer.settings import TrainerSettings
from synthrep_trainer.shard_stream import ShardStream
from synthrep_trainer.sources import check_source, event_names, open_dataset

KEY = "key of the generator"
LIMIT_S = 20.0
HEADER = BatchHeader(
    id="b" * 32, dataset="birds", owner="anonymous", priority=5, num_prompts=3,
    settings=GenerationSettings(images_per_prompt=2), body_sha256="", created_at=datetime.now(UTC),
)  # fmt: skip
PLAN = SamplingPlan(
    seed=1, captions_per_batch=4, images_per_caption=2, min_fill_groups=4, max_uses_per_image=100
)


def never() -> bool:
    return False


class EmptyQueue:
    """A backlog with nothing in it."""

    def queue_view(self):
        return QueueView(depth=0, running=0)

    def running_prompts(self):
        return {}

    def workers(self):
        return []

    def nudge(self):
        """Nobody sleeps."""


class Flaky:
    """Stands before the generator's API and answers in its place when `trouble` says so."""

    def __init__(self, app) -> None:
        self._app, self.trouble, self.seen = app, lambda path: None, []

    async def __call__(self, scope, receive, send):
        answer = None
        if scope["type"] == "http":
            self.seen.append((scope["path"], dict(scope["headers"])))
            answer = self.trouble(scope["path"])
        await (answer or self._app)(scope, receive, send)


@pytest.fixture
def generator(shard_maker):
    """The API of the data set's generator on a port of its own, with a key."""
    settings = GeneratorSettings(
        root=shard_maker.paths.root, api_keys=(ApiKey.model_validate(KEY),), log_level="ERROR"
    )
    app = Flaky(create_app(settings, EmptyQueue()))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(app, log_config=None, lifespan="off", timeout_graceful_shutdown=0)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        app.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        yield app
        server.should_exit = True
        thread.join()


@pytest.fixture
def settings(generator, tmp_path):
    return TrainerSettings(
        root=tmp_path / "nowhere",
        runs=tmp_path / "runs",
        allowed_sources=(generator.url,),
        source_keys={generator.url: SecretStr(KEY)},
        source_poll_s=0.05,
    )


@pytest.fixture
def follow(generator, settings, tmp_path, monkeypatch):
    """Opens the stream of a run that follows the generator, with a spool of its own."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "spool"))

    def follow(run="run", **changes):
        (tmp_path / run).mkdir(exist_ok=True)
        request = RunRequest(source_url=f"{generator.url}/v1/datasets/birds", max_steps=1)
        return open_dataset(
            request, tmp_path / run, settings.model_copy(update=changes), is_writer=True,
            should_stop=never,
        )  # fmt: skip

    return follow


def wait_for(log, seq):
    deadline = time.monotonic() + LIMIT_S
    while len(list(read_log(log))) < seq:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def wait_until(condition, limit_s=LIMIT_S):
    deadline = time.monotonic() + limit_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def poll_until_it_raises(reader):
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        reader.poll()
        time.sleep(0.01)


def make_stream(place, run_folder, **given):
    return ShardStream(place, run_folder, PLAN, poll_s=0.005, verify_s=LIMIT_S, **given)


def test_batches_are_those_of_the_folder(shard_maker, follow, tmp_path):
    first = shard_maker.commit(9)
    shard_maker.reject(first.groups[2])
    shard_maker.commit(6)
    local = make_stream(shard_maker.paths, tmp_path)
    expected = [local.next_batch(never) for _ in range(8)]
    with follow() as (place, reader):
        wait_for(place.log, 3)
        stream = make_stream(place, tmp_path / "run", reader=reader)
        for batch in expected:
            drawn = stream.next_batch(never)
            assert [g.group for g in drawn.groups] == [g.group for g in batch.groups]
            for ours, theirs in zip(drawn.groups, batch.groups, strict=True):
                stream.verify(ours.shard)
                local.verify(theirs.shard)
                assert stream.store.read(ours.shard, ours.place, ours.images) == local.store.read(
                    theirs.shard, theirs.place, theirs.images
                )
        assert list(read_log(place.log)) == list(read_log(shard_maker.paths.log))
        copies = spool_folder(place.root) / "copies"
        assert len(list(copies.glob("birds.*.tar"))) == 2


def test_shards_that_appear_are_followed_and_a_data_set_may_come_later(
    shard_maker, generator, follow, tmp_path
):
    generator.trouble = lambda path: Response(status_code=404) if "records" in path else None
    with follow() as (place, reader):
        stream = make_stream(place, tmp_path / "run", reader=reader)
        time.sleep(0.2)
        generator.trouble = lambda path: None
        shard_maker.commit(4)
        assert {g.group for g in stream.next_batch(never).groups} == {0, 1, 2, 3}
        shard_maker.commit(8)
        wait_for(place.log, 2)
        assert len({g.group for _ in range(9) for g in stream.next_batch(never).groups}) == 12


def test_an_event_shortens_the_pause(shard_maker, generator, settings, follow, tmp_path):
    shard_maker.commit(2)
    with follow(source_poll_s=60.0) as (place, reader):
        deadline = time.monotonic() + LIMIT_S
        while not any(path == "/v1/events" for path, _ in generator.seen):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.3)  # until the listener's first look, which tells nothing
        shard_maker.commit(4)
        stream = make_stream(place, tmp_path / "run", reader=reader)
        stopped = time.monotonic() + LIMIT_S
        assert stream.next_batch(lambda: time.monotonic() > stopped) is not None


def test_trouble_is_waited_out_as_the_generator_asks(shard_maker, generator, follow, tmp_path):
    numbers = count()

    def trouble(path):
        if "events" not in path and next(numbers) % 2 == 0:
            return Response(status_code=503, headers={"retry-after": "0"})
        return None

    generator.trouble = trouble
    shard_maker.commit(4)
    with follow() as (place, reader):
        stream = make_stream(place, tmp_path / "run", reader=reader)
        assert stream.next_batch(never) is not None
        assert stream.store.num_quarantined == 0


def test_an_answer_that_is_no_page_of_records_is_waited_out(
    shard_maker, generator, follow, tmp_path
):
    answers = [b"<html>log in</html>", b"[]", b"{}", b'{"items": [{}, 1]', b""]

    def trouble(path):
        return Response(answers.pop()) if path.endswith("/records") and answers else None

    generator.trouble = trouble
    shard_maker.commit(4)
    with follow() as (place, reader):
        stream = make_stream(place, tmp_path / "run", reader=reader)
        stopped = time.monotonic() + LIMIT_S
        assert stream.next_batch(lambda: time.monotonic() > stopped) is not None
    assert not answers


def test_a_shard_that_arrives_changed_or_not_at_all_goes_to_quarantine(
    shard_maker, generator, follow, tmp_path
):
    shard_maker.commit(4)
    changed = shard_maker.commit(4, break_file=lambda data: data[:-1] + b"x")
    longer = shard_maker.commit(4, break_file=lambda data: data + bytes(512))
    absent = shard_maker.commit(4)
    (shard_maker.paths.shards / absent.name).unlink()
    with follow() as (place, reader):
        wait_for(place.log, 4)
        stream = make_stream(place, tmp_path / "run", reader=reader)
        assert {g.group for _ in range(9) for g in stream.next_batch(never).groups} == {0, 1, 2, 3}
    found = sorted((tmp_path / "run" / "quarantine").iterdir())
    assert [json.loads(file.read_bytes())["seq"] for file in found] == [
        changed.seq, longer.seq, absent.seq,
    ]  # fmt: skip


def test_a_run_goes_on_from_what_it_had_read(shard_maker, follow, generator, tmp_path):
    shard_maker.commit(4)
    with follow() as (place, reader):
        batch = make_stream(place, tmp_path / "run", reader=reader).next_batch(never)
    mirror = tmp_path / "run" / "source.jsonl"
    whole = mirror.read_bytes()
    mirror.write_bytes(whole + b'{"torn')
    shard_maker.commit(4)
    generator.seen.clear()
    with follow() as (place, reader):
        stream = make_stream(
            place, tmp_path / "run", reader=reader, step=1, cursor=batch.cursor
        )  # fmt: skip
        wait_for(place.log, 2)
        assert stream.next_batch(never).step == 2
        assert len({g.group for _ in range(4) for g in stream.next_batch(never).groups}) == 8
    assert mirror.read_bytes().startswith(whole)


def test_another_log_is_refused(shard_maker, follow, tmp_path):
    shard_maker.commit(4)
    shard_maker.commit(4)
    with follow() as (place, reader):
        make_stream(place, tmp_path / "run", reader=reader).next_batch(never)
    mirror = tmp_path / "run" / "source.jsonl"
    lines = mirror.read_bytes().splitlines(keepends=True)
    mirror.write_bytes(b"".join([*lines[:-1], lines[-1].replace(b'"kind"', b'"kind" ')]))
    with follow() as (_, reader):  # the same record, spelt in another way
        assert len(reader.poll()) == len(lines)
        time.sleep(0.2)
        assert reader.poll() == []
    sha256 = json.loads(lines[-1])["sha256"].encode()
    mirror.write_bytes(b"".join([*lines[:-1], lines[-1].replace(sha256, b"0" * 64)]))
    with follow() as (_, reader), pytest.raises(LogChangedError, match="another log"):
        poll_until_it_raises(reader)


def test_the_key_goes_along_and_a_wrong_one_ends_the_run(generator, shard_maker, follow):
    shard_maker.commit(4)
    wrong = {generator.url: SecretStr("wrong")}
    with follow(source_keys=wrong) as (_, reader), pytest.raises(RunError, match="refuses"):
        poll_until_it_raises(reader)


def test_a_key_is_sent_to_no_other_generator(generator, shard_maker, follow, monkeypatch):
    monkeypatch.setenv("SYNTHREP_API_KEY", "the user's own")
    with follow(source_keys={"http://elsewhere:8000": SecretStr(KEY)}):
        time.sleep(0.2)
    assert generator.seen
    assert not any(b"authorization" in headers for _, headers in generator.seen)


def test_the_generator_of_the_settings_may_be_asked(settings):
    own = settings.model_copy(update={"allowed_sources": (), "generator_url": "http://own:8000"})
    check_source("http://own:8000", own)
    with pytest.raises(RunError, match="not among the allowed"):
        check_source("http://other:8000", own)


@pytest.mark.parametrize(
    "allowed", ["http://127.0.0.1", "https://127.0.0.1:8000", "http://127.0.0.1:80"]
)
def test_only_allowed_addresses_are_asked(allowed, settings, tmp_path, monkeypatch):
    def connect(*_):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "create_connection", connect)
    request = RunRequest(source_url="http://127.0.0.1:8000/v1/datasets/birds", max_steps=1)
    narrow = settings.model_copy(update={"allowed_sources": (allowed,)})
    place = open_dataset(request, tmp_path, narrow, is_writer=True, should_stop=never)
    with pytest.raises(RunError, match="not among the allowed"), place:
        pass


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd", "http://user:key@host/v1/datasets/birds", "hf://birds",
        "http://host/v1/datasets/birds?x=1", "http://host/v1/datasets/../batches",
        "http://host/v1/batches/birds", "pipe:cat", "http://host#/v1/datasets/birds",
        "http://a/v1/datasets/b/v1/datasets/birds", "http://host/v1/datasets/birds\n",
    ],
)  # fmt: skip
def test_what_is_no_address_of_a_data_set_is_refused(url):
    with pytest.raises(ValueError, match="source_url"):
        RunRequest(source_url=url, max_steps=1)


def test_redirects_are_not_followed(generator, shard_maker, settings, follow, tmp_path):
    shard_maker.commit(4)
    generator.trouble = lambda path: Response(
        status_code=307, headers={"location": "http://169.254.169.254/latest"}
    )
    with follow() as (place, reader):
        time.sleep(0.3)
        assert reader.poll() == []
        with pytest.raises(OSError, match="307"):
            (place.shards / "00000001-0123456789ab.tar").read_range(0, 10)
        with pytest.raises(httpx.HTTPStatusError):
            next(iter(event_names(generator.url, settings)))


def test_a_run_learns_over_http_and_pauses_its_generator(
    shard_maker, generator, settings, monkeypatch
):
    shard_maker.commit(40)
    write_batch(shard_maker.paths, HEADER, ["a"] * HEADER.num_prompts)
    settings = settings.model_copy(update={"device": "cpu", "source_poll_s": 0.02})
    folder = Workplace(settings.runs).submit_run(
        RunRequest(
            source_url=f"{generator.url}/v1/datasets/birds", max_steps=12, image_size=16,
            captions_per_batch=4, images_per_caption=2, pause_generation_above=20,
        )
    )  # fmt: skip
    marker = shard_maker.paths.control / f"{HEADER.id}.paused"
    seen = []
    monkeypatch.setattr(
        RunRecorder,
        "record_step",
        lambda *_, **__: seen or seen.append(wait_until(marker.exists, 3 * LIMIT_S)),
    )
    assert train.run(folder, settings, never)
    assert seen[0], "never paused"
    assert not marker.exists()
    assert not settings.root.exists()
