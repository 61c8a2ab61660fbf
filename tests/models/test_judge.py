"""What judges the model, on cases whose answer is known; and the photos that it judges by."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models.training.judge import nearest_photo, spread_within
from models.training.photos import load_photos


def test_copies_of_photos_are_seen(pixels):
    """Half of the pictures are photos of the training set; held-out photos are none."""
    random = np.random.default_rng(1)
    pictures = random.integers(0, 256, (9, 32, 32, 3), dtype=np.uint8)
    pictures[:5] = pixels[10:15]
    held_out = random.integers(0, 256, (7, 32, 32, 3), dtype=np.uint8)
    figures = nearest_photo(pictures, pixels, held_out)
    assert figures["nearest_photo_rms_min"] == pytest.approx(0, abs=1e-3)
    assert figures["nearest_photo_rms_median"] == pytest.approx(0, abs=1e-3)
    # Two independent uniform pixels differ by 1/sqrt(6) = 0.408 in the root mean square.
    assert 0.37 < figures["held_out_nearest_rms_min"] <= figures["held_out_nearest_rms_median"]
    assert figures["held_out_nearest_rms_median"] < 0.41


def test_the_nearest_photo_is_that_of_the_slow_way(pixels):
    random = np.random.default_rng(2)
    pictures = random.integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    slow = [
        min(float(np.sqrt(np.square((a - b.astype(float)) / 255).mean())) for b in pixels)
        for a in pictures
    ]
    figures = nearest_photo(pictures, pixels, pictures)
    assert figures["nearest_photo_rms_min"] == pytest.approx(min(slow), abs=1e-4)
    assert figures["held_out_nearest_rms_median"] == pytest.approx(sorted(slow)[1], abs=1e-4)


def test_a_photo_one_level_brighter_is_one_level_away(pixels):
    photos = np.minimum(pixels, 254)
    figures = nearest_photo(photos[:3] + 1, photos, photos[:3])
    assert figures["nearest_photo_rms_median"] == pytest.approx(1 / 255, rel=0.02)


def test_spread_within_is_the_mean_over_groups_of_their_mean_distance():
    features = torch.tensor(
        [[0.0, 0.0], [9.0, 9.0], [3.0, 4.0], [0.0, 0.0], [0.0, 1.0], [5.0, 5.0]]
    )
    groups = np.array([0, 1, 0, 2, 2, 2])
    third = (1 + 50**0.5 + 41**0.5) / 3
    assert spread_within(features, groups) == pytest.approx((5 + third) / 2)


def test_equal_images_of_each_caption_have_no_spread():
    features = torch.tensor([[1.0, 0.0]] * 3 + [[0.0, 1.0]] * 3)
    assert spread_within(features, np.repeat([4, 7], 3)) == 0


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def png(colour: tuple[int, int, int], size: tuple[int, int] = (32, 32)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, colour).save(stream, "PNG")
    return stream.getvalue()


def test_photos_and_labels_come_by_name_from_either_layout(tmp_path):
    photos = write_tar(
        tmp_path / "photos.tar",
        {
            "x/b.png": png((1, 2, 3), (64, 40)), "x/b.cls": b"2", "x/3-00.png": png((9, 9, 9)),
            "x/a.cls": b"0", "x/a.png": png((4, 5, 6)),
        },
    )  # fmt: skip
    images, labels = load_photos(photos, num_classes=4)
    assert labels.tolist() == [3, 0, 2]
    assert images.shape == (3, 32, 32, 3)
    assert images[:, 16, 16].tolist() == [[9, 9, 9], [4, 5, 6], [1, 2, 3]]


@pytest.mark.parametrize("members", [{"4-0.png": png((0, 0, 0))}, {"bird.png": png((0, 0, 0))}])
def test_a_photo_without_a_known_class_is_refused(tmp_path, members):
    with pytest.raises(ValueError, match="1 images have no class below 4"):
        load_photos(write_tar(tmp_path / "photos.tar", members), num_classes=4)
