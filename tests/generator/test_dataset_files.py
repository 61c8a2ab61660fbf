"""The open files of a data set, for as long as a worker lives."""

from __future__ import annotations

import os
import time
from typing import Any

from synthrep_generator.dataset_files import OpenDatasets


def test_a_folder_for_files_in_the_making_that_was_cleaned_away_is_made_again(pets: Any) -> None:
    pets.accept(["a dog"])
    datasets = OpenDatasets(pets.paths.root)
    files = datasets["pets"]
    pets.paths.temporary.rmdir()
    assert datasets["pets"] is files
    assert pets.paths.temporary.is_dir()


def test_what_killed_writers_left_on_this_machine_goes(pets: Any) -> None:
    pets.accept(["a dog"])
    old, young = (pets.paths.temporary / f".shard.tar.{i}.00.part" for i in range(2))
    for file, age_s in ((old, 90_000.0), (young, 80_000.0)):
        file.touch()
        os.utime(file, (time.time() - age_s, time.time() - age_s))
    OpenDatasets(pets.paths.root)["pets"]
    assert (old.exists(), young.exists()) == (False, True)
