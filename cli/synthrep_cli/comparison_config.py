"""What is compared, from one TOML file: the world, the rows, the budget, seeds and probe sets.

Every trained row sees the same number of image views in batches of the same number of views, with
the same encoder, augmentation and fields of `[training]`. What tuning found for a row stands in
`[tuned]`, with the number of trials, which must be the same for every row.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from synthrep_shared.errors import SynthRepError
from synthrep_shared.messages import RunRequest

TRAINED = ("stablerep", "stablerep+", "synclr", "simclr-generated", "simclr-real",
           "clip-generated", "clip-real")  # fmt: skip
BASELINES = ("random-init", "pixels")
VERSION = 1  # part of every key: raise it when equal settings come to mean other runs
RowName = Literal["stablerep", "stablerep+", "synclr", "simclr-generated", "simclr-real",
                  "clip-generated", "clip-real", "random-init", "pixels"]  # fmt: skip


class ComparisonError(SynthRepError):
    """The comparison cannot be made as it is described, or a run of it failed."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class GeneratedWorld(_Part):
    """The images that are made of captions."""

    model: str = "tiny"
    captions: str = ""
    """File of captions, below the configuration's folder; empty: those that came with the model."""
    num_captions: int = Field(default=384, ge=2)
    """The first so many of the file."""
    images_per_caption: int = Field(default=10, ge=1, le=64)
    guidance_scale: float | None = Field(default=None, ge=0, le=30)
    seed: int = Field(default=0, ge=0)


class RealWorld(_Part):
    """The real images: an archive of photos where it is there, else the drawings that travel."""

    archive: str = ""
    """Tar of `<class>-<number>.jpg` below SYNTHREP_PROBE_DATA, with `NAME.classes.txt` beside it;
    without the folder the sets are taken."""
    probe_sets: tuple[str, ...] = ("clipart", "digits", "emoji", "fashion")
    """Labelled sets that travel with the trainer, of which the train part is taken."""
    max_images: int = Field(default=3840, ge=2)
    """At most so many, spread evenly over the archive."""
    templates: tuple[str, ...] = Field(default=("a photo of a {}",), min_length=1)
    """Captions of real images; {} is the class, and each image takes one of them."""

    @field_validator("templates")
    @classmethod
    def _take_a_class(cls, templates: tuple[str, ...]) -> tuple[str, ...]:
        for template in templates:
            if "{}" not in template or set("{}") & set(template.replace("{}", "", 1)):
                raise ValueError(f"{template!r} must have one {{}}, for the class")
        return templates


