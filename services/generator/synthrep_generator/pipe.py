"""What a worker and the process that owns its device say to each other: JSON lines on a socket."""

from __future__ import annotations

import select
import socket
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from synthrep_generator.chunks import Chunk

_READ_BYTES = 1 << 16


class _Line(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LoadModel(_Line):
    """To the device: have this model ready."""

    kind: Literal["load"] = "load"
    alias: str


class RunChunk(_Line):
    """To the device: make the images of a chunk."""

    kind: Literal["run"] = "run"
    chunk: Chunk


class StopChunk(_Line):
    """To the device: end the run of a chunk; seal what is complete, or drop it."""

    kind: Literal["stop"] = "stop"
    chunk_id: str
    discard: bool


class Ready(_Line):
    """From the device: the model is loaded and has made a first image; for a run, or no chunk."""

    kind: Literal["ready"] = "ready"
    chunk_id: str
    device: str


class Beat(_Line):
    """From the device: it makes progress; `active` are the (batch, index) of prompts in work."""

    kind: Literal["beat"] = "beat"
    active: tuple[tuple[str, int], ...]


class Finished(_Line):
    """From the device: the run is over, its outcomes are in the log.

    Of the run's time, `device_s` went into denoising and decoding, `decode_s` of it into the
    latter, and `write_s` passed after the last image. The device's memory was too small for
    `out_of_memory` of its passes and takes `batch_images` now. The process holds `grown_bytes` more
    than when its model had made a first image.
    """

    kind: Literal["finished"] = "finished"
    chunk_id: str
    committed: int
    failed: int
    images: int
    filtered: dict[str, int]
    stopped: bool
    device_s: float
    decode_s: float = 0.0
    write_s: float = 0.0
    out_of_memory: int = 0
    batch_images: int = 0
    grown_bytes: int


class Raised(_Line):
    """From the device: a run, or a load (no chunk), failed; not `retryable`: the process ends.

    A device fault is an error of the device itself, which no later call would survive.
    """

    kind: Literal["raised"] = "raised"
    chunk_id: str
    reason: str
    retryable: bool
    is_device_fault: bool = False

    @property
    def is_out_of_memory(self) -> bool:
        """Whether not even one image fitted the device's memory."""
        return self.reason.startswith("OutOfMemoryError")


Message = LoadModel | RunChunk | StopChunk | Ready | Beat | Finished | Raised
_MESSAGE: TypeAdapter[Message] = TypeAdapter(Annotated[Message, Field(discriminator="kind")])


class Channel:
    """One end of the socket; one thread may send while another receives."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._buffer = bytearray()

    def send(self, message: Message) -> None:
        """Send one message; raises OSError if the other end is gone."""
        self._socket.sendall(message.model_dump_json().encode() + b"\n")

    def receive(self, timeout_s: float | None = None) -> Message | None:
        """The next message, or None after `timeout_s`; raises EOFError if the other end is gone."""
        while (end := self._buffer.find(b"\n")) < 0:
            if not select.select([self._socket], [], [], timeout_s)[0]:
                return None
            try:
                data = self._socket.recv(_READ_BYTES)
            except ConnectionError as error:
                raise EOFError("the other process is gone") from error
            if not data:
                raise EOFError("the other process is gone")
            self._buffer += data
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return _MESSAGE.validate_json(line)

    def close(self) -> None:
        """Close this end; the other sees it."""
        self._socket.close()
