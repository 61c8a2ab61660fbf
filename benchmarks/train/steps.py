"""The rate of a ViT step in fp32 on one thread, as a share of a large matrix product's rate."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import Dose, Measured, case, cpu_s, in_process, interleave
from benchmarks.train.runs import waiting_share
from synthrep_trainer.encoder import EncoderConfig, make_encoder

_BATCH = 64
_SIDE_PX = 32
_GEMM = 1024
_STEPS = 3


@case(
    "step of vit_synthrep_tiny at 32 px, 64 images",
    unit="GFLOP/s of a core",
    peer="matrix product of 1024 x 1024, the ceiling",
    min_ratio=0.6,
)
def tiny_step(dose: Dose) -> Measured:
    """The ratio is the share of the ceiling: backbone forward, backward and AdamW."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        step, product = _step(), _product()
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            step()  # the kernel whose products the counter sees
        flops = counter.get_total_flops()
        return interleave(
            lambda: _rate(step, flops), lambda: _rate(product, 2 * _GEMM**3), rounds=dose.rounds(9)
        )
    finally:
        torch.set_num_threads(threads)


@case("time waiting for data, the demo's setting", unit="part of a run", peer="",
      higher_is_better=False, max_value=0.05)  # fmt: skip
def waiting(dose: Dose) -> Measured:
    """Of a run whose images are all there: outside of waits for the generator."""
    steps = dose.size(20, 6)
    return Measured(in_process(waiting_share, steps=steps), None, 1, f"{steps} steps")


def _rate(work: Callable[[], object], flops: int) -> float:
    return 1e-9 * _STEPS * flops / cpu_s(lambda: [work() for _ in range(_STEPS)])


def _step() -> Callable[[], object]:
    config = EncoderConfig("vit_synthrep_tiny", _SIDE_PX)
    backbone = make_encoder(config, seed=0).backbone.train()
    optimizer = torch.optim.AdamW(backbone.parameters())
    images = torch.randn(_BATCH, 3, _SIDE_PX, _SIDE_PX, generator=torch.Generator().manual_seed(0))

    def step() -> None:
        backbone(images).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _product() -> Callable[[], object]:
    left, right = torch.randn(2, _GEMM, _GEMM, generator=torch.Generator().manual_seed(0))
    return lambda: left @ right
