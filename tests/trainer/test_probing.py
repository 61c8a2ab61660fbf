"""From a labelled set and an extractor to one result."""

from __future__ import annotations

import io
import itertools
import json
import tarfile

import numpy as np
import pytest
import safetensors
from PIL import Image

from synthrep_trainer.feature_cache import FeatureCache
from synthrep_trainer.linear_head import LinearHead
from synthrep_trainer.probe_data import ProbeDataError, ProbeDataset, probe_datasets
from synthrep_trainer.probe_features import Memory
from synthrep_trainer.probe_fewshot import FewShotProtocol
from synthrep_trainer.probe_layouts import VOC_CLASSES
from synthrep_trainer.probe_multi_label import OneVersusRestProtocol
from synthrep_trainer.probe_protocols import NeighbourProtocol
from synthrep_trainer.probe_scores import wilson_interval
from synthrep_trainer.probe_sgd import SgdProtocol
from synthrep_trainer.probe_splits import open_split
from synthrep_trainer.probing import BASELINES, probe, raw_pixels


def write_split(folder, split, labels, *, seed):
    """6 px images of noise; the class is the red of the first pixel."""
    rng = np.random.default_rng(seed)
    with tarfile.open(folder / f"{split}.tar", "w") as archive:
        for index, label in enumerate(labels):
            pixels = rng.integers(0, 256, (6, 6, 3), np.uint8)
            pixels[0, 0, 0] = label
            stream = io.BytesIO()
            Image.fromarray(pixels).save(stream, "PNG")
            for suffix, data in (("png", stream.getvalue()), ("cls", str(label).encode())):
                member = tarfile.TarInfo(f"{index}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


def see(images):
    """Features that hold the class, noisily."""
    noise = images[:, 1, 1].astype(np.float64) / 255
    return np.c_[np.eye(3)[images[:, 0, 0, 0]] + 0.3 * noise, noise]


def guess(images):
    """Features that do not."""
    return images[:, 2, 2].astype(np.float32)


@pytest.fixture
def dataset(tmp_path):
    write_split(tmp_path, "train", [0, 1, 2] * 20 + [2] * 10, seed=0)
    write_split(tmp_path, "test", [0] * 20 + [1] * 30 + [2] * 40, seed=1)
    return ProbeDataset("colours", tmp_path)


def run(dataset, extract=see, **options):
    return probe(dataset, extract, image_px=6, **options)


@pytest.mark.parametrize("protocol", [None, NeighbourProtocol()])
def test_features_that_hold_the_class_beat_those_that_do_not(dataset, protocol):
    result = run(dataset, baselines={"random_init": guess}, protocol=protocol)
    assert result.value == 1.0
    assert result.ci95 == wilson_interval(90, 90)
    assert result.baselines["random_init"].value < 0.6
    assert set(result.baselines) == {"random_init", "majority"}


def test_result_says_how_it_came_about(dataset):
    ticks = itertools.count(10.0, 2.5)
    result = run(dataset, clock=lambda: next(ticks))
    assert (result.dataset, result.metric, result.n_test) == ("colours", "accuracy", 90)
    assert (result.protocol, result.protocol_version) == ("linear", 1)
    assert len(result.curve) == 45
    assert result.chosen in {point["strength"] for point in result.curve}
    assert [(row.name, row.n_test, row.value) for row in result.per_class] == [
        ("0", 20, 1.0), ("1", 30, 1.0), ("2", 40, 1.0),
    ]  # fmt: skip
    assert result.seconds == 2.5


def test_baselines_by_default_are_pixels_and_majority(dataset):
    result = run(dataset)
    assert set(result.baselines) == {"pixels", "majority"}
    assert result.baselines["majority"].value == 40 / 90
    assert result.baselines["majority"].chosen is None
    assert result.baselines["pixels"].chosen > 0
    assert result.baselines["pixels"].value < 0.9


def test_equal_seeds_give_equal_results(dataset):
    first, again, other = (
        run(dataset, extract=guess, seed=seed, clock=lambda: 0.0) for seed in (0, 0, 1)
    )
    assert first == again
    assert first.curve != other.curve


def test_choices_are_stored_before_the_test_part_is_read(dataset):
    dataset.path("test").write_bytes(b"not an archive")
    stored = []
    with pytest.raises(ProbeDataError, match=r"test\.tar"):
        run(dataset, store=stored.append)
    assert stored[0].keys() == {"trained", "pixels"}


def test_choices_that_cannot_be_stored_end_the_probe(dataset):
    def fail(choices):
        raise OSError("disk full")

    dataset.path("test").write_bytes(b"not an archive")
    with pytest.raises(OSError, match="disk full"):
        run(dataset, store=fail)


def test_a_validation_part_chooses_where_there_is_one(dataset):
    write_split(dataset.folder, "val", [0, 1, 2] * 9 + [0, 1], seed=2)
    result = run(dataset, extract=guess)
    shares = np.array([point["val"] for point in result.curve]) * 29
    np.testing.assert_allclose(shares, shares.round(), atol=1e-9)
    assert result.n_test == 90


def test_mean_per_class_sets_are_scored_so(tmp_path):
    write_split(tmp_path, "train", [0, 1, 2] * 20, seed=0)
    write_split(tmp_path, "test", [0] * 40 + [1] * 4 + [2] * 4, seed=1)
    result = run(ProbeDataset("pets", tmp_path), extract=guess)
    assert result.metric == "mean_per_class"
    assert result.value == pytest.approx(np.mean([row.value for row in result.per_class]))
    assert result.baselines["majority"].value == pytest.approx(1 / 3)


def test_classes_bear_the_names_of_the_set(dataset):
    (dataset.folder / "classes.txt").write_text("red\ngreen\nblue\n")
    assert [row.name for row in run(dataset).per_class] == ["red", "green", "blue"]


@pytest.mark.parametrize(
    ("train", "test", "names", "words"),
    [
        ([1] * 9, [1], None, "train has one class only"),
        ([0] * 9, [0], "one\n", "train has one class only"),
        ([0, 1] * 9, [0, 2], None, "test has class index 2, which train has not"),
        ([0, 2] * 9, [0, 1], None, "test has class index 1, which train has not"),
        ([0, 1, 2] * 9, [0], "a\nb\n", "class index 2, the set names 2"),
        ([0, 2] * 9, [0], "a\nb\nc\n", "train has no image of class 1, 'b'"),
        ([0, 1, 2], [0], None, "one image a class"),
        ([0, 200] * 9, [0], None, "class index 200 and 18 images"),
    ],
)
def test_labels_that_contradict_each_other_are_refused(tmp_path, train, test, names, words):
    write_split(tmp_path, "train", train, seed=0)
    write_split(tmp_path, "test", test, seed=1)
    if names is not None:
        (tmp_path / "classes.txt").write_text(names)
    with pytest.raises(ProbeDataError, match=words):
        run(ProbeDataset("x", tmp_path), extract=guess, baselines={})


def test_a_class_below_the_first_is_refused(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "annotations").mkdir()
    for image in ("cat_1", "cat_2", "dog_1", "dog_2"):
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / f"{image}.jpg")
    lines = "cat_1 0 1 1\ncat_2 0 1 1\ndog_1 2 2 1\ndog_2 2 2 1\n"
    for part in ("trainval", "test"):
        (tmp_path / "annotations" / f"{part}.txt").write_text(lines)
    with pytest.raises(ProbeDataError, match="train has class index -1"):
        run(ProbeDataset("pets", tmp_path, "pets"), extract=guess, baselines={})


