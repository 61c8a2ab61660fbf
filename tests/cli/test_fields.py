"""Fields on the command line."""

from __future__ import annotations

import pytest
import typer

from synthrep_cli.fields import parse_fields
from synthrep_shared.messages import MixtureComponent, QualityGate


def test_names_and_values_make_a_message() -> None:
    component = parse_fields(
        "model=sd-15, guidance_scale=2,scheduler=ddim,weight=0.5", MixtureComponent, option="-m"
    )
    assert component == MixtureComponent(
        model="sd-15", guidance_scale=2.0, scheduler="ddim", weight=0.5
    )
    assert parse_fields("safety=true", QualityGate, option="-q") == QualityGate(safety=True)


def test_on_takes_every_field_as_it_is() -> None:
    assert parse_fields("on", QualityGate, option="-q") == QualityGate()


@pytest.mark.parametrize("text", ["", "safety", "max_attempts=0", "safety=perhaps", "nsfw=true"])
def test_what_does_not_fit_names_the_option(text: str) -> None:
    with pytest.raises(typer.BadParameter) as caught:
        parse_fields(text, QualityGate, option="--quality-gate")
    assert caught.value.param_hint == "--quality-gate"
