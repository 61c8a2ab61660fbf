"""The projection head is the published one, with batch statistics by view where asked for."""

import copy

import pytest
import torch
from torch import nn

from synthrep_trainer.heads import CrossRankBatchNorm, ProjectionHead


def features(rows, width=20):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(1))


def test_head_has_the_published_layers():
    head = ProjectionHead(20, hidden=32, dim=8)
    published = nn.Sequential(
        nn.Linear(20, 32),
        nn.BatchNorm1d(32),
        nn.ReLU(),
        nn.Linear(32, 32),
        nn.BatchNorm1d(32),
        nn.ReLU(),
        nn.Linear(32, 8),
    )
    for layer, position in zip(head.linears, (0, 3, 6), strict=True):
        published[position].load_state_dict(layer.state_dict())
    rows = features(12)
    torch.testing.assert_close(head(rows), published(rows))
    torch.testing.assert_close(head.eval()(rows), published.eval()(rows))


def test_head_by_views_equals_one_pass_per_view():
    """Rows of a caption are adjacent, so view k of 3 is every third row from k."""
    head = ProjectionHead(20, hidden=32, dim=8)
    view_by_view = copy.deepcopy(head)
    rows = features(12)
    result = head(rows, num_views=3)
    for view in range(3):
        torch.testing.assert_close(result[view::3], view_by_view(rows[view::3]))
    assert not torch.allclose(result, copy.deepcopy(head)(rows))
    for ours, theirs in zip(head.buffers(), view_by_view.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_head_in_evaluation_treats_rows_alone():
    head = ProjectionHead(20, hidden=32, dim=8)
    head(features(12), num_views=3)
    head.eval()
    torch.testing.assert_close(head(features(6), num_views=3)[:1], head(features(6)[:1]))


def test_views_that_do_not_divide_the_batch_are_refused():
    with pytest.raises(ValueError, match="10 rows do not divide into 3 views"):
        ProjectionHead(20, hidden=32, dim=8)(features(10), num_views=3)


def test_state_dict_of_the_norm_is_that_of_batch_norm():
    plain = nn.BatchNorm1d(8)
    CrossRankBatchNorm(8).load_state_dict(plain.state_dict())
