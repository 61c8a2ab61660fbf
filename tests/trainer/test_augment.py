"""Views against torchvision's transforms on PIL images: equal operations, equal distributions."""

import subprocess
import sys
from dataclasses import replace
from itertools import permutations

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from scipy.stats import ks_2samp
from torchvision import transforms
from torchvision.transforms import functional as TF

from synthrep_trainer import augment as module
from synthrep_trainer.augment import AugmentConfig, augment, normalise, use_one_thread

# Nothing but the crop, and that of the whole image: a base to switch single steps on.
IDENTITY = AugmentConfig(
    image_size_px=48,
    crop_scale=(1.0, 1.0),
    crop_ratio=(1.0, 1.0),
    jitter_probability=0.0,
    grayscale_probability=0.0,
    blur_probability=0.0,
    flip_probability=0.0,
)
# Two samples of one law fall below this p-value once in a thousand choices of the seeds.
LEAST_P_VALUE = 1e-3


@pytest.fixture
def photo():
    """Smooth coloured noise of 48 x 48 pixels that reaches both ends of the range."""
    noise = np.random.default_rng(7).normal(size=(48, 48, 3)).astype(np.float32)
    smooth = cv2.GaussianBlur(noise, (0, 0), 4)
    return cv2.normalize(smooth, None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8)


def views(image, config, count):
    return [augment(image, config, seed=seed) for seed in range(count)]


def torchvision_views(image, transform, count):
    torch.manual_seed(0)
    picture = Image.fromarray(image)
    return [np.asarray(transform(picture)) for _ in range(count)]


def assert_same_law(measure, ours, theirs):
    result = ks_2samp([measure(view) for view in ours], [measure(view) for view in theirs])
    assert result.pvalue > LEAST_P_VALUE, result


def test_crops_cover_the_areas_ratios_and_places_of_torchvision():
    """Red is x and green is y, so a view tells where it was cut."""
    axis = np.arange(256, dtype=np.uint8)
    image = np.dstack([*np.meshgrid(axis, axis), np.zeros((256, 256), np.uint8)])
    config = replace(IDENTITY, image_size_px=64, crop_scale=(0.08, 1.0), crop_ratio=(3 / 4, 4 / 3))
    ours = views(image, config, 800)
    bicubic = transforms.InterpolationMode.BICUBIC
    theirs = torchvision_views(image, transforms.RandomResizedCrop(64, interpolation=bicubic), 800)

    def sides(view):
        return [float(np.ptp(view[..., channel])) + 1 for channel in (0, 1)]

    assert_same_law(lambda view: np.prod(sides(view)), ours, theirs)
    assert_same_law(lambda view: np.log(sides(view)[0] / sides(view)[1]), ours, theirs)
    assert_same_law(lambda view: view[..., 0].mean(), ours, theirs)
    assert_same_law(lambda view: view[..., 1].mean(), ours, theirs)


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(200, 30, (40, 30)), (30, 200, (30, 40)), (200, 200, (200, 200))],
    ids=["tall", "wide", "square"],
)
def test_crop_that_never_fits_becomes_the_largest_of_allowed_ratio(height, width, expected):
    config = replace(IDENTITY, crop_scale=(1.0, 1.0), crop_ratio=(3 / 4, 4 / 3))
    sizes = {
        module._crop_size(height, width, config, np.random.default_rng(seed)) for seed in range(20)
    }
    assert sizes == {expected}


@pytest.mark.parametrize("ratio", [(0.1, 0.2), (5.0, 10.0)])
def test_extreme_ratio_of_a_tiny_image_still_leaves_a_pixel(ratio):
    config = replace(IDENTITY, crop_ratio=ratio)
    assert augment(np.full((1, 1), 9, np.uint8), config, seed=0).min() == 9


def saturation(view):
    return np.ptp(view.astype(float), axis=2).mean() / (view.mean() + 1)


def hue(view):
    hsv = cv2.cvtColor(view, cv2.COLOR_RGB2HSV_FULL).astype(float)
    return np.angle((hsv[..., 1] * np.exp(2j * np.pi * hsv[..., 0] / 256)).mean())


@pytest.mark.parametrize(
    ("active", "measures"),
    [
        ({"brightness": 0.4}, [np.mean, np.std]),
        ({"contrast": 0.4}, [np.mean, np.std]),
        ({"saturation": 0.4}, [saturation]),
        ({"hue": 0.1}, [hue]),
        (
            {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1},
            [np.mean, np.std, saturation, hue],
        ),
    ],
    ids=["brightness", "contrast", "saturation", "hue", "all"],
)
def test_colour_jitter_follows_the_law_of_torchvision(photo, active, measures):
    strengths = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0} | active
    ours = views(photo, replace(IDENTITY, jitter_probability=1.0, **strengths), 600)
    theirs = torchvision_views(photo, transforms.ColorJitter(**strengths), 600)
    for measure in measures:
        assert_same_law(measure, ours, theirs)