def test_a_class_that_only_val_has_is_refused(dataset):
    write_split(dataset.folder, "val", [0, 5], seed=2)
    with pytest.raises(ProbeDataError, match="val has class index 5"):
        run(dataset, extract=guess)


@pytest.mark.parametrize(
    ("extract", "words"),
    [
        (lambda images: np.zeros((len(images) + 1, 2)), r"expected features \(70, dim\)"),
        (lambda images: np.zeros(len(images)), r"expected features \(70, dim\)"),
        (lambda images: np.full((len(images), 2), np.nan), "not finite"),
    ],
)
def test_an_extractor_at_fault_is_named(dataset, extract, words):
    with pytest.raises(ValueError, match=f"trained: .*{words}"):
        run(dataset, extract=extract)


def test_extractors_see_images_of_the_asked_size_once(dataset):
    seen = []

    def watch(images):
        seen.append(images.shape)
        assert images.dtype == np.uint8
        return images.reshape(len(images), -1)[:, :4]

    probe(dataset, watch, image_px=5, baselines={})
    assert seen == [(70, 5, 5, 3), (90, 5, 5, 3)]


def test_raw_pixels_are_rgb_at_16_px_as_fractions():
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    features = raw_pixels(images)
    assert features.shape == (3, 16 * 16 * 3)
    assert features.dtype == np.float32
    assert 0 <= features.min() < features.max() <= 1
    small = images[:, :16, :16]
    np.testing.assert_array_equal(raw_pixels(small), small.reshape(3, -1) / np.float32(255))


