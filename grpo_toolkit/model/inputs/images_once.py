"""Each distinct image through an image processor once.

TRL has the processor take a rollout's images twice, for the rollout and for its scoring, and each image as often as it
has completions: 128 images of which eight are distinct, for 64 completions. Here the processor is asked for each
distinct image, and what it gave is kept, joined and handed out as if it had been asked for all.

Whether that is the same is not known of a processor, but tried: the first batch goes through it both ways, and from
there on it is asked for single images if both are equal to the last bit, else as ever. What it returns for an image
alone must also join with the others' (a padding to the largest image of a batch does not).
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, Final

from grpo_toolkit.model.inputs.kept import Kept, UnknownValueError

logger = logging.getLogger(__name__)

MAX_BYTES: Final = 1 << 30
"""Bytes of processed images that are kept; one of 484 tokens of Qwen2.5-VL has 9 MB."""

Output = Mapping[str, Any]
Process = Callable[..., Output]


@dataclass(frozen=True)
class _Batch:
    """The images of a call in parts: one image, or those of one prompt; `kind` is how a part is handed over."""

    parts: list[Any]
    kind: str


@dataclass(frozen=True)
class _Settings:
    """The settings of a call and the processor's own; `tensors` is how the result is to come."""

    state: Any
    tensors: Any


@dataclass(frozen=True)
class _Key:
    """A part of a batch under settings, as it is told from others."""

    settings: _Settings
    kind: str
    images: Any


