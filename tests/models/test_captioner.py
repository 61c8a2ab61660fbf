"""Captions say what the pixels show."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from models.training.captioner import (
    COLOURS,
    attributes,
    caption,
    captions,
    colour_names,
)

# The purest colour of each name, and others of it.
PALETTE = {
    "black": [(5, 5, 5), (40, 30, 45)],
    "white": [(250, 250, 250), (225, 230, 228)],
    "grey": [(128, 128, 128), (90, 95, 92)],
    "red": [(220, 20, 30), (150, 40, 50), (200, 60, 30)],
    "brown": [(139, 90, 43), (90, 60, 40), (160, 80, 30)],
    "yellow": [(240, 220, 40), (200, 190, 60)],
    "green": [(40, 160, 50), (70, 110, 60)],
    "blue": [(40, 80, 200), (120, 160, 220)],
}


def picture(subject: tuple[int, ...], background: tuple[int, ...], side: int) -> np.ndarray:
    """A square of `side` px in the middle of a photo (32, 32, 3)."""
    image = np.full((32, 32, 3), background, np.uint8)
    low = (32 - side) // 2
    image[low : low + side, low : low + side] = subject
    return image


def measure(*pictures: np.ndarray) -> list[tuple[str, str, bool]]:
    return [(COLOURS[s], COLOURS[b], bool(c)) for s, b, c in attributes(np.stack(pictures))]


@pytest.mark.parametrize("name", COLOURS)
def test_colours_have_their_usual_names(name):
    rgb = np.array(PALETTE[name]) / 255
    assert {COLOURS[i] for i in colour_names(rgb)} == {name}


def test_every_colour_has_exactly_one_name():
    grid = np.stack(np.meshgrid(*[np.linspace(0, 1, 18)] * 3), axis=-1)
    assert set(colour_names(grid).ravel()) == set(range(len(COLOURS)))


@pytest.mark.parametrize(("subject", "background"), [*permutations(COLOURS, 2)])
def test_subject_and_background_are_told_apart(subject, background):
    image = picture(PALETTE[subject][0], PALETTE[background][0], side=16)
    assert measure(image) == [(subject, background, False)]


def test_a_subject_that_fills_the_frame_is_a_close_up():
    red, blue = PALETTE["red"][0], PALETTE["blue"][0]
    # 26 x 26 of 32 x 32 pixels are 66 %, 24 x 24 are 56 %; the line is at 62 %.
    assert measure(picture(red, blue, 26), picture(red, blue, 24)) == [
        ("red", "blue", True),
        ("red", "blue", False),
    ]


def test_one_colour_all_over_is_subject_and_background():
    assert measure(picture((40, 160, 50), (40, 160, 50), 16)) == [("green", "green", False)]


def test_the_centre_counts_for_the_subject_more_than_the_rest():
    image = picture(PALETTE["red"][0], PALETTE["white"][0], side=14)
    image[4:7, 3:29] = PALETTE["blue"][0]  # 78 px of blue above 196 px of red
    assert measure(image)[0][0] == "red"


def test_images_are_measured_apart_from_each_other():
    images = [picture((220, 20, 30), (250, 250, 250), 10), picture((5, 5, 5), (40, 80, 200), 20)]
    assert measure(*images) == [*measure(images[0]), *measure(images[1])]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("cat",), "a cat"),
        (("automobile",), "an automobile"),
        (("automobile", COLOURS.index("red")), "a red automobile"),
        (("bird", None, COLOURS.index("blue")), "a bird, blue background"),
        (
            ("airplane", COLOURS.index("grey"), COLOURS.index("white")),
            "a grey airplane, white background",
        ),
        (
            ("frog", COLOURS.index("green"), COLOURS.index("black"), True),
            "a close-up of a green frog, black background",
        ),
        (("airplane", None, None, True), "a close-up of an airplane"),
    ],
)
def test_attributes_become_a_sentence(arguments, sentence):
    assert caption(*arguments) == sentence


def test_captions_join_labels_and_measurements():
    images = np.stack([picture((220, 20, 30), (250, 250, 250), 10)] * 2)
    assert captions(["cat", "ship"], np.array([1, 0]), attributes(images)) == [
        "a red ship, white background",
        "a red cat, white background",
    ]
