"""Products equal the float64 product whichever library makes them."""

import pytest
import torch

from synthrep_trainer.products import product


@pytest.fixture(params=[True, False], ids=["onednn", "plain"], autouse=True)
def use_onednn(request, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", request.param)
    return request.param and torch.backends.mkldnn.is_available()


def draw(rows, columns, seed):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("rows", "others", "dim"), [(1, 1, 1), (5, 3, 7), (130, 65, 33)])
def test_product_multiplies_by_the_transposed(rows, others, dim):
    left, right = draw(rows, dim, 0), draw(others, dim, 1)
    expected = (left.double() @ right.double().T).float()
    torch.testing.assert_close(product(left, right), expected)
    views = left.T.contiguous().T, right.T.contiguous().T
    torch.testing.assert_close(product(*views), expected)


def test_autocast_leaves_products_in_full_precision():
    left, right = draw(40, 50, 0), draw(30, 50, 1)
    plain = product(left, right)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(product(left, right), plain)


def test_products_go_through_onednn_unless_it_is_switched_off(use_onednn):
    with torch.profiler.profile() as profile:
        product(draw(4, 4, 0), draw(4, 4, 1))
    used = {event.name for event in profile.events()}
    assert ("mkldnn::_linear_pointwise" in used) == use_onednn
