"""The process that owns the device and the model, a child of the worker; runs one job at a time.

Started by the supervisor as `python -m synthrep_generator.device_process FD PARENT`. It is never
forked from a process that used the device, and never outlives its parent.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from synthrep_generator.chunks import Chunk, Place
from synthrep_generator.dataset_files import OpenDatasets
from synthrep_generator.jobs import (
    Bench,
    JobResult,
    JobStoppedError,
    ShardRequest,
    generate_shard,
    make_request,
)
from synthrep_generator.judge_files import SafetyFiles, check_judges, find_safety_checker
from synthrep_generator.model_files import check_model_files, find_model
from synthrep_generator.pipe import (
    Beat,
    Channel,
    Finished,
    LoadModel,
    Raised,
    Ready,
    RunChunk,
    StopChunk,
)
from synthrep_generator.quality_gate import CaptionJudge, Judges, SafetyJudge
from synthrep_generator.scheduling import give_way
from synthrep_generator.settings import GeneratorSettings, ModelConfig
from synthrep_generator.synthesis import (
    DeviceUse,
    FakeSynthesizer,
    ImageTask,
    Recipe,
    Synthesizer,
)
from synthrep_shared.errors import SynthRepError
from synthrep_shared.logs import configure_logging
from synthrep_shared.messages import GenerationSettings

logger = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1
_BEAT_S = 0.2
_MAX_REASON_CHARACTERS = 300
# Read when the libraries are imported; what a model needs is pulled before, never at run time.
_OFFLINE = {"HF_HUB_OFFLINE": "1", "DIFFUSERS_DISABLE_REMOTE_CODE": "1"}
_WARM_UP = ImageTask(prompt="a photograph", seed=0)


class _JobWatch:
    """Tells the supervisor of progress, and the job of the supervisor's wish to stop."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._active: tuple[tuple[str, int], ...] = ()
        self._sent_at = 0.0
        self.made_at: float | None = None
        self.wish: StopChunk | None = None
        self.chunk_id = ""

    @property
    def is_stopped(self) -> bool:
        """Whether the job at hand is to end."""
        return self.wish is not None and self.wish.chunk_id == self.chunk_id

    def begin(self, places: Sequence[Place]) -> None:
        """See jobs.Watch."""
        self._active = tuple((place.batch, place.index) for place in places)
        self._send()
        self.made_at = None if places else time.monotonic()
        if places:
            self.step()

    def step(self) -> None:
        """See jobs.Watch."""
        if self.wish is not None and self.is_stopped:
            raise JobStoppedError(discard=self.wish.discard)
        if time.monotonic() - self._sent_at >= _BEAT_S:
            self._send()

    def _send(self) -> None:
        self._sent_at = time.monotonic()
        self._channel.send(Beat(active=self._active))


