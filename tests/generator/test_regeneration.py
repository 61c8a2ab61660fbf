"""Images of a job of the real model, made again alone from their JSON."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("diffusers")

from synthrep_generator.chunks import Place, chunk_from_places
from synthrep_generator.dataset_files import OpenDatasets
from synthrep_generator.device_process import make_synthesizer
from synthrep_generator.errors import ModelConfigError, UnknownModelError
from synthrep_generator.jobs import Bench, generate_shard, make_request
from synthrep_generator.regeneration import compare, encode_as_stored, remake
from synthrep_generator.settings import GeneratorSettings
from synthrep_shared.errors import StorageError
from synthrep_shared.samples import SampleMetadata
from tests.generator.counting import CountingFakeSynthesizer

PROMPTS = [
    "a brown frog, brown background", "a grey truck", "a white horse on a green field",
    "a close-up of a red bird, blue background",
]  # fmt: skip
IMAGES, PASS = 3, 8
Sample = tuple[SampleMetadata, bytes]


class Watch:
    def begin(self, places: Sequence[Place]) -> None:
        """Nobody looks."""

    def step(self) -> None:
        """Nobody looks."""


@pytest.fixture(scope="session")
def settings() -> GeneratorSettings:
    """The real model of the repository, on the CPU, with few steps."""
    tiny = GeneratorSettings().models["tiny"]
    model = tiny.model_copy(update={"device_batch_images": PASS})
    return GeneratorSettings(models={"tiny": model}, device="cpu")


@pytest.fixture(scope="session")
def samples(settings: GeneratorSettings, tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """(description, file) of every image of a job of four prompts, in two passes."""
    from tests.conftest import GeneratorStack

    stack = GeneratorStack(tmp_path_factory.mktemp("job"))
    recipe = {"guidance_scale": 3.0, "num_inference_steps": 5, "scheduler": "dpm++"}
    stack.accept(PROMPTS, images=IMAGES, **recipe)
    model = settings.models["tiny"]
    bench = Bench(make_synthesizer(settings, "tiny", model), model, "jpg", 90, Watch())
    chunk = chunk_from_places("birds", [Place("b0", i) for i in range(len(PROMPTS))])
    request = make_request(chunk, OpenDatasets(stack.settings.root)["birds"])
    assert request is not None
    assert generate_shard(request, bench).images == len(PROMPTS) * IMAGES
    with tarfile.open(stack.paths.shards / stack.records()[0].name) as tar:
        files = [tar.extractfile(info).read() for info in tar]  # type: ignore[union-attr]
    descriptions = map(SampleMetadata.model_validate_json, files[1::2])
    return list(zip(descriptions, files[::2], strict=True))


def again(sample: Sample, settings: GeneratorSettings, **options: Any) -> bytes:
    description, stored = sample
    remade = remake(description, settings, **options)
    return encode_as_stored(remade.pixels, stored, description, settings)


def test_samples_record_the_images_of_their_pass(samples: list[Sample]) -> None:
    assert [description.batch_images for description, _ in samples] == [8] * 8 + [4] * 4


@pytest.mark.parametrize("place", [0, 5, 11])
def test_an_image_made_again_in_a_pass_of_its_size_is_equal_bit_for_bit(
    samples: list[Sample], settings: GeneratorSettings, place: int
) -> None:
    _, stored = samples[place]
    found = compare(stored, again(samples[place], settings))
    assert found.is_equal
    assert (found.mean_difference, found.max_difference) == (0, 0)


def test_an_image_made_again_alone_is_within_two_of_255(
    samples: list[Sample], settings: GeneratorSettings
) -> None:
    for place in (0, 7):
        _, stored = samples[place]
        assert compare(stored, again(samples[place], settings, batch_images=1)).mean_difference <= 2


def test_a_pass_holds_as_many_images_as_were_recorded_or_are_wanted(
    samples: list[Sample], settings: GeneratorSettings
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        made = CountingFakeSynthesizer(store_px=32)
        made.revision = samples[0][0].model_revision
        patch.setattr("synthrep_generator.regeneration.make_synthesizer", lambda *_: made)
        remake(samples[0][0], settings)
        remake(samples[11][0], settings)
        remake(samples[0][0], settings, batch_images=3)
    assert made.passes == [8, 4, 3]


def test_another_seed_or_caption_is_another_image(
    samples: list[Sample], settings: GeneratorSettings
) -> None:
    description, stored = samples[0]
    for change in ({"seed": description.seed + 1}, {"caption": PROMPTS[3]}):
        other = description.model_copy(update=change)
        found = compare(stored, again((other, stored), settings))
        assert not found.is_equal
        assert found.mean_difference > 2


def test_another_model_of_the_same_name_is_refused(
    samples: list[Sample], settings: GeneratorSettings
) -> None:
    description, _ = samples[0]
    changes: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"model": "absent"}, UnknownModelError, "absent"),
        ({"model_revision": "tiny-0"}, ModelConfigError, "tiny-0"),
        ({"loras": ("ink.safetensors@1",)}, ModelConfigError, "ink"),
    ]
    for change, error, message in changes:
        with pytest.raises(error, match=message):
            remake(description.model_copy(update=change), settings)


def encoded(image_format: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    pixels = np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)
    Image.fromarray(pixels).save(stream, image_format, **options)
    return stream.getvalue()


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_the_format_of_the_stored_file_is_kept(
    samples: list[Sample], settings: GeneratorSettings, image_format: str
) -> None:
    description = samples[0][0].model_copy(update={"image_quality": 80})
    stored = encoded(image_format, quality=80)
    pixels = np.asarray(Image.open(io.BytesIO(encoded("PNG"))))
    assert encode_as_stored(pixels, stored, description, settings) == stored


def test_what_is_no_image_is_refused(samples: list[Sample], settings: GeneratorSettings) -> None:
    with pytest.raises(StorageError, match="no image"):
        compare(b"<svg/>", samples[0][1])
    with pytest.raises(StorageError, match="shape"):
        compare(encoded("PNG"), samples[0][1])


def test_an_image_without_its_end_is_refused(samples: list[Sample]) -> None:
    _, stored = samples[0]
    with pytest.raises(StorageError, match="cannot be decoded"):
        compare(stored[:-40], stored)


def test_old_descriptions_still_parse(samples: list[Sample]) -> None:
    old = json.loads(samples[0][0].model_dump_json())
    for name in ("attempt", "batch_images", "image_quality"):
        del old[name]
    parsed = SampleMetadata.model_validate(old)
    assert (parsed.attempt, parsed.batch_images, parsed.image_quality) == (0, 1, None)
