"""Two real gloo processes: this file started twice, against the same arithmetic on one process."""

import json
import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from torch import nn

from synthrep_trainer import distributed
from synthrep_trainer.heads import ProjectionHead
from synthrep_trainer.losses import clip_loss, multi_positive_contrastive_loss

RANKS = 2
EXIT_LIMIT_S = 100
# Captions are spread unevenly: rank 0 has rows without a partner, and one caption is on both ranks.
CAPTION_IDS = [0, 1, 2, 3, 4, 0, 5, 5, 5, 2, 6, 6]


def data():
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(len(CAPTION_IDS), 5, generator=generator)
    return inputs, torch.tensor(CAPTION_IDS)


def local(tensor):
    """The rows of this rank: all of them on one process."""
    return tensor.chunk(distributed.world_size())[distributed.rank()]


def contrastive(temperature):
    inputs, caption_ids = data()
    leaf = local(inputs).clone().requires_grad_()
    loss = multi_positive_contrastive_loss(leaf, local(caption_ids), temperature)
    loss.backward()
    return {"value": loss.item(), "gradient": leaf.grad.tolist()}


def no_positive():
    leaf = local(data()[0]).clone().requires_grad_()
    loss = multi_positive_contrastive_loss(leaf, local(torch.arange(len(CAPTION_IDS))))
    loss.backward()
    return {"value": loss.item(), "gradient": leaf.grad.tolist()}


def image_text():
    inputs, caption_ids = data()
    texts = inputs.flip(0)[:6]
    leaves = [local(inputs).clone(), local(texts).clone(), torch.tensor(2.0)]
    images, texts, log_scale = (leaf.requires_grad_() for leaf in leaves)
    loss = clip_loss(
        images,
        texts,
        image_caption_ids=local(caption_ids),
        text_caption_ids=local(torch.arange(6)),
        logit_scale=log_scale.exp(),
    )
    loss.backward()
    return {
        "value": loss.item(),
        "gradient": images.grad.tolist() + texts.grad.tolist(),
        "scale_gradient": log_scale.grad.item(),
    }


def linear_model():
    model = nn.Linear(5, 4)
    with torch.no_grad():
        model.weight.copy_(torch.arange(20.0).sin().view(4, 5))
        model.bias.zero_()
    return model


def averaged_parameter_gradient():
    """What an optimizer sees, with DistributedDataParallel around the model on several ranks."""
    model = linear_model()
    if distributed.world_size() > 1:
        model = nn.parallel.DistributedDataParallel(model)
    inputs, caption_ids = data()
    multi_positive_contrastive_loss(model(local(inputs)), local(caption_ids)).backward()
    return [p.grad.tolist() for p in model.parameters()]


def projection_head(num_views):
    """A training pass of the head, whose batch statistics have to cover all ranks."""
    torch.manual_seed(4)
    head = ProjectionHead(5, hidden=7, dim=3)
    inputs, _ = data()
    leaf = local(inputs).clone().requires_grad_()
    weights = torch.arange(3.0 * len(CAPTION_IDS)).cos().view(-1, 3)
    embeddings = head(leaf, num_views)
    (embeddings * local(weights)).sum().backward()
    return {
        "embeddings": embeddings.tolist(),
        "gradient": leaf.grad.tolist(),
        "buffers": [buffer.tolist() for buffer in head.buffers()],
        "in_evaluation": head.eval()(local(inputs), num_views).tolist(),
    }


def collectives():
    rank = distributed.rank()
    leaf = torch.full((1, 2), rank + 1.0, requires_grad=True)
    gathered = distributed.gather_with_gradient(leaf)
    # Each rank weighs the gathered rows differently; backward has to add both ranks' weights.
    (gathered * torch.tensor([[1.0], [10.0]])[: len(gathered)] * (rank + 1)).sum().backward()
    distributed.barrier()
    return {
        "rank": rank,
        "world_size": distributed.world_size(),
        "ids": distributed.gather(torch.tensor([2**60 + rank])).tolist(),
        "gathered": gathered.tolist(),
        "gather_gradient": leaf.grad.tolist(),
        "sum": distributed.sum_with_gradient(torch.tensor(rank + 1.0)).item(),
        "from_first": distributed.broadcast_json({"rank": rank, "name": "ä", "pair": (1, 2)}),
        "from_last": distributed.broadcast_json(rank, source=distributed.world_size() - 1),
    }


def everything():
    return {
        "contrastive": contrastive(0.1),
        "contrastive_cold": contrastive(0.005),
        "no_positive": no_positive(),
        "image_text": image_text(),
        "parameters": averaged_parameter_gradient(),
        "one_view": projection_head(1),
        "two_views": projection_head(2),
        "collectives": collectives(),
    }


def main(task, folder):
    torch.set_num_threads(1)
    with distributed.process_group(timeout_s=60):
        if task == "fail" and distributed.rank() == 1:
            raise RuntimeError("rank 1 fails on purpose")
        results = everything() if task == "everything" else distributed.barrier()
        Path(folder, f"{distributed.rank()}.json").write_text(json.dumps(results))
    assert distributed.world_size() == 1, "the group outlived its block"