def test_more_baselines_may_be_added_to_the_default_ones(dataset):
    result = run(dataset, baselines={**BASELINES, "random_init": guess})
    assert set(result.baselines) == {"pixels", "random_init", "majority"}


def test_mistakes_are_told_by_pair_of_classes(dataset):
    (dataset.folder / "classes.txt").write_text("red\ngreen\nblue\n")
    result = run(dataset, extract=guess, baselines={})
    assert sum(row.count for row in result.confusion) == round((1 - result.value) * 90)
    assert all(row.truth != row.predicted for row in result.confusion)
    counts = [row.count for row in result.confusion]
    assert counts == sorted(counts, reverse=True)


def test_the_fitted_classifier_may_be_kept_and_gives_the_same_answers(dataset, tmp_path):
    (dataset.folder / "classes.txt").write_text("red\ngreen\nblue\n")
    kept = []
    result = run(dataset, keep_head=lambda *head: kept.append(head), baselines={})
    ((head, names),) = kept
    head.save(tmp_path / "head.safetensors", names=names, protocol="linear/1")
    with safetensors.safe_open(tmp_path / "head.safetensors", "np") as file:
        read = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        assert json.loads(file.metadata()["classes"]) == ["red", "green", "blue"]
    again = LinearHead(**read)
    (batch,) = open_split(dataset, "test", image_px=6)
    found = again.predict(see(batch.images).astype(np.float32))
    assert (found == batch.labels).mean() == result.value


@pytest.mark.parametrize(
    "protocol", [NeighbourProtocol(), SgdProtocol(epochs=2), FewShotProtocol(ways=3, episodes=9)]
)
def test_every_protocol_says_its_name_version_and_settings(dataset, protocol):
    result = run(dataset, protocol=protocol)
    assert (result.protocol, result.protocol_version) == (protocol.name, protocol.version)
    assert result.settings == protocol.settings
    assert set(result.baselines) == {"pixels", "majority"}


