"""What the device process tells of errors and of its memory."""

from __future__ import annotations

import pytest

from synthrep_generator.device_process import is_device_fault, private_bytes


class AcceleratorError(RuntimeError):
    """As torch names what CUDA reports."""


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
    taken = b"\x01" * (32 << 20)
    assert private_bytes() - before > 30 << 20
    del taken