@pytest.mark.parametrize("factor", [0.6, 0.83, 1.0, 1.4])
def test_single_colour_changes_equal_those_of_torchvision(photo, factor):
    picture = Image.fromarray(photo)
    grey_level = round(float(np.asarray(picture.convert("L")).mean()))
    pairs = [
        (module._blend(photo, 0, factor), TF.adjust_brightness(picture, factor), 0),
        (module._blend(photo, grey_level, factor), TF.adjust_contrast(picture, factor), 0),
        (module._change_saturation(photo, factor), TF.adjust_saturation(picture, factor), 1),
    ]
    for ours, theirs, tolerance in pairs:
        difference = ours.astype(int) - np.asarray(theirs).astype(int)
        assert np.abs(difference).max() <= tolerance
        assert np.abs(difference).mean() < 0.25  # half a level where rounding differs throughout


@pytest.mark.parametrize("steps", [-64, -25, -10, 0, 7, 25, 64])
def test_hue_turns_as_in_torchvision(photo, steps):
    """In whole steps, since torchvision truncates to 255ths of a circle."""
    circles = (steps + np.sign(steps) / 100) / 255
    theirs = np.asarray(TF.adjust_hue(Image.fromarray(photo), circles)).astype(int)
    difference = np.abs(module._turn_hue(photo, circles).astype(int) - theirs)
    assert difference.mean() < 1
    assert difference.max() <= 12


def test_hue_that_does_not_turn_changes_nothing(photo):
    assert np.array_equal(module._turn_hue(photo, 0.001), photo)


def test_colour_changes_come_in_every_order(photo, monkeypatch):
    order = []
    monkeypatch.setattr(module, "_factor", lambda strength, rng: order.append(strength) or 1.0)
    monkeypatch.setattr(module, "_turn_hue", lambda pixels, _: order.append("hue") or pixels)
    config = replace(IDENTITY, jitter_probability=1.0, brightness=0.1, contrast=0.2, saturation=0.3)
    seen = set()
    for seed in range(300):
        order.clear()
        augment(photo, config, seed=seed)
        seen.add(tuple(order))
    assert seen == set(permutations([0.1, 0.2, 0.3, "hue"]))


def test_contrast_keeps_the_mean_grey_level(photo):
    config = replace(
        IDENTITY, jitter_probability=1.0, brightness=0.0, contrast=0.2, saturation=0.0, hue=0.0
    )
    grey = photo // 2 + 60  # far enough from both ends not to be clipped
    assert all(abs(view.mean() - grey.mean()) < 1.5 for view in views(grey, config, 50))


def test_same_seed_gives_the_same_bytes(photo):
    config = AugmentConfig(image_size_px=40, downsample_probability=0.5)
    for seed in range(30):
        first = augment(photo, config, seed=seed)
        assert np.array_equal(first, augment(photo, config, seed=seed))
        assert np.array_equal(first, augment(photo, config, seed=np.random.default_rng(seed)))


def test_two_draws_of_one_generator_are_two_views(photo):
    rng = np.random.default_rng(0)
    config = AugmentConfig.for_image_size(32)
    first, second = (augment(photo, config, seed=rng) for _ in range(2))
    assert not np.array_equal(first, second)


def test_view_ignores_the_global_random_state(photo):
    np.random.seed(1)
    first = augment(photo, AugmentConfig(), seed=5)
    np.random.seed(2)
    assert np.array_equal(first, augment(photo, AugmentConfig(), seed=5))


def test_image_stays_as_it_was_and_shares_no_memory(photo):
    photo.setflags(write=False)
    before = photo.copy()
    for config in (IDENTITY, AugmentConfig(), replace(IDENTITY, downsample_probability=1.0)):
        view = augment(photo, config, seed=0)
        assert not np.shares_memory(view, photo)
        assert view.flags.writeable
    assert np.array_equal(photo, before)


@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (50, 1), (2, 3), (7, 200), (300, 260)])
@pytest.mark.parametrize("channels", [(), (1,), (3,)])
@pytest.mark.parametrize("size", [1, 32, 224])
def test_any_image_gives_a_square_uint8_rgb_view(shape, channels, size):
    image = np.random.default_rng(0).integers(0, 256, (*shape, *channels), dtype=np.uint8)
    config = replace(AugmentConfig(image_size_px=size), downsample_probability=0.5)
    for view in views(image, config, 4):
        assert view.shape == (size, size, 3)
        assert view.dtype == np.uint8
        assert view.flags.c_contiguous


def test_grey_image_equals_its_rgb_copy():
    grey = np.random.default_rng(0).integers(0, 256, (40, 30), dtype=np.uint8)
    rgb = np.repeat(grey[..., None], 3, axis=2)
    for seed in range(10):
        expected = augment(rgb, AugmentConfig(), seed=seed)
        assert np.array_equal(augment(grey, AugmentConfig(), seed=seed), expected)
        assert np.array_equal(augment(grey[..., None], AugmentConfig(), seed=seed), expected)


