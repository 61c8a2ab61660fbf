"""Every recipe is a valid request with its sources; what is none says so."""

from __future__ import annotations

import pytest

from synthrep_shared.messages import RunRequest
from synthrep_shared.presets import PresetError, load_preset, preset_names, read_preset


@pytest.mark.parametrize("name", preset_names())
def test_a_recipe_is_a_valid_run_with_command_cost_and_sourced_numbers(name):
    preset = load_preset(name)
    run = RunRequest.model_validate(preset.request | {"dataset": "birds"})
    assert run.max_steps
    assert any(f"--preset {name} " in command for command in preset.commands)
    assert "hours" in preset.cost
    assert preset.sources
    assert preset.expected
    for number in preset.expected:
        assert 0 < number.value < 1
        assert number.source


def test_the_published_rows_are_there():
    names = {"cc3m_vitb16", "cc12m_vitb16_35ep", "cc12m_vitb16_105ep", "redcaps_vitb16_35ep"}
    assert names <= set(preset_names())
    run = load_preset("cc12m_vitb16_35ep").request
    assert run["captions_per_batch"] * run["images_per_caption"] == 8256
    assert run["lr"] == pytest.approx(2e-4 * 8256 / 256 / 2)
    assert load_preset("redcaps_vitb16_105ep").expected[0].value == 0.767


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(PresetError, match="no preset 'nope'; there are cc12m"):
        load_preset("nope")


@pytest.mark.parametrize("name", ["../presets/cc3m_vitb16", "", "cc3m_vitb16.toml"])
def test_a_name_is_no_path(name):
    with pytest.raises(PresetError, match="no preset"):
        load_preset(name)


def test_a_recipe_of_ones_own_needs_only_a_request(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("[request]\nmax_steps = 10\n[request.text]\nwidth = 64\n")
    assert read_preset(path).request == {"max_steps": 10, "text": {"width": 64}}


@pytest.mark.parametrize("text", ["max_steps = 10", "[request", "[request]\n[other]\n"])
def test_a_file_that_is_no_recipe_says_so(tmp_path, text):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(PresetError, match="is no recipe"):
        read_preset(path)


def test_a_file_that_is_not_there_says_so(tmp_path):
    with pytest.raises(PresetError, match="cannot be read"):
        read_preset(tmp_path / "absent.toml")
