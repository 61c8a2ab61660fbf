"""Where commands that read files look for them: the folders named, else those that services use.

Where neither an option nor a variable names a folder, the services' own default comes first, then
that of `synthrep up`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from synthrep_shared.errors import SynthRepError
from synthrep_shared.storage import DatasetPaths, parse_root

if TYPE_CHECKING:
    from synthrep_trainer.runs import Workplace

UP = Path("runs/up")
"""Where `synthrep up` keeps its files."""


def dataset_paths(root: str | None, dataset: str, *, is_new: bool = False) -> DatasetPaths:
    """Where a data set lies, or is to lie if it `is_new`; `root` names the folder of data sets.

    A new one lies where `synthrep up` keeps its data sets if it ever ran here. Raises StorageError
    for a name that no data set may have, SynthRepError where it is not and is not new.
    """
    if root is not None:
        places = [DatasetPaths(parse_root(root), dataset)]
    else:
        from synthrep_generator.settings import GeneratorSettings

        settings = GeneratorSettings()
        places = [DatasetPaths(settings.root, dataset)]
        if "root" not in settings.model_fields_set and (UP / "data").is_dir():
            places.append(DatasetPaths(UP / "data", dataset))
    for paths in places:
        if paths.folder.is_dir():
            return paths
    if is_new:
        return places[-1]
    roots = " or ".join(str(paths.root) for paths in places)
    raise SynthRepError(f"no data set {dataset!r} under {roots}; --root names another folder")


def workplaces(runs: Path | None) -> list[Workplace]:
    """The folders that a run may be in; `runs` names the only one. The last is for new runs."""
    from synthrep_trainer.runs import Workplace
    from synthrep_trainer.settings import TrainerSettings

    if runs is not None:
        return [Workplace(runs)]
    settings = TrainerSettings()
    places = [Workplace(settings.runs)]
    if "runs" not in settings.model_fields_set and (UP / "trainer").is_dir():
        places.append(Workplace(UP / "trainer"))
    return places


def workplace_of(runs: Path | None, what: str) -> Workplace:
    """The folder that holds the run or checkpoint `what`; raises SynthRepError if none does."""
    places = workplaces(runs)
    for place in places:
        if place.run(what) or place.checkpoint(what) or Path(what).exists():
            return place
    roots = " or ".join(str(place.root) for place in places)
    raise SynthRepError(
        f"{what} is neither a checkpoint nor a run in {roots}; --runs names another folder"
    )