def test_whole_crop_without_other_steps_is_the_image(photo):
    assert all(np.array_equal(view, photo) for view in views(photo, IDENTITY, 5))


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        ("flip_probability", lambda image: image[:, ::-1]),
        ("grayscale_probability", lambda image: np.asarray(Image.fromarray(image).convert("L"))),
    ],
)
@pytest.mark.parametrize("probability", [0.2, 0.5])
def test_step_is_applied_as_often_as_asked(photo, step, expected, probability):
    changed = expected(photo)
    changed = changed if changed.ndim == 3 else np.repeat(changed[..., None], 3, axis=2)
    count = 0
    for view in views(photo, replace(IDENTITY, **{step: probability}), 600):
        is_changed = np.abs(view.astype(int) - changed).max() <= 1
        assert is_changed or np.array_equal(view, photo)
        count += is_changed
    assert count / 600 == pytest.approx(probability, abs=0.06)


def test_blur_spreads_a_line_by_its_sigma():
    image = np.zeros((49, 49), np.uint8)
    image[:, 24] = 255
    config = replace(IDENTITY, image_size_px=49, blur_probability=1.0, blur_sigma_px=(1.5, 1.5))
    weights = augment(image, config, seed=0)[..., 0].astype(float)
    offsets = np.arange(49) - 24
    variance = (weights.sum(0) * offsets**2).sum() / weights.sum()
    assert np.sqrt(variance) == pytest.approx(1.5, rel=0.05)


def test_blur_is_as_strong_as_that_of_pil_and_as_frequent_as_asked(photo):
    from PIL import ImageFilter

    ours = augment(photo, replace(IDENTITY, blur_probability=1.0, blur_sigma_px=(2.0, 2.0)), seed=0)
    theirs = np.asarray(Image.fromarray(photo).filter(ImageFilter.GaussianBlur(2.0))).astype(int)
    assert np.abs(ours - theirs).mean() < 1
    config = replace(IDENTITY, blur_probability=0.5, blur_sigma_px=(2.0, 2.0))
    count = sum(not np.array_equal(view, photo) for view in views(photo, config, 400))
    assert count / 400 == pytest.approx(0.5, abs=0.07)


def test_downsampling_removes_detail_and_keeps_the_mean():
    stripes = np.zeros((48, 48, 3), np.uint8)
    stripes[:, ::2] = 200
    config = replace(IDENTITY, downsample_probability=1.0, downsample_factors=(0.25,))
    view = augment(stripes, config, seed=0)
    assert view.std() < 2
    assert view.mean() == pytest.approx(100, abs=1)


def test_large_images_shrink_by_averages():
    noise = np.random.default_rng(0).integers(0, 256, (480, 480, 3), dtype=np.uint8)
    assert augment(noise, IDENTITY, seed=0).std() == pytest.approx(noise.std() / 10, rel=0.05)


def test_recipe_scales_its_blur_with_the_image_and_drops_it_where_it_does_nothing():
    assert AugmentConfig.for_image_size(224) == AugmentConfig()
    half = AugmentConfig.for_image_size(112)
    assert half == replace(AugmentConfig(), image_size_px=112, blur_sigma_px=(0.05, 1.0))
    assert AugmentConfig.for_image_size(56).blur_probability == 0.5
    assert AugmentConfig.for_image_size(55).blur_probability == 0
    assert AugmentConfig.for_image_size(32).blur_probability == 0


@pytest.mark.parametrize(
    "change",
    [
        {"image_size_px": 0},
        {"flip_probability": 1.1},
        {"brightness": -0.1},
        {"hue": 0.6},
        {"crop_scale": (0.0, 1.0)},
        {"crop_scale": (0.5, 1.5)},
        {"crop_ratio": (2.0, 1.0)},
        {"blur_sigma_px": (0.0, 1.0)},
        {"downsample_factors": (0.0,)},
    ],
)
def test_impossible_recipes_are_refused(change):
    with pytest.raises(ValueError, match=r"got"):
        AugmentConfig(**change)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros(4, np.uint8),
    ],
)
def test_arrays_that_are_no_images_are_refused(image):
    with pytest.raises((ValueError, TypeError), match="expected a uint8 image|Type-check"):
        augment(image, AugmentConfig(), seed=0)


def test_normalise_equals_torchvision():
    images = torch.randint(0, 256, (3, 5, 4, 3), dtype=torch.uint8)
    before = images.clone()
    reference = transforms.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    expected = reference(images.permute(0, 3, 1, 2) / 255)
    result = normalise(images)
    torch.testing.assert_close(result, expected)
    assert result.is_contiguous()
    assert torch.equal(images, before)


def test_import_leaves_the_threads_of_opencv_alone():
    program = (
        "import cv2; before = cv2.getNumThreads(); import synthrep_trainer.augment as a; "
        "assert cv2.getNumThreads() == before; a.use_one_thread(); "
        "assert cv2.getNumThreads() == 1"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_one_thread_is_used_once_asked():
    threads = cv2.getNumThreads()
    try:
        cv2.setNumThreads(2)
        use_one_thread()
        assert cv2.getNumThreads() == 1
    finally:
        cv2.setNumThreads(threads)


def test_solarised_levels_are_those_of_pillow(photo):
    config = replace(IDENTITY, solarise_probability=1.0)
    expected = np.asarray(ImageOps.solarize(Image.fromarray(photo), 128))
    assert np.array_equal(augment(photo, config, seed=0), expected)