def start_ranks(task, folder):
    """Exit status and standard error of each rank."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(RANKS),
        "OMP_NUM_THREADS": "1",
    }
    with ExitStack() as stack:
        processes = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, __file__, task, str(folder)],
                    env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
            for rank in range(RANKS)
        ]
        for process in processes:
            stack.callback(process.kill)
        errors = [process.communicate(timeout=EXIT_LIMIT_S)[1] for process in processes]
        return [(p.returncode, e) for p, e in zip(processes, errors, strict=True)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The results of every rank of one two-process run."""
    folder = tmp_path_factory.mktemp("ranks")
    for status, error in start_ranks("everything", folder):
        assert status == 0, error
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.fixture(scope="module")
def alone():
    return everything()


@pytest.mark.parametrize("case", ["contrastive", "contrastive_cold", "image_text"])
def test_two_ranks_give_the_value_of_one(ranks, alone, case):
    for result in ranks:
        assert result[case]["value"] == pytest.approx(alone[case]["value"], rel=1e-5)


@pytest.mark.parametrize("case", ["contrastive", "contrastive_cold"])
def test_two_ranks_give_the_gradient_of_one_times_world_size(ranks, alone, case):
    together = torch.tensor([row for result in ranks for row in result[case]["gradient"]])
    expected = RANKS * torch.tensor(alone[case]["gradient"])
    assert (together - expected).norm() <= 1e-5 * expected.norm()


def test_image_text_gradients_of_two_ranks_are_those_of_one_times_world_size(ranks, alone):
    images = torch.tensor([row for r in ranks for row in r["image_text"]["gradient"][:6]])
    texts = torch.tensor([row for r in ranks for row in r["image_text"]["gradient"][6:]])
    expected = RANKS * torch.tensor(alone["image_text"]["gradient"])
    assert (torch.cat([images, texts]) - expected).norm() <= 1e-5 * expected.norm()
    mean_scale_gradient = sum(r["image_text"]["scale_gradient"] for r in ranks) / RANKS
    assert mean_scale_gradient == pytest.approx(alone["image_text"]["scale_gradient"], rel=1e-4)


def test_averaged_parameter_gradients_equal_those_of_one_process(ranks, alone):
    for result in ranks:
        for gradient, expected in zip(result["parameters"], alone["parameters"], strict=True):
            torch.testing.assert_close(torch.tensor(gradient), torch.tensor(expected))


@pytest.mark.parametrize("case", ["one_view", "two_views"])
def test_batch_statistics_cover_all_ranks(ranks, alone, case):
    """Each rank's loss is its own part of the sum, so gradients carry no factor here."""
    for field in ("embeddings", "gradient", "in_evaluation"):
        together = torch.tensor([row for result in ranks for row in result[case][field]])
        torch.testing.assert_close(together, torch.tensor(alone[case][field]))
    for result in ranks:
        for buffer, expected in zip(result[case]["buffers"], alone[case]["buffers"], strict=True):
            assert buffer == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_no_positive_on_any_rank_gives_zero_loss_and_gradient(ranks):
    for result in ranks:
        assert result["no_positive"]["value"] == 0
        assert not torch.tensor(result["no_positive"]["gradient"]).any()


def test_collectives_reach_every_rank_in_rank_order(ranks):
    for rank, result in enumerate(ranks):
        collective = result["collectives"]
        assert collective["rank"] == rank
        assert collective["world_size"] == RANKS
        assert collective["ids"] == [2**60, 2**60 + 1]
        assert collective["gathered"] == [[1.0, 1.0], [2.0, 2.0]]
        assert collective["sum"] == 3.0


def test_gather_adds_the_gradients_of_all_ranks(ranks):
    assert ranks[0]["collectives"]["gather_gradient"] == [[3.0, 3.0]]
    assert ranks[1]["collectives"]["gather_gradient"] == [[30.0, 30.0]]


def test_broadcast_gives_every_rank_the_value_of_the_source(ranks):
    for result in ranks:
        assert result["collectives"]["from_first"] == {"rank": 0, "name": "ä", "pair": [1, 2]}
        assert result["collectives"]["from_last"] == 1


def test_failing_rank_does_not_leave_the_others_waiting(tmp_path):
    (status, _), (failing_status, error) = start_ranks("fail", tmp_path)
    assert failing_status != 0
    assert "rank 1 fails on purpose" in error
    assert status != 0


def test_one_process_needs_no_group(monkeypatch, alone):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with distributed.process_group():
        assert not torch.distributed.is_initialized()
    assert alone["collectives"] == {
        "rank": 0,
        "world_size": 1,
        "ids": [2**60],
        "gathered": [[1.0, 1.0]],
        "gather_gradient": [[1.0, 1.0]],
        "sum": 1.0,
        "from_first": {"rank": 0, "name": "ä", "pair": [1, 2]},
        "from_last": 0,
    }


def test_broadcast_refuses_what_is_not_json():
    with pytest.raises(TypeError):
        distributed.broadcast_json(torch.ones(1))


def test_incomplete_launcher_environment_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="RANK"), distributed.process_group():
        pass


if __name__ == "__main__":
    main(*sys.argv[1:])
