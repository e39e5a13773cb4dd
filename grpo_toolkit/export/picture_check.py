"""The check of an export's eyes: pictures of several sizes go through its processor and its vision tower."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from grpo_toolkit.errors import WorkerError
from grpo_toolkit.export.checks import Check
from grpo_toolkit.model.generation.drawn_pictures import Sight, picture_requests

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from grpo_toolkit.model.generation.generate import Record
    from grpo_toolkit.model.generation.request import Request

PICTURES: Final = "pictures answered"
BLIND_TEMPLATE: Final = "the chat template of the training places no picture, and so does the export's"


def check_pictures(
    sight: Sight, answer: Callable[[Request], Record], given: Sequence[tuple[Request, Record]] = ()
) -> Check | None:
    """Check that a model which sees answers pictures, and that its tower runs for them; None for one that does not.

    Args:
        sight: what the loaded folder has to see with.
        answer: asks the folder; raises WorkerError where it fails.
        given: requests that were asked already, with their answers. Without a picture among them some are drawn; one
            at the pixel limit always is.
    """
    if not sight.takes_pictures and not sight.has_tower:
        return None
    if not sight.takes_pictures:
        detail = "the model has a vision tower, and its processor takes no pictures"
        return Check(name=PICTURES, passed=False, detail=detail)
    if sight.why_not:
        return Check(name=PICTURES, passed=True, skipped=True, detail=sight.why_not)
    seen = [(request, record) for request, record in given if request.images]
    drawn = picture_requests(sight)
    for request in drawn[2:] if seen else drawn:
        try:
            seen.append((request, answer(request)))
        except WorkerError as error:
            return Check(name=PICTURES, passed=False, detail=f"a picture of {_size(request)}: {error}")
    return _judge(sight, seen)


def _judge(sight: Sight, seen: Sequence[tuple[Request, Record]]) -> Check:
    asked = [(request, record) for request, record in seen if request.max_new_tokens]
    alone = [request for request, _ in seen if not request.max_new_tokens]
    blind = [request for request, record in asked if not record.vision_calls]
    sizes = ", ".join(f"{_size(request)} in {record.prompt_tokens} tokens" for request, record in seen)
    detail = f"{sizes}; " + ("the vision tower ran for each" if sight.has_tower else "no vision tower known by name")
    if alone:
        detail += f"; {_size(alone[0])}, above the pixel limit, went through the processor alone"
    if blind and sight.has_tower:
        detail = f"the vision tower never ran for {len(blind)} of {len(asked)} requests with a picture"
    return Check(name=PICTURES, passed=not (blind and sight.has_tower), detail=detail)


def _size(request: Request) -> str:
    return " and ".join(f"{image.width} x {image.height}" for image in request.images)
