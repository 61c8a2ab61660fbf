"""One file states a comparison; every trained row gets the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from synthrep_cli.comparison_config import TRAINED, Comparison, ComparisonError, read_comparison

EXPERIMENTS = sorted((Path(__file__).parents[2] / "experiments").glob("*.toml"))
FIELDS = {"name": "small", "rows": list(TRAINED), "seeds": [0, 1],
          "budget": {"views": 1000, "views_per_batch": 64}}  # fmt: skip


def views(config: Comparison, row: str) -> tuple[int, int]:
    """Views a batch and views of a run."""
    request = config.request(row, 0, dataset="birds")
    crops = 2 if request.objective == "simclr" else 1
    batch = request.captions_per_batch * request.images_per_caption * crops
    return batch, batch * request.max_steps


def test_every_row_sees_as_many_views_in_as_large_batches():
    config = Comparison.model_validate(FIELDS)
    assert {views(config, row) for row in TRAINED} == {(64, 15 * 64)}


def test_a_key_changes_with_what_a_run_is_and_with_nothing_else():
    config = Comparison.model_validate(FIELDS)
    key = config.key("stablerep", 0, dataset="birds")
    other = {"machine": {"threads": 7}, "name": "other", "rows": ["stablerep"], "probe_sets": ["a"]}
    same = Comparison.model_validate(FIELDS | other)
    assert same.key("stablerep", 0, dataset="birds") == key
    tuned = {"tuned": {"stablerep": {"lr": 0.01}}, "tuning_trials": 3}
    others = {
        config.key("stablerep", 1, dataset="birds"),
        config.key("stablerep", 0, dataset="cats"),
        config.key("simclr-real", 0, dataset="birds"),
        Comparison.model_validate(FIELDS | tuned).key("stablerep", 0, dataset="birds"),
    }
    assert len(others - {key}) == 4


def test_a_field_that_stays_at_its_default_changes_no_key():
    config = Comparison.model_validate(FIELDS)
    said = Comparison.model_validate(FIELDS | {"training": {"weight_decay": 0.1}})
    changed = Comparison.model_validate(FIELDS | {"training": {"weight_decay": 0.2}})
    key = config.key("stablerep", 0, dataset="birds")
    assert said.key("stablerep", 0, dataset="birds") == key
    assert changed.key("stablerep", 0, dataset="birds") != key


def test_the_name_of_generated_images_says_what_they_are():
    config = Comparison.model_validate(FIELDS | {"ablations": {"g5": {"guidance_scale": 5}}})
    name = config.generated_name(["a dog"])
    assert name != config.generated_name(["a cat"])
    ablated = config.ablated("g5")
    assert name != ablated.generated_name(["a dog"])
    assert (ablated.name, ablated.rows) == ("small-g5", ("stablerep", "simclr-generated"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rows": ["pixels"]}, "must name a trained row"),
        ({"rows": ["dino"]}, "rows"),
        ({"seeds": [1, 1]}, "seeds names one twice"),
        ({"tuned": {"stablerep": {"lr": 0.1}}}, "tuning_trials"),
        ({"tuned": {"pixels": {}}, "tuning_trials": 1}, "not trained"),
        ({"ablations": {"g": {"guidance": 3}}}, r"ablations\.g: generated\.guidance"),
        ({"training": {"image_sice": 32}}, "image_sice"),
        ({"seeds": [0, -1]}, "seed"),
        ({"real": {"templates": ["a {}", "{x}"]}}, "must have one {}"),
        ({"real": {"templates": ["a {} and a {}"]}}, "must have one {}"),
        ({"tuned": {"stablerep": {"image_size": 64}}, "tuning_trials": 1}, "tuned must leave"),
        ({"ablations": {"g": {"rows": 3}}}, r"ablations\.g: rows: a list"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_starts(tmp_path, changes, words):
    lines = {k: v for k, v in (FIELDS | changes).items() if not isinstance(v, dict)}
    text = "\n".join(f"{k} = {v!r}" for k, v in lines.items()) + "\n[budget]\nviews = 1000\n"
    for name, part in changes.items():
        if isinstance(part, dict):
            text += f"[{name}]\n"
            for key, value in part.items():
                shown = "{" + ", ".join(f"{a} = {b}" for a, b in value.items()) + "}" \
                    if isinstance(value, dict) else value  # fmt: skip
                text += f"{key} = {shown}\n"
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(ComparisonError, match=words):
        read_comparison(path)


@pytest.mark.parametrize("odd", [{"views_per_batch": 65}, {"views_per_caption": 3}])
def test_a_budget_that_rows_cannot_share_is_refused(odd):
    fields = FIELDS | {"budget": FIELDS["budget"] | odd}
    with pytest.raises(ValueError, match="must be a multiple of 2"):
        Comparison.model_validate(fields)


def test_a_file_that_is_no_toml_is_named(tmp_path):
    (tmp_path / "bad.toml").write_text("name = ")
    with pytest.raises(ComparisonError, match=r"bad\.toml"):
        read_comparison(tmp_path / "bad.toml")


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: p.stem)
def test_the_comparisons_that_come_with_the_project_can_be_read(path):
    config = read_comparison(path)
    assert "random-init" in config.rows
    if any(row.endswith("-real") for row in config.rows):  # the paper's table, not a part of it
        assert {"pixels", *TRAINED} - set(config.rows) <= {"synclr"}
    for name in config.ablations:
        config.ablated(name)
