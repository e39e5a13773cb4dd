"""The seams on a live model: its forwards, its vision tower, its `generate`, by hooks and one instance method.

Which phase a forward belongs to is told by what it is in: inside of `generate` the first one is the prefill and the
others decode; with a gradient it is the training's; without one it makes log-probabilities, of the reference model
where the adapter is switched off. Nothing is changed: hooks return nothing, `generate` is handed what it was given.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from grpo_toolkit.model.attention.decode_without_cudnn import plans_per_length
from grpo_toolkit.model.attention.vision_towers import find_towers
from grpo_toolkit.model.hooks import LookingHooks
from grpo_toolkit.model.live_model import base_model
from grpo_toolkit.model.rollouts.rollouts import rollouts_of
from grpo_toolkit.step_time.clock import OTHER, PREPARING
from grpo_toolkit.step_time.seams.attention_calls import AttentionCalls
from grpo_toolkit.step_time.seams.busy_share import BusyShare
from grpo_toolkit.step_time.seams.device_profile import DeviceProfile
from grpo_toolkit.step_time.seams.forward_shapes import (
    adapter_layer,
    cast_bytes,
    named_in,
    patch_rows,
    patches_in,
    tensors_in,
    token_shape,
)
from grpo_toolkit.step_time.seams.generate import GenerateSeam, arguments_of
from grpo_toolkit.step_time.seams.kernel_shares import kernel_shares
from grpo_toolkit.step_time.seams.look import PASSES, distinct_images, look_at_rollout
from grpo_toolkit.step_time.seams.notes import ForwardNotes, RolloutNotes, StepNotes, VisionNotes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

    from grpo_toolkit.model.rollouts.rollouts import FastRollouts
    from grpo_toolkit.step_time.clock import StepClock


class ModelSeams:
    """Hooks and an instance `generate` that tell a clock what a model in training is doing.

    Args:
        model: the model in training, in any wrapper.
        clock: what is told.
        profiled: the micro-batch, from 1, that is profiled in a step that is looked at closely, as some decode steps
            are; 0: nothing is.

    Attributes:
        notes: of the step that is running, from the reading of its rows on if the trainer shows that.
        is_open: whether a step runs; between steps nothing is looked at.
        towers: the vision towers that are looked at.
        hooks: all that look; at the first exception of one, all are let go of.
    """

    def __init__(self, model: torch.nn.Module, clock: StepClock, *, profiled: int = 0) -> None:
        self.live: Any = base_model(model)
        self.clock = clock
        self.notes: StepNotes | None = None
        self.is_open = False
        self.profiled = profiled
        self._thread = threading.get_ident()
        self._rollout: RolloutNotes | None = None
        self._forward: ForwardNotes | None = None
        self._vision: VisionNotes | None = None
        self._calls: AttentionCalls | None = None
        self._profile: DeviceProfile | None = None
        self._adapter = adapter_layer(self.live)
        self._active = None if self._adapter is None else tuple(self._adapter.active_adapters)
        self.hooks = LookingHooks("measuring the time of a step", put_back=self._let_go)
        self.hooks.before(self.live, self._before)
        self.hooks.after(self.live, self._after, always=True)
        self.towers = [tower for tower in find_towers(self.live) if tower.module is not self.live]
        for tower in self.towers:
            self.hooks.before(tower.module, self._before_vision)
            self.hooks.after(tower.module, self._after_vision, always=True)
        embeddings = self.live.get_input_embeddings()
        if embeddings is not None:
            self.hooks.before(embeddings, self._inside)
        self._generate = GenerateSeam(self.live, self.rollout)

    def __reduce__(self) -> Any:
        # A model in training is copied and pickled by others, with its hooks: the copy's look at nothing.
        return _blind, ()

    @property
    def failed(self) -> bool:
        """Return whether a hook has raised, so that phases are not to be believed any more."""
        return self.hooks.failed

    def guarded(self, look: Callable[..., object], *given: Any) -> None:
        """Call something that only looks: at its first exception everything is let go of."""
        self.hooks.guarded(look, *given)

    def switch(self, *path: str) -> None:
        """Tell the clock, if a step runs in this thread."""
        if self.is_ours():
            self.clock.switch(*path)

    @contextmanager
    def phase(self, *path: str) -> Iterator[None]:
        """Count the time inside as a phase, unless it is inside of another one's."""
        now = self.clock.path[0]
        is_counted = self.is_ours() and now in (OTHER, PREPARING)
        # Rows may be made into tensors while they are read, and images while texts are.
        is_image = path == ("image_processing",) and self.notes is not None
        is_counted |= is_image and (now == "reading_rows" or (now == "texts" and self.is_ours()))
        is_counted &= not self.failed
        if is_counted:
            self.guarded(self.clock.enter, *path)
        try:
            yield
        finally:
            if is_counted and self.clock.path == path:
                self.guarded(self.clock.leave)

    def close(self) -> None:
        """Take everything off."""
        self.hooks.close()
        self._generate.close()

    def _let_go(self) -> None:
        if self._calls is not None:
            self._calls.close()
            self._calls = None
        self.end_profile()
        self.clock.leave_all()

    def is_ours(self) -> bool:
        """Return whether a step runs, in the thread that trains: continuous batching decodes in another."""
        return self.is_open and threading.get_ident() == self._thread

    # --- forwards

    def _before(self, _module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        import torch

        if not self.is_ours() or self.notes is None:
            return
        shape = token_shape(args, kwargs)
        if shape is None:
            return
        rows, length = shape
        if self._rollout is not None:
            self._before_decoding(self._rollout, rows, length)
            return
        notes = self._forward = ForwardNotes(rows=rows, length=length)
        if self.notes.is_close:
            notes.mask = kwargs.get("attention_mask")
        self.notes.forwards.append(notes)
        if torch.is_grad_enabled():
            self.notes.given = kwargs if self.notes.is_close and not args else None
            if self.notes.is_close and self._is_profiled(self.notes):
                self._profile = DeviceProfile(self.live.device)
            self.clock.switch(notes.phase)
        else:
            notes.phase = "reference_logprobs" if self._is_reference() else "old_logprobs"
            self.clock.enter(notes.phase)

    def _after(self, _module: torch.nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        import torch

        if not self.is_ours() or self._rollout is not None or self._forward is None:
            return
        notes, self._forward = self._forward, None
        if self.clock.path[0] in ("reference_logprobs", "old_logprobs"):
            self.clock.leave()
        tensors = list(tensors_in(output))
        logits = named_in(output, "logits")
        kept = logits if logits is not None else named_in(output, "log_probs")
        notes.kept = int(kept.shape[1]) if kept is not None and kept.ndim > 1 else 0
        if logits is not None and logits.ndim == 3:
            notes.logits_bytes = logits.numel() * 4
        if self.clock.path[0] == "forward":
            self.clock.switch("forward", "loss")
            for tensor in tensors:
                if torch.is_grad_enabled() and tensor.requires_grad:
                    self.hooks.on_gradient(tensor, self._on_gradient)

    def _on_gradient(self, _gradient: torch.Tensor) -> None:
        if self.is_open and self.clock.path == ("forward", "loss"):
            self.clock.switch("backward")

    def _is_profiled(self, notes: StepNotes) -> bool:
        passes = sum(one.phase == "forward" for one in notes.forwards)
        return passes == self.profiled and self._profile is None and DeviceProfile.is_free()

    @property
    def is_profiling(self) -> bool:
        """Return whether a micro-batch is being profiled."""
        return self._profile is not None

    def end_profile(self) -> None:
        """End the profile of a micro-batch, whose backward is over, if there is one."""
        profile, self._profile = self._profile, None
        if profile is not None and self.notes is not None:
            self.notes.kernels = kernel_shares(*profile.close())

    def _is_reference(self) -> bool:
        layer = self._adapter
        return layer is not None and (layer.disable_adapters or tuple(layer.active_adapters) != self._active)

    # --- the vision tower

    def _before_vision(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        import torch

        if not self.is_ours() or self.notes is None or self.clock.path[-1] == "vision":
            return
        path = self.clock.path
        self.clock.enter(*path, "vision")
        patches, grid = patches_in(module, args, kwargs)
        if patches is None:
            return
        images = int(grid.shape[0]) if grid is not None else int(patches.shape[0])
        for notes in (self._rollout, self._forward):
            if notes is not None:
                notes.patches += patch_rows(module, patches, grid)
                notes.images += images
                break
        if self.notes.is_close and path[0] == "forward" and torch.is_grad_enabled():
            self._vision = VisionNotes(images=images)
            self.notes.vision.append(self._vision)
            if len(self.notes.vision) <= PASSES:
                self._vision.distinct = distinct_images(patches, grid)
            if len(self.notes.vision) == 1:
                self._calls = AttentionCalls()

    def _after_vision(self, _module: torch.nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        if not self.is_ours():
            return
        notes, self._vision = self._vision, None
        calls, self._calls = self._calls, None
        if calls is not None:
            calls.close()
        if notes is not None:
            notes.wants_gradient = any(tensor.requires_grad for tensor in tensors_in(output))
            notes.attention_lengths = None if calls is None else calls.lengths
        if self.clock.path[-1] == "vision":
            self.clock.leave()

    # --- rollouts

    def rollout(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make a rollout by the method that ours stands in front of, and count what happens in it as one."""
        call = self._generate.inner(name)
        notes = RolloutNotes(engine="generate" if name == "generate" else "continuous batching")
        if not self.is_ours() or self._rollout is not None or self.failed:
            return call(*args, **kwargs)
        output = None
        self.guarded(self._begin_rollout, arguments_of(args, kwargs), notes)
        try:
            output = call(*args, **kwargs)
        finally:
            self.guarded(self._end_rollout, notes, output)
        return output

    def _begin_rollout(self, call: dict[str, Any], notes: RolloutNotes) -> None:
        assert self.notes is not None
        self._rollout = notes
        self.notes.rollouts.append(notes)
        tokens = call.get("input_ids")
        if isinstance(tokens, list):  # continuous batching
            notes.rows, notes.prompt_tokens = len(tokens), max(map(len, tokens), default=0)
        elif tokens is not None:
            notes.rows, notes.prompt_tokens = map(int, tokens.shape[:2])
        self._call = call if self.notes.is_close else None
        self.notes.call = self._call if notes.engine == "generate" else None
        if self.profiled and self.notes.is_close:
            notes.busy = BusyShare(self.live.device)
        self.clock.enter("rollout", "prefill" if notes.engine == "generate" else "generate")
        rollouts = rollouts_of(self.live)
        self._fast = (0, 0, 0) if rollouts is None else _counts(rollouts)
        if rollouts is not None:
            rollouts.on_prefilled = self._on_prefilled

    def _end_rollout(self, notes: RolloutNotes, output: Any) -> None:
        import torch

        self._rollout = None
        if notes.busy is not None:
            notes.busy.close()
        if self.clock.path[0] == "rollout":
            self.clock.leave()
        rollouts = rollouts_of(self.live)
        if rollouts is not None:
            rollouts.on_prefilled = None
            if rollouts.count > self._fast[0]:
                # The live model's forwards in it are those that measure how far the copy is from it.
                notes.engine, notes.step_lengths = "fast", []
                notes.prefilled = rollouts.prefilled - self._fast[1]
                notes.compiles = len(rollouts.compiled) > self._fast[2]
        sequences = output if isinstance(output, torch.Tensor) else getattr(output, "sequences", None)
        if sequences is not None:
            notes.new_tokens = max(int(sequences.shape[1]) - notes.prompt_tokens, 0)
        elif isinstance(output, dict):
            notes.lengths = [len(getattr(one, "generated_tokens", ())) for one in output.values()]
            notes.new_tokens = max(notes.lengths, default=0)
        call, self._call = self._call, None
        if call is not None and output is not None:
            look_at_rollout(notes, call, output, self.live)

    def _on_prefilled(self) -> None:
        if self.is_ours() and self.clock.path[0] == "rollout":
            self.clock.move_on("rollout", "decode")

    def _inside(self, *_: object) -> None:
        """Note what autocast casts: it is switched on in the model's forward, behind the hooks on it."""
        import torch

        notes = self._rollout if self.is_ours() else None
        if notes is not None and len(notes.step_lengths) == 1 and torch.is_autocast_enabled(self.live.device.type):
            notes.cast_bytes = cast_bytes(self.live)

    def _before_decoding(self, notes: RolloutNotes, rows: int, length: int) -> None:
        import torch

        notes.step_lengths.append(length)
        if len(notes.step_lengths) == 1:
            notes.prefilled = rows
            return
        if self.clock.path == ("rollout", "prefill"):
            self.clock.move_on("rollout", "decode")
        if notes.busy is not None:
            notes.busy.before_step()
        if len(notes.step_lengths) == 2 and plans_per_length(self.live.device):
            backends: Any = torch.backends.cuda
            notes.is_planned_anew = bool(backends.cudnn_sdp_enabled())


def _counts(rollouts: FastRollouts) -> tuple[int, int, int]:
    return rollouts.count, rollouts.prefilled, len(rollouts.compiled)


def _blind() -> ModelSeams:
    """Return seams that never look."""
    seams = ModelSeams.__new__(ModelSeams)
    seams.notes, seams.is_open = None, False
    return seams
