"""The second save hook: a processor or tokenizer that saves the base's own files.

Trainers save the processing class by a call of its own, after the model's and beside adapters too. The hook is an
object on the instance: the library copies a processor's attributes while it saves them, and a bound method would make
it copy the processor with its whole vocabulary.
"""

from __future__ import annotations

import logging
import weakref
from pathlib import Path
from typing import Any

from grpo_toolkit.model.saving.portable_files import rewrite_processor
from grpo_toolkit.model.saving.push_after import take_push

logger = logging.getLogger(__name__)

_NAME = "save_pretrained"


class ProcessorSave:
    """The `save_pretrained` of one processor, whose files become the base's own.

    Args:
        owner: the processor or tokenizer.
        base: the base's folder.
    """

    def __init__(self, owner: Any, base: Path) -> None:
        self._owner = weakref.ref(owner)
        self.base = base

    def __call__(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """Do the class's `save_pretrained`, rewrite its files, and push them if that was asked for."""
        owner = self._owner()
        assert owner is not None, "the hook lies on its owner"
        if args:  # `push_to_hub` of a processor, `legacy_format` of a tokenizer: positional, and left to the library
            return type(owner).save_pretrained(owner, save_directory, *args, **kwargs)
        push = take_push(save_directory, kwargs)
        written = type(owner).save_pretrained(owner, save_directory, **kwargs)
        try:
            rewrite_processor(owner, self.base, Path(save_directory))
        except Exception as error:  # the library's own files are there
            logger.error(
                "grpo_toolkit: the tokenizer and processor in %s are in this library's forms, which older versions "
                "may not load (%s: %s)",
                save_directory,
                type(error).__name__,
                error,
            )
        if push is not None:
            push.upload()
        return written

    def __deepcopy__(self, memo: dict[int, Any]) -> ProcessorSave:
        return ProcessorSave(memo.get(id(self._owner()), self._owner()), self.base)

    def __reduce__(self) -> Any:
        return getattr, (self._owner(), _NAME)  # as of a bound method: the plain one, where it is unpickled


def hook_processor(processor: Any, base: Path | None) -> None:
    """Make every later `save_pretrained` of a processor or tokenizer write the base's own files; None for its own."""
    vars(processor).pop(_NAME, None)
    if base is not None:
        vars(processor)[_NAME] = ProcessorSave(processor, base)