@pytest.fixture
def voc(tmp_path):
    """A class is there where the red, green, … of the first pixels is bright."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "VOCdevkit" / "VOC2007"
    (folder / "JPEGImages").mkdir(parents=True)
    (folder / "ImageSets" / "Main").mkdir(parents=True)
    for split, count in (("train", 30), ("val", 20), ("test", 40)):
        labels = rng.choice([-1, 0, 1], (count, 20), p=[0.6, 0.1, 0.3])
        for name, column in zip(VOC_CLASSES, labels.T, strict=True):
            lines = [f"{split}{k} {label:2d}" for k, label in enumerate(column)]
            (folder / "ImageSets" / "Main" / f"{name}_{split}.txt").write_text("\n".join(lines))
        for k, row in enumerate(labels):
            pixels = np.full((8, 160, 3), 40, np.uint8)
            pixels += np.repeat(row == 1, 8)[None, :, None] * np.uint8(180)
            image = Image.fromarray(pixels).resize((160, 160))
            image.save(folder / "JPEGImages" / f"{split}{k}.jpg")
    return probe_datasets(originals=tmp_path)["voc2007"]


def see_stripes(images):
    return images.mean((1, 3)).reshape(len(images), 20, 2).mean(2)


def test_a_set_of_several_labels_is_judged_by_its_mean_average_precision(voc):
    result = probe(voc, see_stripes, image_px=40, baselines={})
    assert (result.metric, result.protocol, result.n_test) == ("map_11point", "linear", 40)
    assert result.value > 0.9
    assert result.baselines["majority"].value < 0.6
    assert [row.name for row in result.per_class] == list(VOC_CLASSES)


def test_a_protocol_that_does_not_suit_the_labels_is_refused(voc, dataset):
    with pytest.raises(ValueError, match="voc2007 has several labels an image"):
        probe(voc, see_stripes, protocol=NeighbourProtocol())
    with pytest.raises(ValueError, match="colours has one label an image"):
        run(dataset, protocol=OneVersusRestProtocol())


class Watched:
    """An extractor that counts the images it has seen."""

    def __init__(self, extract):
        self.extract, self.num_images = extract, 0

    def __call__(self, images):
        self.num_images += len(images)
        return self.extract(images)


@pytest.fixture
def remembered(dataset, tmp_path):
    """Probe the same set with a memory; the result, and how many images each extractor saw."""

    def once(trained="t/1", random_init="r/1", **options):
        cache = FeatureCache(tmp_path / "cache", max_bytes=2**20)
        memory = Memory(cache, {"trained": trained, "random_init": random_init})
        seen = Watched(see), Watched(guess), Watched(raw_pixels)
        result = run(
            dataset,
            extract=seen[0],
            baselines={"random_init": seen[1], "pixels": seen[2]},
            memory=memory,
            clock=lambda: 0.0,
            **options,
        )
        return result, tuple(extractor.num_images for extractor in seen)

    return once


def test_what_was_extracted_before_is_not_extracted_again(remembered):
    first, seen = remembered()
    assert seen == (160, 160, 160)
    again, seen = remembered()
    assert again == first
    assert seen == (0, 0, 160)  # pixels were given no identity here


def test_a_score_that_another_version_left_is_computed_anew(remembered, tmp_path):
    first, _ = remembered()
    (note,) = (tmp_path / "cache").glob("*.json")
    note.write_text('{"accuracy": 0.5}')
    assert remembered()[0] == first


def test_another_checkpoint_is_extracted_beside_the_same_baselines(remembered):
    first, _ = remembered()
    second, seen = remembered(trained="t/2")
    assert seen == (160, 0, 160)
    assert second == first


def test_another_protocol_takes_the_features_and_not_the_scores(remembered):
    first, _ = remembered()
    second, seen = remembered(protocol=NeighbourProtocol())
    assert seen == (0, 0, 160)
    assert second.baselines["random_init"] != first.baselines["random_init"]


def test_a_split_that_was_replaced_is_extracted_anew(remembered, dataset):
    remembered()
    write_split(dataset.folder, "test", [0, 1, 2], seed=8)
    _, seen = remembered()
    assert seen == (3, 3, 73)  # only the new test images


def test_remembered_results_are_those_of_a_probe_without_memory(remembered, dataset):
    remembered()
    result, _ = remembered()
    plain = run(dataset, baselines={"random_init": guess, "pixels": raw_pixels}, clock=lambda: 0.0)
    assert result == plain


def test_remembered_features_of_test_stay_sealed_until_the_choice_is_stored(remembered):
    remembered()
    with pytest.raises(OSError, match="disk full"):
        remembered(store=lambda choices: (_ for _ in ()).throw(OSError("disk full")))