class Budget(_Part):
    """What every trained row gets."""

    views: int = Field(ge=1)
    """Image views seen, in whole batches."""
    views_per_batch: int = Field(default=256, ge=4)
    views_per_caption: int = Field(default=4, ge=2)
    """Images of a caption in a batch, of the rows to which captions are positives."""

    @model_validator(mode="after")
    def _is_equal_for_all(self) -> Budget:
        if self.views_per_batch % 2 or self.views_per_batch % self.views_per_caption:
            raise ValueError(
                "views_per_batch must be a multiple of 2 (crops of simclr) and of "
                "views_per_caption, or rows would see batches of different sizes"
            )
        return self

    @property
    def steps(self) -> int:
        """Of every trained row."""
        return max(1, self.views // self.views_per_batch)


class Machine(_Part):
    """How the work is spread; no part of what is compared."""

    parallel_runs: int = Field(default=2, ge=1, le=64)
    """Runs at a time where there is no GPU; else one a GPU."""
    threads: int = Field(default=1, ge=0)


class Comparison(_Part):
    """One configuration file."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,63}$")
    rows: tuple[RowName, ...] = Field(min_length=1)
    seeds: tuple[int, ...] = Field(min_length=1)
    probe_sets: tuple[str, ...] = ()
    """None named: every set that the trainer knows."""
    generated: GeneratedWorld = GeneratedWorld()
    real: RealWorld = RealWorld()
    budget: Budget
    training: dict[str, Any] = {}
    """Fields of `POST /v1/runs` that all rows share."""
    tuning_trials: int = Field(default=0, ge=0)
    """Configurations that were tried for each row, on validation parts."""
    tuned: dict[str, dict[str, Any]] = {}
    """What these trials chose, by row: fields of `POST /v1/runs`."""
    ablations: dict[str, dict[str, Any]] = {}
    """Further comparisons by name: what differs in `[generated]`, as for guidance_scale, and their
    `rows`, unless stablerep and simclr-generated will do."""
    machine: Machine = Machine()

    @model_validator(mode="after")
    def _can_be_run(self) -> Comparison:
        if not self.trained_rows:
            raise ValueError("rows must name a trained row, from which the baselines come")
        for name in ("rows", "seeds", "probe_sets"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{name} names one twice")
        if set(self.tuned) - set(self.trained_rows):
            raise ValueError("tuned names a row that is not trained")
        if self.tuned and not self.tuning_trials:
            raise ValueError("tuned needs tuning_trials, the same number for every row")
        requests = [self.request(r, s, dataset="checked") for r in self.trained_rows
                    for s in self.seeds]  # fmt: skip
        if len({(r.model, r.image_size, r.downsample_probability) for r in requests}) > 1:
            raise ValueError("tuned must leave encoder and augmentation as they are")
        for name in self.ablations:
            self.ablated(name)
        return self

    @property
    def trained_rows(self) -> tuple[str, ...]:
        """Rows that take a training run, in the order of the file."""
        return tuple(row for row in self.rows if row in TRAINED)

    def request(self, row: str, seed: int, *, dataset: str) -> RunRequest:
        """The run of a row: as many views and as large a batch as any other's."""
        objective = row.partition("-")[0]
        batch = self.budget.views_per_batch
        images, views = {"simclr": (1, 2), "clip": (1, 1)}.get(
            objective, (self.budget.views_per_caption, self.budget.views_per_caption)
        )
        fields: dict[str, Any] = {
            "dataset": dataset, "objective": objective, "seed": seed,
            "images_per_caption": images, "captions_per_batch": batch // views,
            "max_steps": self.budget.steps, "max_uses_per_image": 100_000,
        }  # fmt: skip
        return RunRequest.model_validate(self.training | self.tuned.get(row, {}) | fields)

    def generated_name(self, captions: Sequence[str]) -> str:
        """Name of the data set of generated images, by what is in it."""
        return f"generated-{digest([VERSION, self.generated.model_dump(mode='json'), captions])}"

    def key(self, row: str, seed: int, *, dataset: str) -> str:
        """What a run is, whatever file describes it; equal keys are equal runs.

        Defaults are left out, so that a field that runs gain later changes no key.
        """
        run = self.request(row, seed, dataset=dataset)
        request = run.model_dump(mode="json", exclude_defaults=True)
        return digest([VERSION, row, request])

    def baseline_key(self, row: str, seed: int) -> str:
        """As `key`, of a row without training: the encoder's shape and start are all it has."""
        request = self.request(self.trained_rows[0], seed, dataset="any")
        shape = (request.model, request.image_size)
        return digest([VERSION, row, *shape, seed if row == "random-init" else None])

    def ablated(self, name: str) -> Comparison:
        """The comparison with what an ablation changes; raises ComparisonError."""
        fields = self.model_dump(mode="json") | {"ablations": {}, "name": f"{self.name}-{name}"}
        changes = dict(self.ablations[name])
        rows = changes.pop("rows", ["stablerep", "simclr-generated"])
        if not isinstance(rows, list | tuple):
            raise ComparisonError(f"ablations.{name}: rows: a list is wanted")
        fields["rows"] = rows
        fields["tuned"] = {row: of for row, of in self.tuned.items() if row in rows}
        fields["generated"] |= changes
        return _validated(fields, f"ablations.{name}")


def digest(content: Any) -> str:
    """12 hex digits of JSON content."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def read_comparison(path: Path) -> Comparison:
    """The configuration in a TOML file; raises ComparisonError, which names the field."""
    try:
        fields = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ComparisonError(f"{path}: {error}") from error
    return _validated(fields, str(path))


def _validated(fields: dict[str, Any], where: str) -> Comparison:
    try:
        return Comparison.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ComparisonError(f"{where}: {place + ': ' if place else ''}{first['msg']}") from error