class ImagesOnce:
    """An image processor's calls, answered from what it has returned for the same pixels and settings before.

        once = ImagesOnce(processor.image_processor)
        trainer.train()
        once.close()

    The processor gets a class of the same name for that time, and nothing in its attributes: saved, compared, printed,
    copied or pickled it is what it was.

    Args:
        processor: called as `processor(images, **settings)`, and returns a mapping (a `BatchFeature`).
        max_bytes: the most memory that kept images may take.

    Attributes:
        asked: images that the processor was asked for, and
        processed: those that went through it.
        is_trusted: whether it gives single images what it gives a batch; by settings, as far as that was tried.
    """

    def __init__(self, processor: Any, *, max_bytes: int = MAX_BYTES) -> None:
        self.processor = processor
        self.kind: type = type(processor)
        self.asked = self.processed = 0
        self.is_trusted: dict[Any, bool] = {}
        self._is_open = True
        self._kept: Kept[Output] = Kept(max_bytes)
        processor.__class__ = _answering(self.kind, self)

    def close(self) -> None:
        """Leave the processor as it was found, and give the memory back."""
        self._is_open = False  # for whoever has put a class of his own around ours since
        if type(self.processor).__dict__.get("answered_by") is self:
            self.processor.__class__ = self.kind
        self._kept.clear()

    def answer(self, process: Process, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Output:
        """Return what `process(*args, **kwargs)` does."""
        if not self._is_open:
            return process(*args, **kwargs)
        images, *others = args or (kwargs.get("images"),)
        given = {name: value for name, value in kwargs.items() if name != "images"}

        def ask(part: Any) -> Output:
            self.processed += _count(part)
            return process(part, *others, **given)

        self.asked += _count(images)
        try:
            settings = {name: value for name, value in given.items() if name != "return_tensors"}
            state = frozen([others, settings, vars(self.processor)])
            output = self._answer(ask, images, _Settings(state, frozen(given.get("return_tensors"))))
        except UnknownValueError:
            output = None
        except Exception as error:  # whatever it is: the processor is asked as if this were not here
            logger.warning("grpo_toolkit: copies of an image are processed each for itself from here on: %s", error)
            self.close()
            output = None
        return ask(images) if output is None else output

    def _answer(self, ask: Process, images: Any, settings: _Settings) -> Output | None:
        """Return the answer; None where the processor is to be asked for it."""
        batch = _batch(images)
        if batch is None:
            return None
        known: dict[int, str] = {}
        keys = [_Key(settings, batch.kind, digest(part, known)) for part in batch.parts]
        distinct = dict(zip(keys, batch.parts, strict=True))
        # Copies of one image say less about a processor than different ones.
        trial = (settings, batch.kind, len(distinct) > 1)
        if self.is_trusted.get(trial) is False:
            return None
        outputs = {key: self._output(ask, key, part) for key, part in distinct.items()}
        joined = join([outputs[key] for key in keys])
        if trial not in self.is_trusted and len(keys) > 1:
            expected = ask(images)
            self.is_trusted[trial] = joined is not None and are_same(joined, expected)
            return expected
        if joined is None:
            self.is_trusted[trial] = False
        return joined

    def _output(self, ask: Process, key: _Key, part: Any) -> Output:
        output = self._kept.get(key)
        if output is None and key.settings.tensors == frozen("pt"):
            # TRL asks for the rollout's images without saying how they are to come, and for the same as tensors then.
            as_it_likes = self._kept.get(replace(key, settings=replace(key.settings, tensors=frozen(None))))
            output = as_it_likes if are_tensors(as_it_likes) else None
        if output is None:
            output = ask(part)
            kept = join([output])
            if kept is not None:
                self._kept.put(key, kept, _bytes(kept))
        return output


def _answering(kind: Any, once: ImagesOnce) -> type:
    """Return a class of an image processor, with calls that `once` answers."""

    class Answering(kind):  # type: ignore[misc]
        answered_by = once

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return once.answer(super().__call__, args, kwargs)

        def __reduce_ex__(self, protocol: Any) -> Any:  # copies and pickles are of the class that it was
            plain = kind.__new__(kind)
            plain.__dict__.update(self.__dict__)
            make, made_of, *state = plain.__reduce_ex__(protocol)
            # Through a function: pickle refuses an object of another class than `make` is given.
            return _make, (make, made_of), *state

    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        setattr(Answering, name, getattr(kind, name))
    return Answering


def _make(make: Callable[..., Any], made_of: tuple[Any, ...]) -> Any:
    return make(*made_of)


def _batch(images: Any) -> _Batch | None:
    """Return the parts of a call's images, each as the processor takes it alone; None for what is not known here."""
    if not isinstance(images, (list, tuple)):
        return None if images is None else _Batch([images], "one")
    if not images:
        return None
    if not any(isinstance(image, (list, tuple)) for image in images):
        return _Batch([[image] for image in images], "list")
    if all(isinstance(of_prompt, (list, tuple)) and of_prompt for of_prompt in images):
        return _Batch([[list(of_prompt)] for of_prompt in images], "lists")
    return None


def _count(images: Any) -> int:
    if isinstance(images, (list, tuple)):
        return sum(_count(image) for image in images)
    return 0 if images is None else 1


def digest(image: Any, known: dict[int, str]) -> Any:
    """Return what tells an image, or a list of them, from all others.

    Args:
        image: of Pillow, an array or a tensor in the machine's memory; or a list of these.
        known: digests of this call's images by `id`, which is added to.

    Raises:
        UnknownValueError: it is something else, a path for one.
    """
    if isinstance(image, list):
        return tuple(digest(part, known) for part in image)
    if id(image) not in known:
        about, content = _content(image)
        found = hashlib.sha256(repr(about).encode() + b"\0")
        found.update(content)
        known[id(image)] = found.hexdigest()
    return known[id(image)]


def _content(image: Any) -> tuple[Any, Any]:
    """Return what is to be known about an image besides its numbers, and these."""
    import numpy as np
    import torch
    from PIL.ExifTags import Base
    from PIL.Image import Image

    if isinstance(image, Image):
        # A palette and the colour that is transparent are asked for where it is converted, its orientation before.
        palette = image.getpalette() if image.mode in ("P", "PA") else None
        clear, upright = image.info.get("transparency"), image.getexif().get(Base.Orientation)
        return ("image", image.mode, image.size, palette, clear, upright), image.tobytes()
    if type(image) is torch.Tensor and image.device.type == "cpu":
        flat = image.detach().contiguous().reshape(-1).view(torch.uint8)
        return ("tensor", image.dtype, tuple(image.shape)), flat.numpy()
    if isinstance(image, np.ndarray) and image.dtype != object:
        return ("array", image.dtype.str, image.shape), np.ascontiguousarray(image).tobytes()
    raise UnknownValueError(type(image).__name__)


def frozen(value: Any) -> Any:
    """Return settings as something hashable that is equal for equal settings alone.

    Raises:
        UnknownValueError: there is something in them that is not a setting.
    """
    import torch

    if value is None or isinstance(value, (bool, int, float, str, bytes, Enum, torch.dtype, torch.device)):
        return type(value), value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return type(value), frozen({field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    if isinstance(value, Mapping):
        return dict, tuple((name, frozen(part)) for name, part in sorted(value.items(), key=str))
    if isinstance(value, (list, tuple)):
        return type(value), tuple(frozen(part) for part in value)
    raise UnknownValueError(type(value).__name__)


def join(outputs: list[Output]) -> Output | None:
    """Return what a processor returns for a batch, from what it returned for its parts; new memory throughout.

    None where that is not known: tensors whose rows have other shapes, single numbers.
    """
    first = outputs[0]
    kinds = {(type(output), tuple(output)) for output in outputs}
    if len(kinds) > 1:
        return None
    joined = {name: _joined([output[name] for output in outputs]) for name in first}
    if any(value is None for value in joined.values()):
        return None
    kind: Any = type(first)
    return kind(joined)  # type: ignore[no-any-return]


def _joined(values: list[Any]) -> Any:
    import numpy as np
    import torch

    first = values[0]
    if any(type(value) is not type(first) for value in values):
        return None
    if type(first) is list:
        return [copy.deepcopy(part) for value in values for part in value]
    if not isinstance(first, (torch.Tensor, np.ndarray)) or first.ndim == 0:
        return None
    if any(value.shape[1:] != first.shape[1:] or value.dtype != first.dtype for value in values):
        return None
    if isinstance(first, np.ndarray):
        return np.concatenate(values)
    return torch.cat(values) if all(value.device.type == "cpu" for value in values) else None


def are_same(one: Any, other: Any) -> bool:
    """Return whether two outputs are equal, to the last bit, in their types too."""
    import numpy as np
    import torch

    if type(one) is not type(other):
        return False
    if isinstance(one, Mapping):
        return list(one) == list(other) and all(are_same(one[name], other[name]) for name in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(are_same, one, other))
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    return bool(one == other)


def are_tensors(output: Output | None) -> bool:
    """Return whether an output holds tensors alone: it is then what a processor returns where tensors are wanted."""
    import torch

    return output is not None and all(isinstance(value, torch.Tensor) for value in output.values())


def _bytes(value: Any) -> int:
    if isinstance(value, Mapping):
        return sum(map(_bytes, value.values()))
    if isinstance(value, (list, tuple)):
        return sum(map(_bytes, value))
    return int(getattr(value, "nbytes", 8))
