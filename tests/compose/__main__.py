"""`python -m tests.compose`: one line a check; exit status 0 if all held, or nothing can run."""

from __future__ import annotations

import signal
import sys
import time
import traceback
from collections.abc import Callable

import httpx

from synthrep_shared.client import SynthRep
from synthrep_shared.messages import ProbeRequest, RunRequest
from tests.compose.engine import Engine, NoEngineError, run, say, wait_until
from tests.compose.stack import ComposeStack
from tests.compose.standins import base_images

API_ADDS_BYTES = 120_000_000
PROMPTS = [f"a photo of a {colour} {thing}" for thing in ("horse", "ship", "truck", "frog")
           for colour in ("red", "blue", "green", "white", "black", "brown")]  # fmt: skip
IMAGES = 8
STEPS = 20
WORK_LIMIT_S = 600


class Acceptance:
    """The checks, in the order in which a stack lives."""

    def __init__(self, engine: Engine, stack: ComposeStack) -> None:
        self._engine, self._stack = engine, stack

    def images_are_light_and_not_root(self) -> str:
        """API images hold no torch and are small, and no image runs as root."""
        said = []
        for service in ("generator-api", "trainer-api"):
            image = f"synthrep/{service}:0.1.0"
            code = "import importlib.util as u; print(u.find_spec('torch'))"
            assert self._engine.docker("run", "--rm", image, "python", "-c", code) == "None"
            added = self._size(image) - self._size(self._base())
            assert added <= API_ADDS_BYTES, f"{image} adds {added / 1e6:.0f} MB"
            assert self._engine.docker("run", "--rm", image, "id", "-u") == "10001"
            said.append(f"{service} +{added / 1e6:.0f} MB")
        return ", ".join(said)

    def stack_comes_up(self) -> str:
        """One command; init says how to read the key, and nobody is let in without it."""
        begin = time.monotonic()
        self._stack.up()
        took_s = time.monotonic() - begin
        assert "cat /run/synthrep/api-key" in self._stack.compose("logs", "init")
        with self._stack.client() as client:
            for url in (client.generator_url, client.trainer_url):
                assert httpx.get(f"{url}/readyz").status_code == 200
                assert httpx.get(f"{url}/metrics").status_code == 401
        return f"healthy after {took_s:.0f} s"

    def containers_are_locked_down(self) -> str:
        """What the engine enforces, and that a root file system refuses a write."""
        containers = self._stack.containers()
        for name, container in containers.items():
            host = container["HostConfig"]
            assert container["Config"]["User"] == "10001:10001", name
            assert host["ReadonlyRootfs"], name
            assert host["CapDrop"] == ["ALL"], name
            assert not host["CapAdd"], name
            assert host["Memory"] > 0, name
            assert host["NanoCpus"] > 0, name
        assert not containers["redis"]["HostConfig"]["PortBindings"]
        for name in ("generator-api", "generator-worker", "trainer", "redis"):
            code = "touch /x 2>/dev/null && echo written || echo refused"
            assert self._stack.inside(name, "sh", "-c", code).strip() == "refused", name
        answer = self._stack.inside("redis", "redis-cli", "ping")
        assert "NOAUTH" in answer, answer
        return f"{len(containers)} containers"

    def work_survives_a_killed_worker_and_a_restarted_redis(self) -> str:
        """Captions become images and a trained encoder, each once, whatever is hurt meanwhile."""
        with self._stack.client() as client:
            batch = client.submit("pets", PROMPTS, images_per_prompt=IMAGES).id
            run_id = client.train(RunRequest(
                dataset="pets", max_steps=STEPS, image_size=32, captions_per_batch=8,
                images_per_caption=4, checkpoint_every=10,
            )).id  # fmt: skip
            wait_until(lambda: client.batch(batch).prompts.running, WORK_LIMIT_S, "work in hand")
            self._stack.kill_worker()
            self._stack.compose("restart", "redis")
            wait_until(
                lambda: client.batch(batch).state == "completed", WORK_LIMIT_S, "the batch's end"
            )
            prompts = client.batch(batch).prompts
            assert (prompts.committed, prompts.failed) == (len(PROMPTS), 0), prompts
            assert self._restarts("generator-worker") >= 1
            self._finish(client, run_id)
        verify = ("synthrep", "dataset", "verify", "pets", "--root", "/var/lib/synthrep/data")
        self._stack.inside("generator-worker", *verify)
        return f"{len(PROMPTS)} captions, {len(PROMPTS) * IMAGES} images, {STEPS} steps, verified"

    def a_probe_judges(self) -> str:
        """A probe of the newest checkpoint ends with a value."""
        with self._stack.client() as client:
            (run_view,) = client.runs()
            probe = client.start_probe(
                ProbeRequest(run_id=run_view.id, dataset="digits", protocol="knn")
            ).id
            wait_until(
                lambda: client.probe(probe).state not in ("queued", "running"),
                WORK_LIMIT_S, "the probe's end",
            )  # fmt: skip
            view = client.probe(probe)
            assert view.state == "completed", view.error
            return f"digits, kNN: {view.value:.3f} of {view.n_test} test images"

    def sigterm_drains_a_worker(self) -> str:
        """A worker in the middle of a job ends well, and what it had is done by the next."""
        with self._stack.client() as client:
            batch = client.submit("pets", PROMPTS, images_per_prompt=IMAGES, seed=7).id
            wait_until(lambda: client.batch(batch).prompts.running, WORK_LIMIT_S, "work in hand")
            begin = time.monotonic()
            self._stack.compose("stop", "generator-worker", limit_s=700)
            took_s = time.monotonic() - begin
            assert self._stack.containers()["generator-worker"]["State"]["ExitCode"] == 0
            self._stack.up()
            wait_until(
                lambda: client.batch(batch).state == "completed", WORK_LIMIT_S, "the batch's end"
            )
            prompts = client.batch(batch).prompts
            assert (prompts.committed, prompts.failed) == (len(PROMPTS), 0), prompts
        return f"gone after {took_s:.0f} s with status 0"

    def all_is_there_after_a_restart(self) -> str:
        """Down and up again, volumes kept: the same key, the same images."""
        with self._stack.client() as client:
            before = [shard.sha256 for shard in client.shards("pets")]
        self._stack.compose("down", limit_s=300)
        self._stack.up()
        with self._stack.client() as client:
            assert [shard.sha256 for shard in client.shards("pets")] == before
        return f"{len(before)} shards"

    def _finish(self, client: SynthRep, run_id: str) -> None:
        wait_until(
            lambda: client.run(run_id).state not in ("queued", "running"), WORK_LIMIT_S, "the run"
        )
        view = client.run(run_id)
        assert (view.state, view.step) == ("completed", STEPS), view.error

    def _restarts(self, service: str) -> int:
        return int(self._stack.containers()[service]["RestartCount"])

    def _size(self, image: str) -> int:
        return int(self._engine.docker("image", "inspect", "-f", "{{.Size}}", image))

    def _base(self) -> str:
        recipe = run("grep", "-m1", "-oP", "(?<=PYTHON_IMAGE=).*", "services/generator/Dockerfile")
        return recipe.stdout.strip()


