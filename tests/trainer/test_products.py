"""Products equal the float64 product whichever library makes them."""

import pytest
import torch

from synthrep_trainer.products import packed, product


@pytest.fixture(params=[True, False], ids=["onednn", "plain"], autouse=True)
def use_onednn(request, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", request.param)
    return request.param and torch.backends.mkldnn.is_available()


def draw(rows, columns, seed):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("rows", "others", "dim"), [(1, 1, 1), (5, 3, 7), (130, 65, 33)])
def test_product_multiplies_by_the_transposed(rows, others, dim):
    left, right = draw(rows, dim, 0), draw(dim, others, 1).T
    result = product(packed(left), packed(right))
    torch.testing.assert_close(result, (left.double() @ right.double().T).float())
    assert result.layout == torch.strided


def test_autocast_leaves_products_in_full_precision():
    left, right = draw(40, 50, 0), draw(30, 50, 1)
    plain = product(packed(left), packed(right))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(product(packed(left), packed(right)), plain)


def test_products_go_through_onednn_unless_it_is_switched_off(use_onednn):
    assert packed(draw(4, 4, 0)).is_mkldnn == use_onednn
