"""Who sees and does what on the page: keys, cookies, other sites."""

from __future__ import annotations

from starlette.testclient import TestClient

from synthrep_generator.api import create_app as create_generator
from synthrep_generator.settings import GeneratorSettings
from synthrep_shared.messages import RunRequest
from synthrep_trainer.api import create_app
from synthrep_trainer.feature_maps import write_feature_map
from synthrep_trainer.settings import TrainerSettings

from .pages import BY_PAGE, URL, Page, transport_to
from .test_page_feature_map import THREE

KEY = "a key: with +signs, ключ"


def test_another_site_cannot_act_for_the_reader(page):
    fields = {"dataset": "birds", "max_steps": "30"}
    assert page.browser.post("/page/runs", data=fields).status_code == 403
    assert page.place.runs() == []


def test_the_key_is_asked_for_and_kept_from_scripts(make_page):
    page = make_page(api_keys=[{"name": "ann", "key": KEY}])
    assert 'name="key"' in page.get("/")
    assert page.browser.get("/page/parts/runs").status_code == 401
    page.post("session", key="wrong")
    assert "not one of the service" in page.get("/")
    answer = page.post("session", key=KEY)
    assert answer.headers["hx-redirect"] == "/"
    for cookie in answer.headers.get_list("set-cookie"):
        assert "HttpOnly" in cookie
        assert "SameSite=strict" in cookie
        assert KEY not in cookie
    assert "No run yet" in page.get("/")
    assert "2 captions accepted" in page.post("batches", dataset="birds", prompts="a\nb").text
    assert page.browser.get("/v1/runs").status_code == 401, "the API takes no cookie"
    page.post("session")
    assert 'name="key"' in page.get("/")


def test_the_viewer_sees_and_does_what_the_key_allows(make_page):
    keys = [
        {"name": "ann", "key": "ann", "scopes": ["read", "submit"]},
        {"name": "bob", "key": "bob", "scopes": ["read", "submit"]},
        {"name": "eve", "key": "eve", "scopes": ["read"]},
    ]
    page = make_page(api_keys=keys)
    page.post("session", key="ann")
    page.post("runs", dataset="birds", max_steps="30")
    page.post("batches", dataset="birds", prompts="a bird")
    (folder,) = page.place.runs()
    assert folder.id[:15] in page.get("/")
    assert "1 of" not in page.get("/page/parts/overview")
    assert "birds" in page.get("/page/parts/overview")
    page.post("session", key="bob")
    assert folder.id[:15] not in page.get("/")
    assert "birds" not in page.get("/page/parts/overview")
    assert page.post(f"runs/{folder.id}/stop").status_code == 404
    page.post("session", key="eve")
    assert "batches-form" not in page.get("/")
    assert page.post("runs", dataset="birds", max_steps="30").status_code == 403


def test_a_map_shows_no_captions_that_the_generator_keeps_from_the_viewer(make_page):
    scopes = ["read", "submit"]
    page = make_page(
        api_keys=[{"name": name, "key": name, "scopes": scopes} for name in ("ann", "bob")]
    )
    page.post("session", key="ann")
    page.post("batches", dataset="birds", prompts="a bird")
    for name, is_shown in (("ann", True), ("bob", False)):
        run = page.place.submit_run(RunRequest(dataset="birds", max_steps=30), owner=name)
        write_feature_map(run.path, THREE)
        page.post("session", key=name)
        assert ("a jay" in page.get("/page/parts/map")) == is_shown
        assert ("a tit" in page.get("/page/groups/00/neighbours")) == is_shown
    assert "does not show birds" in page.get("/page/parts/map")


def test_a_generator_with_another_key_gets_that_one(tmp_path):
    page = Page(tmp_path, api_keys=[{"name": "ann", "key": "ann"}])
    other = [{"name": "ann", "key": "other"}]
    settings = GeneratorSettings.model_validate({"root": page.root, "api_keys": other})
    with TestClient(create_generator(settings), base_url=URL) as generator:
        trainer = TrainerSettings.model_validate(
            {"root": page.root, "runs": tmp_path / "runs", "generator_url": URL,
             "api_keys": [{"name": "ann", "key": "ann"}]}
        )  # fmt: skip
        with TestClient(create_app(trainer, generator=transport_to(generator))) as browser:
            browser.post("/page/session", data={"key": "ann"}, headers=BY_PAGE)
            assert "does not know this key" in browser.get("/page/parts/overview").text
            keys = {"key": "ann", "generator_key": "other"}
            browser.post("/page/session", data=keys, headers=BY_PAGE)
            assert "does not know" not in browser.get("/page/parts/overview").text


def test_an_open_trainer_asks_for_the_key_of_its_generator(tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    keys = [{"name": "ann", "key": "ann"}]
    generator = GeneratorSettings.model_validate({"root": root, "api_keys": keys})
    trainer = TrainerSettings(root=root, runs=tmp_path / "runs", generator_url=URL)
    with (
        TestClient(create_generator(generator), base_url=URL) as service,
        TestClient(create_app(trainer, generator=transport_to(service))) as browser,
    ):
        assert 'href="/page/session"' in browser.get("/").text
        form = browser.get("/page/session").text
        assert 'name="generator_key"' in form
        assert 'name="key"' not in form
        browser.post("/page/session", data={"generator_key": "ann"}, headers=BY_PAGE)
        text = browser.get("/").text
        assert "does not know" not in text
        assert "Sign out" in text


def test_an_expired_key_leads_back_to_the_question_for_it(make_page):
    page = make_page(api_keys=[{"name": "ann", "key": KEY}])
    answer = page.post("batches", dataset="birds", prompts="a bird")
    assert (answer.status_code, answer.headers["hx-redirect"]) == (401, "/")
    assert "hx-redirect" not in page.browser.get("/v1/runs").headers


def test_another_site_cannot_sign_a_reader_in(page):
    assert page.browser.post("/page/session", data={"key": "theirs"}).status_code == 403
    assert not page.browser.cookies