def accept(engine: Engine) -> int:
    """Build, check, take down; the number of checks that failed."""
    stack = ComposeStack(engine)
    begin = time.monotonic()
    stack.build(base_images(engine))
    say(f"images built in {time.monotonic() - begin:.0f} s")
    acceptance = Acceptance(engine, stack)
    checks: tuple[Callable[[], str], ...] = (
        acceptance.images_are_light_and_not_root,
        acceptance.stack_comes_up,
        acceptance.containers_are_locked_down,
        acceptance.work_survives_a_killed_worker_and_a_restarted_redis,
        acceptance.a_probe_judges,
        acceptance.sigterm_drains_a_worker,
        acceptance.all_is_there_after_a_restart,
    )
    passed = 0
    try:
        for check in checks:
            begin = time.monotonic()
            say(f"{check.__name__}: {check()} [{time.monotonic() - begin:.0f} s]")
            passed += 1
    except Exception:
        say(f"{checks[passed].__name__}: FAILED\n{traceback.format_exc()[-3000:]}")
        say(stack.compose("logs", "--tail", "40", "--no-color")[-12_000:])
    finally:
        stack.down()
    say(f"{passed} passed, {len(checks) - passed} failed")
    return len(checks) - passed


def main() -> int:
    """Exit status 0 if every check held; also where no engine can run, which is said."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # take the stack down then, too
    try:
        with Engine() as engine:
            return min(1, accept(engine))
    except NoEngineError as error:
        say(f"skipped: {error}")
        return 0


if __name__ == "__main__":
    sys.exit(main())