class DeviceProcess:
    """Serves the supervisor's requests until its end of the channel closes."""

    def __init__(self, settings: GeneratorSettings, channel: Channel) -> None:
        self._settings, self._channel = settings, channel
        self._datasets = OpenDatasets(settings.root)
        self._watch = _JobWatch(channel)
        self._inbox: queue.SimpleQueue[LoadModel | RunChunk] = queue.SimpleQueue()
        self._alias = ""
        self._bytes_at_first = private_bytes()
        self._first_bytes: dict[str, int] = {}
        self._synthesizer: Synthesizer | None = None
        self._safety_files: SafetyFiles | None = None
        self._safety: SafetyJudge | None = None
        self._clip: CaptionJudge | None = None

    def serve(self) -> None:
        """Run requests one by one; never returns normally."""
        threading.Thread(target=self._listen, daemon=True).start()
        while True:
            request = self._inbox.get()
            about = request.chunk.id if isinstance(request, RunChunk) else ""
            try:
                if isinstance(request, LoadModel):
                    self._load(request.alias, about)
                else:
                    self._run(request.chunk)
            except (OSError, SynthRepError) as error:
                logger.exception("request failed", extra={"chunk": about})
                self._channel.send(Raised(chunk_id=about, reason=_reason(error), retryable=True))
            except Exception as error:
                # Whatever this was may have left the device in any state: start afresh.
                logger.exception("device process gives up", extra={"chunk": about})
                reason, is_fault = _reason(error), is_device_fault(error)
                self._channel.send(
                    Raised(chunk_id=about, reason=reason, retryable=False, is_device_fault=is_fault)
                )
                os._exit(1)

    def _listen(self) -> None:
        while True:
            try:
                message = self._channel.receive()
            except EOFError:
                os._exit(0)
            if isinstance(message, StopChunk):
                self._watch.wish = message
            elif isinstance(message, LoadModel | RunChunk):
                self._inbox.put(message)

    def _run(self, chunk: Chunk) -> None:
        # A wish for this run cannot have come yet: it waits for this run's Ready.
        self._watch.chunk_id, self._watch.wish = chunk.id, None
        request = make_request(chunk, self._datasets[chunk.dataset])
        result, use, write_s, batch_images = JobResult(), DeviceUse(), 0.0, 0
        if request is not None:
            # First of all: from the model's Ready on, a silence counts as a hang.
            judges = self._load_judges(request.settings)
            synthesizer = self._load(request.settings.model, chunk.id)
            before, self._watch.made_at = synthesizer.use, None
            result = self._generate(request, synthesizer, judges)
            use, batch_images = synthesizer.use.since(before), synthesizer.batch_images
            write_s = time.monotonic() - (self._watch.made_at or time.monotonic())
        self._channel.send(
            Finished(
                chunk_id=chunk.id,
                stopped=self._watch.is_stopped,
                device_s=round(use.denoise_s + use.decode_s, 4),
                decode_s=round(use.decode_s, 4),
                write_s=round(write_s, 4),
                out_of_memory=use.out_of_memory,
                batch_images=batch_images,
                grown_bytes=max(0, private_bytes() - self._bytes_at_first),
                **result.model_dump(),
            )
        )

    def _generate(
        self, request: ShardRequest, synthesizer: Synthesizer, judges: Judges
    ) -> JobResult:
        bench = Bench(
            synthesizer=synthesizer,
            model=find_model(self._settings, request.settings.model),
            image_format=self._settings.image_format,
            quality=self._settings.jpeg_quality,
            watch=self._watch,
            judges=judges,
        )
        return generate_shard(request, bench)

    def _load_judges(self, asked: GenerationSettings) -> Judges:
        """The models that a batch's gate needs; each stays loaded from its first use on."""
        gate = asked.quality_gate
        if gate is None or not (gate.safety or gate.min_clip_score is not None):
            return Judges()
        check_judges(asked, self._settings, find_model(self._settings, asked.model))
        from synthrep_generator.image_judges import ClipScorer, SafetyChecker

        device = self._settings.device
        if gate.safety:
            files = find_safety_checker(self._settings, find_model(self._settings, asked.model))
            if files != self._safety_files:
                assert files is not None  # else check_judges raises
                self._safety, self._safety_files = SafetyChecker(files, device=device), files
        if gate.min_clip_score is not None and self._clip is None:
            assert self._settings.clip_path is not None  # else check_judges raises
            self._clip = ClipScorer(self._settings.clip_path, device=device)
        return Judges(safety=self._safety, caption=self._clip)

    def _load(self, alias: str, about: str) -> Synthesizer:
        if self._synthesizer is None or alias != self._alias:
            model = find_model(self._settings, alias)
            self._synthesizer = None  # frees the device's memory first
            gc.collect()  # of cycles too: a compiled network refers to itself
            synthesizer = make_synthesizer(self._settings, alias, model)
            warm_up(synthesizer, model)
            self._alias, self._synthesizer = alias, synthesizer
            # That of the first time, lest what each change of models costs is forgotten.
            self._bytes_at_first = self._first_bytes.setdefault(alias, private_bytes())
            logger.info("model loaded", extra={"model": alias, "device": synthesizer.device})
        self._channel.send(Ready(chunk_id=about, device=self._synthesizer.device))
        return self._synthesizer


def make_synthesizer(settings: GeneratorSettings, alias: str, model: ModelConfig) -> Synthesizer:
    """The configured synthesizer, loaded; raises ModelFilesMissingError without the files."""
    if settings.synthesizer == "fake":
        fake = FakeSynthesizer(store_px=model.store_px, delay_s=settings.fake_delay_s)
        if model.device_batch_images != "auto":
            fake.batch_images = model.device_batch_images
        return fake
    check_model_files(alias, model)
    from synthrep_generator.diffusion import load_synthesizer

    return load_synthesizer(
        model, device=settings.device, threads=settings.threads, batch_sizes=settings.batch_sizes
    )


def warm_up(synthesizer: Synthesizer, model: ModelConfig) -> None:
    """Make one image, so that a device that cannot is found out before a prompt gets the blame.

    Where kernels are compiled, make as many as a pass takes, too, and half of them: for each of the
    first sizes there is much to compile, in a silence that would count as a hang later.
    """
    recipe = Recipe(model.guidance_scale, model.num_inference_steps, model.scheduler, "")
    most = synthesizer.batch_images if model.compile else 1
    for size in dict.fromkeys((1, most, most // 2 or 1)):
        for result in synthesizer.generate([_WARM_UP] * size, recipe, lambda: None):
            if isinstance(result, Exception):
                raise OSError(f"the model does not work on {synthesizer.device}: {result}")


def is_device_fault(error: Exception) -> bool:
    """Whether the device reports an error that sticks to the process, whoever caused it."""
    names = {kind.__name__ for kind in type(error).__mro__}  # torch may not be here
    return "AcceleratorError" in names or (
        isinstance(error, RuntimeError) and "CUDA error" in str(error)
    )


def private_bytes() -> int:
    """Memory of this process that no file backs; model files that are mapped do not count."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    return 0


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when the thread that started it ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:_MAX_REASON_CHARACTERS]


def main() -> None:
    """Serve the worker whose socket and process id the command line gives."""
    die_with_parent(int(sys.argv[2]))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the worker says over the channel when to stop
    give_way()  # it leads a session
    os.environ |= _OFFLINE
    settings = GeneratorSettings()
    configure_logging("generator-worker", settings.log_level)
    channel = Channel(socket.socket(fileno=int(sys.argv[1])))
    DeviceProcess(settings, channel).serve()


if __name__ == "__main__":
    main()
