"""People see the whole loop on one page and drive it from there, in a real browser."""

from __future__ import annotations

import re

import pytest

from .conftest import wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.redis, pytest.mark.timeout(600)]

WINDOWS = [
    pytest.param(size, scheme, id=f"{size[0]}-{scheme}")
    for size in ((1280, 800), (390, 844))
    for scheme in ("light", "dark")
]
CAPTIONS = [f"a {colour} {thing}" for colour in ("red", "blue") for thing in ("dog", "ship", "jay")]
LOSS_HAS_MOVED = """() => {
  const figures = [...document.querySelectorAll("#curves figure")];
  const loss = figures.find(figure => figure.textContent.includes("Loss"));
  const points = loss?.querySelector("polyline").getAttribute("points").trim().split(" ") ?? [];
  return new Set(points.map(point => point.split(",")[1])).size > 1;
}"""
EMPTY_PARTS = 6  # images, generation, training, probes, comparisons, map
NUMBER = re.compile(r"\d+(?:\.\d+)?")


def window_of(size, scheme):
    """The options of a window of this width and height, light or dark."""
    return {"viewport": {"width": size[0], "height": size[1]}, "color_scheme": scheme}


def test_the_loop_is_driven_and_seen_without_a_reload(open_tab, services):
    tab = open_tab()
    tab.sign_in()
    tab.page.evaluate("window.isSame = true")

    answer = tab.submit(
        "batches", dataset="birds", prompts="\n".join(CAPTIONS), images_per_prompt="4"
    )
    assert "6 captions accepted" in answer
    tab.shows("#images .groups li", count=6)
    shown = tab.page.locator("#images .groups .caption").all_inner_texts()
    assert sorted(shown) == sorted(CAPTIONS)

    # Long enough that it is still there to be stopped.
    answer = tab.submit(
        "runs",
        dataset="birds",
        max_steps="1000000",
        captions_per_batch="4",
        checkpoint_every="9999",
    )
    run = re.search(r"Run (\S+) is queued", answer)[1]
    tab.becomes(LOSS_HAS_MOVED)
    tab.page.locator(f"#stop-{run}").click()
    tab.shows(f"#run-{run} td:has-text('paused')")

    answer = tab.submit("probes", run_id=run, dataset="light", protocol="knn")
    assert "is queued" in answer
    tab.shows("#probes .trained .interval")
    score = tab.page.locator("#probes .trained .num").inner_text()
    value, low, high = map(float, NUMBER.findall(score))
    assert low <= value <= high
    assert tab.page.locator("#probes .rival").count() == 2

    tab.shows("#map .map use", count=24)
    tab.page.locator("#images .groups .card").first.click()
    tab.shows("#group .neighbours li", count=8)
    assert "fake" in tab.page.locator("#group .facts").inner_text()
    tab.page.get_by_role("button", name="Reject the group").click()
    tab.shows("#group .problem:has-text('Rejected')")
    tab.shows("#images .groups li.rejected")
    assert services.http.get("/v1/runs").json()["items"][0]["id"] == run
    assert tab.page.evaluate("window.isSame"), "the page was not loaded again"


def test_a_refused_form_says_why_and_keeps_what_was_written(open_tab):
    tab = open_tab()
    tab.sign_in()
    answer = tab.submit("runs", dataset="birds", max_steps="5", captions_per_batch="4", seed="7")
    assert "is queued" in answer
    tab.page.locator("#batches-form [name=model]").fill("absent")
    assert "known: tiny" in tab.submit("batches", dataset="birds", prompts="a bird")
    assert tab.page.locator("#batches-form [name=prompts]").input_value() == "a bird"
    tab.faults = [fault for fault in tab.faults if "422" not in fault]


def test_the_page_is_used_by_keyboard_alone(open_tab):
    tab = open_tab()
    tab.sign_in()
    tab.shows("#images .groups .card")
    tab.page.evaluate("document.activeElement.blur()")
    tab.page.keyboard.press("Tab")
    assert tab.page.evaluate("document.activeElement.className") == "skip"
    tab.page.locator("#images .groups .card").first.focus()
    tab.page.keyboard.press("Enter")
    tab.becomes("() => document.activeElement == document.querySelector('#group h2')")


@pytest.mark.parametrize(("size", "scheme"), WINDOWS)
def test_axe_finds_nothing_serious_in_any_view(open_tab, size, scheme):
    tab = open_tab(**window_of(size, scheme))
    tab.page.goto("/")
    assert tab.violations() == [], "the view that asks for a key"
    tab.sign_in()
    tab.shows("#comparisons .compared b:has-text('best')")
    tab.page.locator("#images .groups li:not(.rejected) .card").first.click()
    tab.shows("#group .facts")
    tab.page.evaluate("for (const part of document.querySelectorAll('details')) part.open = true")
    tab.shows("[hx-post^='/page/preview'] > *", count=3)
    assert tab.violations() == []
    assert tab.overhangs() == []
    tab.page.goto("/?run=none")
    tab.shows("main.narrow .problem")
    assert tab.violations() == [], "the view of what is refused"
    tab.faults = [fault for fault in tab.faults if "404" not in fault]


@pytest.mark.parametrize(("size", "scheme"), WINDOWS)
def test_axe_finds_nothing_serious_where_there_is_nothing_yet(open_empty_tab, size, scheme):
    tab = open_empty_tab(**window_of(size, scheme))
    tab.page.goto("/")
    tab.shows("main .empty", count=EMPTY_PARTS)
    tab.page.evaluate("for (const part of document.querySelectorAll('details')) part.open = true")
    tab.shows("[hx-post^='/page/preview'] > *", count=3)
    assert tab.violations() == []
    assert tab.overhangs() == []


def test_a_tab_that_is_closed_frees_its_stream(open_tab, services):
    wait_until(lambda: services.open_pages() == 0)
    tabs = [open_tab() for _ in range(2)]
    for tab in tabs:
        tab.sign_in()
    wait_until(lambda: services.open_pages() == 2)
    tabs[0].close()
    wait_until(lambda: services.open_pages() == 1)
    tabs[1].page.goto("about:blank")
    wait_until(lambda: services.open_pages() == 0)
