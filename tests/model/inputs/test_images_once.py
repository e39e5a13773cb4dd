"""Images that go through an image processor once: what comes out, to the last bit, and what goes in."""

from __future__ import annotations

import copy
import pickle
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from packaging.version import Version
from PIL import Image
from transformers import AutoProcessor, CLIPImageProcessor

from grpo_toolkit.model.inputs.images_once import ImagesOnce, are_same
from tests.support.images import noise

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.stack
SIZES = [(56, 84), (29, 113), (300, 61), (140, 140), (28, 28)]
"""Widths and heights: of whole patches, of none, far from square."""


def processors() -> list[Any]:
    """The image processors of Qwen2.5-VL, by torchvision and by Pillow, under their names of this release."""
    names = ["Qwen2VLImageProcessor", "Qwen2VLImageProcessorPil", "Qwen2VLImageProcessorFast"]
    if Version(transformers.__version__) >= Version("5.0"):
        names = names[:2]
    kinds = [getattr(transformers, name, None) for name in names]
    return [kind for kind in dict.fromkeys(kinds) if kind is not None]


class Seen:
    """Counts the images that a processor is asked for, at its own `preprocess`."""

    def __init__(self, processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.images = 0
        kind, preprocess = type(processor), type(processor).preprocess

        def counted(this: Any, images: Any, *args: Any, **kwargs: Any) -> Any:
            self.images += sum(1 for _ in _leaves(images))
            return preprocess(this, images, *args, **kwargs)

        monkeypatch.setattr(kind, "preprocess", counted)


def _leaves(images: Any) -> list[Any]:
    return [leaf for part in images for leaf in _leaves(part)] if isinstance(images, (list, tuple)) else [images]


def batch(*order: int) -> list[Image.Image]:
    """Images of those numbers, each an object of its own, as after TRL's deep copies."""
    return [noise(number, SIZES[number % len(SIZES)]) for number in order]


@pytest.mark.parametrize("kind", processors(), ids=lambda kind: str(kind.__name__))
@pytest.mark.parametrize("tensors", ["pt", None])
@pytest.mark.parametrize("nested", [False, True])
def test_the_same_to_the_last_bit_from_the_distinct_images(
    kind: Any, tensors: str | None, nested: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def formed(images: list[Image.Image]) -> Any:
        return [[image] for image in images] if nested else images

    plain, processor = kind(), kind()
    once, seen = ImagesOnce(processor), Seen(processor, monkeypatch)
    batches = [(0, 0, 0, 1, 2, 1), (1, 2, 0, 3, 3, 3), (4,), (3, 4, 0, 0)]
    counts = []
    for order in batches:
        expected = plain(formed(batch(*order)), return_tensors=tensors)
        seen.images = 0
        found = processor(formed(batch(*order)), return_tensors=tensors)
        counts.append(seen.images)
        assert are_same(found, expected)
    assert counts == [3 + 6, 1, 1, 0]  # the first batch goes both ways
    assert list(once.is_trusted.values()) == [True]
    assert (once.asked, once.processed) == (17, 11)


def test_images_for_the_rollout_are_those_for_its_scoring(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL asks twice, and says only the second time that it wants tensors."""
    kind = processors()[0]
    plain, processor = kind(), kind()
    ImagesOnce(processor)
    seen, counts = Seen(processor, monkeypatch), []
    for order in ((0, 0, 1, 1), (2, 2, 3, 3)):
        for settings in ({}, {"return_tensors": "pt"}, {"return_tensors": "np"}):
            expected = plain(batch(*order), **settings)
            seen.images = 0
            assert are_same(processor(batch(*order), **settings), expected)
            counts.append(seen.images)
    tensors = isinstance(plain(batch(0))["pixel_values"], torch.Tensor)
    assert counts[3:] == ([2, 0, 2] if tensors else [2, 2, 2])


def test_settings_and_pixels_are_told_apart() -> None:
    kind = processors()[0]
    plain, processor = kind(), kind()
    ImagesOnce(processor)
    gray = noise(3).convert("L")
    turned = noise(3)
    turned.getexif()[0x0112] = 6  # lies on its side
    upright = turned.transpose(Image.Transpose.ROTATE_90)
    for images in (batch(0, 3), [noise(0), upright], [gray, noise(3)], [turned, noise(3)], batch(3, 0)):
        for settings in ({}, {"do_normalize": False}, {"do_rescale": True}, {"do_normalize": True}):
            assert are_same(
                processor(images=images, return_tensors="pt", **settings),
                plain(images=images, return_tensors="pt", **settings),
            )
    for processing in (plain, processor):  # a setting that changes on the way
        processing.image_mean = [0.1, 0.2, 0.3]
    assert are_same(processor(batch(0, 3), return_tensors="pt"), plain(batch(0, 3), return_tensors="pt"))


def test_nobody_can_spoil_what_is_kept() -> None:
    kind = processors()[0]
    plain, processor = kind(), kind()
    ImagesOnce(processor)
    for _ in range(3):
        found = processor(batch(0, 0, 1), return_tensors="pt")
        assert are_same(found, plain(batch(0, 0, 1), return_tensors="pt"))
        found["pixel_values"].zero_()


def test_memory_is_bounded() -> None:
    kind = processors()[0]
    plain, processor = kind(), kind()
    one = plain(batch(0), return_tensors="pt")
    once = ImagesOnce(processor, max_bytes=2 * one["pixel_values"].nbytes + 100)
    for start in range(0, 30, 3):
        images = [noise(start + number, SIZES[0]) for number in range(3)]
        assert are_same(processor(images, return_tensors="pt"), plain(images, return_tensors="pt"))
        assert 0 < once._kept.bytes <= once._kept.max_bytes


def test_saved_compared_copied_and_pickled_it_is_what_it_was(qwen: Path, tmp_path: Path) -> None:
    processor = AutoProcessor.from_pretrained(qwen)
    images = processor.image_processor
    kind, printed, state = type(images), repr(images), copy.deepcopy(vars(images))
    processor.save_pretrained(tmp_path / "before")
    once = ImagesOnce(images)
    processor(text=["<|vision_start|><|image_pad|><|vision_end|>"], images=batch(0), return_tensors="pt")
    processor.save_pretrained(tmp_path / "during")
    for file in sorted((tmp_path / "before").iterdir()):
        assert (tmp_path / "during" / file.name).read_bytes() == file.read_bytes()
    assert (type(images).__name__, type(images).__module__) == (kind.__name__, kind.__module__)
    assert isinstance(images, kind)
    assert vars(images) == state
    assert repr(images) == printed
    for other in (copy.deepcopy(images), copy.copy(images), pickle.loads(pickle.dumps(images))):
        assert type(other) is kind
        assert vars(other) == state
    once.close()
    assert type(images) is kind
    asked = once.asked
    images(batch(0), return_tensors="pt")
    assert once.asked == asked


def test_several_images_to_a_prompt() -> None:
    kind = processors()[0]
    plain, processor = kind(), kind()
    once = ImagesOnce(processor)
    prompts: Callable[[], Any] = lambda: [batch(0, 1), batch(2), batch(0, 1), batch(1)]  # noqa: E731
    for _ in range(2):
        assert are_same(processor(prompts(), return_tensors="pt"), plain(prompts(), return_tensors="pt"))
    assert once.asked - once.processed == 6 - 4  # the second time none


class PadsToTheLargest(CLIPImageProcessor):  # type: ignore[misc]
    """A processor whose image is another beside a larger one."""

    def preprocess(self, images: Any, **kwargs: Any) -> Any:
        sides = [max(image.size) for image in images]
        pixels = torch.stack([torch.full((max(sides), max(sides)), float(side)) for side in sides])
        return transformers.BatchFeature({"pixel_values": pixels})


class CountsThem(CLIPImageProcessor):  # type: ignore[misc]
    """A processor whose result says how many images there were."""

    def preprocess(self, images: Any, **kwargs: Any) -> Any:
        return transformers.BatchFeature({"pixel_values": torch.full((len(images), 2), len(images))})


@pytest.mark.parametrize("kind", [PadsToTheLargest, CountsThem])
def test_a_processor_that_sees_the_whole_batch_is_asked_for_it(kind: Any) -> None:
    plain, processor = kind(), kind()
    once = ImagesOnce(processor)
    for _ in range(3):
        assert are_same(processor(batch(0, 2, 0)), plain(batch(0, 2, 0)))
    assert list(once.is_trusted.values()) == [False]
    assert (once.asked, once.processed) == (9, 2 + 9)


def test_what_cannot_be_told_apart_is_handed_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class FromFiles(CLIPImageProcessor):  # type: ignore[misc]
        def preprocess(self, images: Any, **kwargs: Any) -> Any:
            return transformers.BatchFeature({"names": [str(image) for image in images]})

    processor = FromFiles()
    once = ImagesOnce(processor)
    assert processor(["a.png", "a.png"])["names"] == ["a.png", "a.png"]
    assert processor([])["names"] == []
    assert once.processed == once.asked == 2
    with pytest.raises(TypeError):
        processor(None)
    assert caplog.messages == []
    assert type(processor) is not FromFiles


def test_a_failure_of_ours_is_said_and_the_processor_answers(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kind = processors()[0]
    plain, processor = kind(), kind()
    ImagesOnce(processor)

    def fail(*_: Any) -> Any:
        raise RuntimeError("no digest")

    monkeypatch.setattr("grpo_toolkit.model.inputs.images_once.digest", fail)
    for _ in range(2):
        assert are_same(processor(batch(0, 0), return_tensors="pt"), plain(batch(0, 0), return_tensors="pt"))
    assert [message for message in caplog.messages if "no digest" in message] == [
        "grpo_toolkit: copies of an image are processed each for itself from here on: no digest"
    ]
    assert type(processor) is kind
