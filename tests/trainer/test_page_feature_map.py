"""The page draws a run's map so that it is readable without colour, and shows a group's neighbours.

The map itself is that of `test_feature_maps`.
"""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
from starlette.testclient import TestClient

from synthrep_shared.messages import RunRequest
from synthrep_trainer.api import create_app
from synthrep_trainer.feature_maps import FeatureMap, MappedGroup, MappedImage, write_feature_map
from synthrep_trainer.page.feature_map import SHAPES, clusters, drawing
from synthrep_trainer.runs import Workplace
from synthrep_trainer.settings import TrainerSettings


def made_map(captions: list[str], places: list[tuple[float, float]]) -> FeatureMap:
    """A group a caption with one image each; image k is nearest to image k + 1."""
    count = len(captions)
    return FeatureMap(
        dataset="birds",
        step=40,
        checkpoint="5a",
        shares=(0.5, 0.25),
        neighbour_accuracy=0.75,
        groups=tuple(
            MappedGroup(gid=f"{k:02x}", caption=caption, is_held_out=k == 1)
            for k, caption in enumerate(captions)
        ),
        images=tuple(
            MappedImage(group=k, image=0, x=x, y=y, nearest=(((k + 1) % count, 0.5),))
            for k, (x, y) in enumerate(places)
        ),
    )


THREE = made_map(["a <red> bird", "a tit", "a jay"], [(0.0, 0.0), (1.0, 0.5), (0.5, 0.1)])


def test_places_fill_the_drawing_and_keep_their_proportions():
    (a,), (b,), (c,) = (cluster.places for cluster in clusters(THREE))
    assert (a[0], b[0]) == (3, 157)
    assert a[1] - b[1] == pytest.approx(77), "y points up"
    assert c[0] == pytest.approx(80)


def test_images_that_all_lie_in_one_place_stand_in_the_middle():
    found = clusters(made_map(["a", "b"], [(2.0, 2.0), (2.0, 2.0)]))
    assert [cluster.places for cluster in found] == [((80, 50),)] * 2


def test_captions_differ_in_shape_and_colour_and_equal_ones_look_alike():
    captions = [f"bird {k}" for k in range(SHAPES + 1)] + ["bird 0"]
    found = list(clusters(made_map(captions, [(k, 0.0) for k in range(SHAPES + 2)])))
    looks = [(cluster.shape, cluster.hue) for cluster in found]
    assert len({shape for shape, _ in looks[:SHAPES]}) == SHAPES
    assert len(set(looks)) == SHAPES + 1
    assert looks[0] == looks[-1]


def test_the_drawing_names_its_marks_and_lists_them():
    text = drawing(THREE)
    (svg,) = re.findall(r'<svg class="map".*?</svg>', text, re.DOTALL)
    tree = ElementTree.fromstring(svg)
    titles = [element.text for element in tree.iter("title")]
    assert titles == ["a <red> bird", "a tit (held out)", "a jay"]
    defined = {f"#{path.get('id')}" for path in tree.iter("path")}
    assert {use.get("href") for use in tree.iter("use")} <= defined
    assert len(defined) == SHAPES
    assert text.count('<button class="quiet" hx-get="/page/groups/') == 3
    assert "step 40" in text
    assert "75 %" in text
    assert "style=" not in text, "the policy of the page allows none"


@pytest.fixture
def place(tmp_path):
    return Workplace(tmp_path / "runs")


@pytest.fixture
def page(place, tmp_path):
    keys = [{"name": name, "key": name, "scopes": ["read"]} for name in ("ann", "bob")]
    settings = {"root": tmp_path / "data", "runs": place.root, "api_keys": keys}
    with TestClient(create_app(TrainerSettings.model_validate(settings))) as client:
        yield client


def get(page, path: str, key: str = "ann") -> str:
    answer = page.get(f"/page/{path}", headers={"authorization": f"Bearer {key}"})
    assert answer.status_code == 200, answer.text
    return str(answer.text)


def test_the_map_of_the_chosen_run_is_shown_once_it_is_there(page, place):
    request = RunRequest(dataset="birds", max_steps=9)
    run = place.submit_run(request, owner="ann")
    place.submit_run(request, owner="ann")
    assert "No map of this run yet" in get(page, f"parts/map?run={run.id}")
    write_feature_map(run.path, THREE)
    assert "a tit (held out)" in get(page, f"parts/map?run={run.id}")
    assert "No map of this run yet" in get(page, "parts/map"), "the newest run has none"


def test_a_group_shows_its_neighbours_by_the_newest_run_that_has_them(page, place):
    request = RunRequest(dataset="birds", max_steps=9)
    for step in (40, 80):
        run = place.submit_run(request, owner="ann")
        write_feature_map(run.path, THREE.model_copy(update={"step": step}))
    place.submit_run(request, owner="ann")
    text = get(page, "groups/00/neighbours")
    assert "step 80" in text
    assert "/page/groups/01/images/0" in text
    assert "cosine 0.50 · held out" in text
    assert get(page, "groups/99/neighbours") == ""


def test_neighbours_of_another_owners_run_are_not_shown(page, place):
    run = place.submit_run(RunRequest(dataset="birds", max_steps=9), owner="ann")
    write_feature_map(run.path, THREE)
    assert get(page, "groups/00/neighbours", key="bob") == ""
