"""Matrix products of `log_sum_exp` in full fp32, by the fastest library that the machine has.

On a CPU that is oneDNN, by the operator that `torch.compile` emits for linear layers: it takes
transposed views as they are. `torch.mm` calls MKL, which leaves AVX-512 alone on processors that
are not Intel's: 105 against 250 GFLOP/s on one EPYC core. Elsewhere, while compiling and with
`torch.backends.mkldnn` switched off, they are `torch.mm`.

Autocast leaves them alone; on a GPU they follow torch.set_float32_matmul_precision.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def product(
    left: Float[Tensor, "rows dim"], right: Float[Tensor, "others dim"]
) -> Float[Tensor, "rows others"]:
    """left right^T of fp32 matrices, as a new tensor; free of copies where `left` is contiguous."""
    if (
        left.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and not torch.compiler.is_compiling()
    ):
        result: Tensor = torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")
        return result
    with torch.autocast(left.device.type, enabled=False):
        return left @ right.T
