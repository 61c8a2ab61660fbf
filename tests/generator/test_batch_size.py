"""The search for the best device batch, and the file that remembers it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from synthrep_generator.batch_size import BatchSizes, search_batch_size  # noqa: E402


class Device:
    """Takes a fixed time for a batch and another for each image; has room for so many.

    The first batch of each size in `compile_s` takes that much longer.
    """

    def __init__(
        self,
        *,
        fixed_s: float,
        image_s: float,
        room: int = 1 << 30,
        compile_s: dict[int, float] | None = None,
    ) -> None:
        self._fixed_s, self._image_s, self._room = fixed_s, image_s, room
        self._compile_s = dict(compile_s or {})
        self.now_s = 0.0
        self.sizes: list[int] = []

    def seconds_of(self, images: int) -> float:
        self.sizes.append(images)
        if images > self._room:
            raise torch.OutOfMemoryError
        seconds = self._fixed_s + images * self._image_s + self._compile_s.pop(images, 0.0)
        self.now_s += seconds
        return seconds


def search(device: Device, **options: Any) -> int:
    return search_batch_size(device.seconds_of, clock=lambda: device.now_s, **options)


def test_it_doubles_while_images_a_second_grow() -> None:
    device = Device(fixed_s=1.0, image_s=0.1)
    # 64 images take 7.4 s, 128 take 13.8 s: seven percent more a second; then three.
    assert search(device) == 128
    assert device.sizes == [1, 1, 2, 4, 8, 16, 32, 64, 128, 256, 256, 256]


def test_what_a_size_costs_once_is_not_held_against_it() -> None:
    compiles = {1: 95.0, 2: 60.0, 4: 40.0, 32: 0.5}
    device = Device(fixed_s=0.2, image_s=0.001, compile_s=compiles)
    assert search(device) == search(Device(fixed_s=0.2, image_s=0.001)) == 256


def test_a_device_that_gains_nothing_gets_one_image() -> None:
    assert search(Device(fixed_s=0.0, image_s=1.0)) == 1


def test_memory_and_the_cap_end_it() -> None:
    assert search(Device(fixed_s=1.0, image_s=0.001, room=20)) == 16
    assert search(Device(fixed_s=1.0, image_s=0.001), most=8) == 8
    with pytest.raises(torch.OutOfMemoryError):
        search(Device(fixed_s=1.0, image_s=0.001, room=0))


def test_it_does_not_go_on_for_minutes() -> None:
    device = Device(fixed_s=40.0, image_s=0.001)
    assert search(device) == 2
    assert device.now_s < 180


def test_sizes_are_remembered_beside_each_other(tmp_path: Path) -> None:
    file = tmp_path / "cache" / "sizes.json"
    BatchSizes(file).put("a model cpu", 8)
    BatchSizes(file).put("another cpu", 4)
    assert BatchSizes(file).get("a model cpu") == 8
    assert json.loads(file.read_text()) == {"a model cpu": 8, "another cpu": 4}
    assert [path.name for path in file.parent.iterdir()] == ["sizes.json"]


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"a": 0}', '{"a": "many"}', "{", '{"a": true}', '{"a": 4096}', "[" * 100_000],
)
def test_a_broken_file_is_as_none(tmp_path: Path, text: str) -> None:
    file = tmp_path / "sizes.json"
    file.write_text(text)
    assert BatchSizes(file).get("a") is None
    BatchSizes(file).put("a", 2)
    assert BatchSizes(file).get("a") == 2


def test_a_size_that_cannot_be_written_leaves_no_file_behind(tmp_path: Path) -> None:
    (tmp_path / "sizes.json").mkdir()  # a folder is in the way
    BatchSizes(tmp_path / "sizes.json").put("a", 2)
    assert [path.name for path in tmp_path.iterdir()] == ["sizes.json"]


def test_nothing_is_remembered_without_a_place(tmp_path: Path) -> None:
    sizes = BatchSizes(None)
    sizes.put("a", 2)
    assert sizes.get("a") is None
    (tmp_path / "file").write_text("")
    BatchSizes(tmp_path / "file" / "sizes.json").put("a", 2)  # a warning, no error


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Any]:
    pytest.importorskip("diffusers")
    from synthrep_generator.diffusion import load_synthesizer
    from synthrep_generator.settings import ModelConfig
    from tests.generator.tiny_pipelines import save

    folder = save("sd15", tmp_path)

    def load(**changes: Any) -> Any:
        values = {"path": folder, "generate_px": 32, "store_px": 32, "num_inference_steps": 2}
        model = ModelConfig.model_validate(values | {"dtype": "fp32"} | changes)
        return load_synthesizer(model, device="cpu", batch_sizes=tmp_path / "sizes.json")

    return load


def test_a_model_is_searched_once_for_each_way_to_run_it(
    load: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = itertools.count(3)
    name = "synthrep_generator.diffusion.search_batch_size"
    monkeypatch.setattr(name, lambda seconds_of: next(found))
    assert load().batch_images == 3
    assert load().batch_images == 3
    assert load(generate_px=64).batch_images == 4
    assert load(dtype="bf16").batch_images == 5
    assert load(attention="math").batch_images == 6
    assert load(device_batch_images=2).batch_images == 2
    other = tmp_path / "other" / "sd15"  # another model's folder may have the same name
    other.parent.mkdir()
    other.symlink_to(tmp_path / "sd15")
    assert load(path=other).batch_images == 7
    assert len(json.loads((tmp_path / "sizes.json").read_text())) == 5


def test_a_size_that_was_too_large_is_remembered_halved(
    load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from synthrep_generator.synthesis import ImageTask, Recipe

    monkeypatch.setattr("synthrep_generator.diffusion.search_batch_size", lambda seconds_of: 8)
    synthesizer = load()
    original = synthesizer._denoise

    def limited(tasks: Any, *args: Any) -> Any:
        if len(tasks) > 4:
            raise torch.OutOfMemoryError
        return original(tasks, *args)

    monkeypatch.setattr(synthesizer, "_denoise", limited)
    tasks = [ImageTask("a bird", seed) for seed in range(8)]
    assert len(synthesizer.generate(tasks, Recipe(2.0, 1, "ddim", ""), lambda: None)) == 8
    assert load().batch_images == 4


def test_a_real_search_on_the_cpu_finds_a_size(load: Callable[..., Any]) -> None:
    synthesizer = load()
    assert synthesizer.batch_images >= 1
    assert load().batch_images == synthesizer.batch_images
