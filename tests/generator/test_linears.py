"""Linear layers through oneDNN: the same numbers, and the old way where it does not apply."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from synthrep_generator.pipelines.linears import OneDnnLinear, take_onednn  # noqa: E402


@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 7), (0, 7), (1, 1, 1, 7)])
@pytest.mark.parametrize("bias", [True, False])
def test_numbers_are_those_of_a_plain_layer(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(7, 11, bias=bias), nn.GELU(), nn.Linear(11, 3))
    inputs = torch.randn(shape)
    with torch.inference_mode():
        plain = network(inputs)
        assert take_onednn(network) == 2
        assert torch.allclose(network(inputs), plain, atol=1e-6)
        turned = torch.randn(7, 4).T
        assert torch.allclose(network(turned), network(turned.contiguous()), atol=1e-6)
    assert isinstance(network[0], OneDnnLinear)


def test_gradients_are_those_of_a_plain_layer() -> None:
    network = nn.Sequential(nn.Linear(4, 2))
    take_onednn(network)
    network(torch.ones(1, 4)).sum().backward()
    assert torch.equal(network[0].weight.grad, torch.ones(2, 4))


def test_other_number_formats_are_left_alone() -> None:
    assert take_onednn(nn.Sequential(nn.Linear(4, 2).to(torch.bfloat16), nn.Conv2d(1, 1, 1))) == 0


def test_nothing_changes_in_a_torch_without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    network = nn.Sequential(nn.Linear(4, 2))
    assert take_onednn(network) == 0
    assert type(network[0]) is nn.Linear
