"""What the device process tells of errors and of its memory."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from synthrep_generator import device_process
from synthrep_generator.chunks import Place, chunk_from_places
from synthrep_generator.device_process import (
    DeviceProcess,
    is_device_fault,
    private_bytes,
    warm_up,
)
from synthrep_generator.pipe import Channel, Finished, Message, Ready
from synthrep_generator.settings import ModelConfig
from tests.generator.counting import CountingFakeSynthesizer


class AcceleratorError(RuntimeError):
    """As torch names what CUDA reports."""


class Deaf(Channel):
    """Keeps what is sent."""

    def __init__(self, sent: list[Any]) -> None:
        self._sent = sent

    def send(self, message: Message) -> None:
        self._sent.append(message)


class Derived(AcceleratorError):
    """A later kind of it."""


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (AcceleratorError("unspecified launch failure"), True),
        (Derived("ECC"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling cublasGemm"), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), False),
        (RuntimeError("shape mismatch"), False),
        (ValueError("CUDA error"), False),
    ],
)
def test_errors_of_the_device_are_told_from_others(error: Exception, wanted: bool) -> None:
    assert is_device_fault(error) == wanted


def test_the_accelerator_error_of_torch_is_one() -> None:
    torch = pytest.importorskip("torch")
    assert is_device_fault(torch.AcceleratorError("an illegal instruction"))
    assert not is_device_fault(torch.OutOfMemoryError("CUDA out of memory"))


def test_memory_that_is_taken_is_counted() -> None:
    before = private_bytes()
    with mmap.mmap(-1, 32 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as taken:
        taken.write(b"\x01" * len(taken))  # a heap may have had room for as much
        assert private_bytes() - before > 30 << 20


def test_memory_that_each_load_of_a_model_costs_adds_up(
    generator_stack: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = {"path": "absent", "generate_px": 16, "store_px": 16, "device_batch_images": 4}
    stack = generator_stack(models={"one": model, "two": model})
    taken: list[bytes] = []
    make = device_process.make_synthesizer

    def make_and_leak(*arguments: Any) -> Any:
        taken.append(b"\x01" * (32 << 20))
        return make(*arguments)

    monkeypatch.setattr(device_process, "make_synthesizer", make_and_leak)
    sent: list[Message] = []
    process = DeviceProcess(stack.settings, Deaf(sent))
    for number, alias in enumerate(["one", "two", "one", "two"]):
        stack.accept(["a"], batch=f"b{number}", images=1, model=alias)
        process._run(chunk_from_places("birds", [Place(f"b{number}", 0)]))
    grown = [message.grown_bytes for message in sent if isinstance(message, Finished)]
    assert grown[0] < 30 << 20
    assert grown[-1] > 60 << 20


def test_judges_are_loaded_before_a_run_is_ready(
    generator_stack: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    stack = generator_stack()
    stack.accept(["a"])
    sent: list[Any] = []
    process = DeviceProcess(stack.settings, Deaf(sent))
    load = process._load_judges

    def note_and_load(*arguments: Any) -> Any:
        sent.append("judges")
        return load(*arguments)

    monkeypatch.setattr(process, "_load_judges", note_and_load)
    process._run(chunk_from_places("birds", [Place("b0", 0)]))
    assert sent[0] == "judges"  # from Ready on, silence counts as a hang
    assert isinstance(sent[1], Ready)
    assert sent[-1].committed == 1


@pytest.mark.parametrize(("compiles", "sizes"), [(False, [1]), (True, [1, 8, 4])])
def test_what_is_compiled_for_a_full_pass_is_compiled_before_the_first_one(
    compiles: bool, sizes: list[int]
) -> None:
    synthesizer = CountingFakeSynthesizer(store_px=8, batch_images=8)
    warm_up(synthesizer, ModelConfig(path=Path("absent"), compile=compiles))
    assert synthesizer.passes == sizes
