"""The probe worker judges a checkpoint beside what it has to beat."""

from __future__ import annotations

import io
import json
import sys
import tarfile

import numpy as np
import PIL.Image
import pytest
import torch

from synthrep_shared.messages import ProbeRequest, RunRequest
from synthrep_trainer import probes
from synthrep_trainer.checkpoint import load_newest, save_checkpoint
from synthrep_trainer.encoder import EncoderConfig, make_encoder
from synthrep_trainer.errors import NoCheckpointError
from synthrep_trainer.feature_maps import read_feature_map
from synthrep_trainer.probe_data import ProbeDataError
from synthrep_trainer.runs import Workplace
from synthrep_trainer.settings import TrainerSettings
from synthrep_trainer.views import probe_view

ENCODER = {"model": "vit_synthrep_tiny", "image_size_px": 16}


def labelled_set(folder, *, num_images, seed):
    """Two classes of noise that differ in brightness a little."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    for split in ("train", "test"):
        with tarfile.open(folder / f"{split}.tar", "w") as tar:
            for k in range(num_images):
                pixels = random.integers(0, 200, (16, 16, 3)) + 3 * (k % 2)
                buffer = io.BytesIO()
                PIL.Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
                for suffix, data in (("png", buffer.getvalue()), ("cls", str(k % 2).encode())):
                    info = tarfile.TarInfo(f"{k:04d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def settings(tmp_path):
    torch.set_num_threads(1)
    labelled_set(tmp_path / "sets" / "probe" / "light", num_images=60, seed=0)
    return TrainerSettings(runs=tmp_path / "runs", probe_data=tmp_path / "sets", threads=1)


@pytest.fixture
def place(settings):
    return Workplace(settings.runs)


@pytest.fixture
def run(place):
    """A run with checkpoints 3 and 6, whose encoders are untrained ones of other seeds."""
    folder = place.submit_run(RunRequest(dataset="birds", max_steps=9, image_size=16, seed=5))
    for step in (3, 6):
        encoder = make_encoder(EncoderConfig(**ENCODER), seed=100 + step).state_dict()
        state = {"encoder": ENCODER, "request": {"seed": 5}}
        save_checkpoint(folder.checkpoints, step, {"encoder": encoder}, state)
    return folder


@pytest.mark.parametrize("protocol", ["linear", "knn", "imagenet-linear"])
def test_a_runs_newest_checkpoint_is_judged(place, settings, run, protocol):
    request = ProbeRequest(run_id=run.id, dataset="light", protocol=protocol)
    folder = place.submit_probe(request)
    probes.judge(folder, place, settings)
    result = json.loads(folder.result.read_bytes())
    assert result["checkpoint"] == f"runs/{run.id}/checkpoints/step-000000006"
    assert (result["protocol"], result["metric"], result["n_test"]) == (protocol, "accuracy", 60)
    assert set(result["baselines"]) == {"majority", "pixels", "random_init"}
    assert result["baselines"]["majority"]["value"] == 0.5
    assert result["ci95"][0] <= result["value"] <= result["ci95"][1]
    assert folder.head.exists() == (protocol != "knn")
    view = probe_view(folder)  # no status yet: the launcher writes it
    assert view.value is None


def test_a_checkpoint_is_judged_by_its_path(place, settings, run):
    path = f"runs/{run.id}/checkpoints/step-000000003"
    folder = place.submit_probe(ProbeRequest(checkpoint=path, dataset="light", protocol="knn"))
    probes.judge(folder, place, settings)
    assert json.loads(folder.result.read_bytes())["checkpoint"] == path


def test_a_judged_checkpoint_leaves_a_map_of_its_runs_images(place, settings, run, shard_maker):
    shard_maker.commit(4)
    settings = settings.model_copy(update={"root": shard_maker.paths.root})
    request = ProbeRequest(run_id=run.id, dataset="light", protocol="knn")
    probes.judge(place.submit_probe(request), place, settings)
    drawn = read_feature_map(run.path)
    assert drawn is not None
    assert (drawn.step, len(drawn.groups), len(drawn.images)) == (6, 4, 12)


def test_a_map_that_cannot_be_drawn_costs_no_result(place, settings, run, shard_maker):
    shard_maker.paths.log.write_text("no record\n")
    settings = settings.model_copy(update={"root": shard_maker.paths.root})
    folder = place.submit_probe(ProbeRequest(run_id=run.id, dataset="light", protocol="knn"))
    probes.judge(folder, place, settings)
    assert folder.result.exists()
    assert read_feature_map(run.path) is None


def test_a_probe_that_is_killed_over_its_map_is_judged_once(place, settings, run, monkeypatch):
    def die(*_args, **_settings):
        raise SystemExit

    monkeypatch.setattr(probes, "draw_feature_map", die)
    folder = place.submit_probe(ProbeRequest(run_id=run.id, dataset="light", protocol="knn"))
    with pytest.raises(SystemExit):
        probes.judge(folder, place, settings)
    result = folder.result.read_bytes()
    probes.judge(folder, place, settings)
    assert folder.result.read_bytes() == result


def test_features_are_those_of_the_saved_and_of_the_untrained_encoder(run):
    config, trained, untrained = probes.encoders_of(load_newest(run.checkpoints))
    images = np.random.default_rng(0).integers(0, 256, (300, 16, 16, 3), dtype=np.uint8)
    for encoder, seed in ((trained, 106), (untrained, 5)):
        features = probes.FrozenEncoder(encoder, torch.device("cpu"))(images)
        expected = probes.FrozenEncoder(make_encoder(config, seed=seed), torch.device("cpu"))
        assert features.shape == (300, 128)
        assert features.dtype == np.float32
        np.testing.assert_array_equal(features, expected(images))


def test_what_is_not_there_says_so(place, settings, run):
    empty = place.submit_run(RunRequest(dataset="birds", max_steps=9))
    asked = [
        (ProbeRequest(run_id=empty.id, dataset="light"), NoCheckpointError, "no checkpoint yet"),
        (ProbeRequest(run_id="gone", dataset="light"), NoCheckpointError, "no checkpoint yet"),
        (ProbeRequest(run_id=run.id, dataset="gone"), ProbeDataError, "no labelled set"),
        (
            ProbeRequest(checkpoint=f"runs/{run.id}/checkpoints/step-000000001", dataset="light"),
            NoCheckpointError,
            "no longer kept",
        ),
    ]
    for request, error, words in asked:
        with pytest.raises(error, match=words):
            probes.judge(place.submit_probe(request), place, settings)


def test_the_worker_leaves_last_words(monkeypatch, place, settings):
    folder = place.submit_probe(ProbeRequest(run_id="gone", dataset="light"))
    monkeypatch.setattr(sys, "argv", ["probes", "--probe", str(folder.path)])
    monkeypatch.setenv("SYNTHREP_TRAINER_RUNS", str(settings.runs))
    with pytest.raises(SystemExit, match="1"):
        probes.main()
    assert folder.failure.error == "NoCheckpointError: run gone has no checkpoint yet"
    assert folder.failure.is_permanent


@pytest.mark.parametrize(
    ("weights", "has_average", "seed"),
    [("auto", True, 8), ("auto", False, 7), ("last", True, 7), ("ema", True, 8)],
)
def test_the_averaged_encoder_is_judged_where_there_is_one(tmp_path, weights, has_average, seed):
    parts = {"encoder": 7} | ({"ema_encoder": 8} if has_average else {})
    config = EncoderConfig(**ENCODER)
    tensors = {part: make_encoder(config, seed=s).state_dict() for part, s in parts.items()}
    save_checkpoint(tmp_path, 1, tensors, {"encoder": ENCODER, "request": {"seed": 5}})
    _, trained, _ = probes.encoders_of(load_newest(tmp_path), weights)
    expected = make_encoder(config, seed=seed).state_dict()
    assert all(torch.equal(t, expected[name]) for name, t in trained.state_dict().items())


def test_an_averaged_encoder_that_is_not_there_is_an_error(run):
    with pytest.raises(ValueError, match="holds no averaged encoder"):
        probes.encoders_of(load_newest(run.checkpoints), "ema")


def test_few_shot_tasks_that_the_set_cannot_fill_are_refused(place, settings, run):
    request = ProbeRequest(run_id=run.id, dataset="light", protocol="fewshot")
    with pytest.raises(ValueError, match="needs 5 classes .* there are 2"):
        probes.judge(place.submit_probe(request), place, settings)


def test_baselines_are_computed_once_for_all_checkpoints(place, settings, run, monkeypatch):
    results = []
    for step in (3, 6):
        request = ProbeRequest(
            checkpoint=f"runs/{run.id}/checkpoints/step-{step:09d}", dataset="light"
        )
        folder = place.submit_probe(request)
        probes.judge(folder, place, settings)
        results.append(json.loads(folder.result.read_bytes()))
        monkeypatch.setattr(probes, "BASELINES", {"pixels": None})  # not called any more
    assert results[0]["baselines"] == results[1]["baselines"]
    assert results[0]["hits"] != results[1]["hits"]


def test_no_cache_is_kept_where_the_settings_give_it_no_room(place, settings, run):
    settings = settings.model_copy(update={"probe_cache_bytes": 0})
    probes.judge(place.submit_probe(ProbeRequest(run_id=run.id, dataset="light")), place, settings)
    assert not (place.root / "probe-cache").exists()
