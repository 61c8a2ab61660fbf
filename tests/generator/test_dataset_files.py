"""The open files of a data set, for as long as a worker lives."""

from __future__ import annotations

from typing import Any

from synthrep_generator.dataset_files import OpenDatasets


def test_a_folder_for_files_in_the_making_that_was_cleaned_away_is_made_again(pets: Any) -> None:
    pets.accept(["a dog"])
    datasets = OpenDatasets(pets.paths.root)
    files = datasets["pets"]
    pets.paths.temporary.rmdir()
    assert datasets["pets"] is files
    assert pets.paths.temporary.is_dir()
