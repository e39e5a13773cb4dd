"""A live model in this process, timed phase by phase.

The timed path carries no hook on the language model, so that compiled and eager decoding run as they would anywhere
else: a token's time is when `generate` hands it to a streamer, which needs it on the host. The vision tower is timed
by a hook of its own, with CUDA events on a GPU, read when the answer is done. What needs hooks on the whole model
(lengths, cache) is asked in a separate, untimed answer (`prove`).
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from grpo_toolkit.errors import InputError
from grpo_toolkit.latency.engines.protocol import FREE_MEMORY, Answer, Engine, EngineFacts, Evidence, Options
from grpo_toolkit.latency.engines.think_markers import count_thinking
from grpo_toolkit.latency.engines.timers import TokenClock, VisionTimer, timed_images
from grpo_toolkit.latency.engines.toggles import (
    expected_errors,
    generation_config_changed,
    left_in_training,
    sdpa_limited_to,
    without_stored_graphs,
)
from grpo_toolkit.latency.rows.row import Proof, Timeline
from grpo_toolkit.model.attention.packed_vision import packed_vision
from grpo_toolkit.model.cache_probe import CacheProbe, cache_in
from grpo_toolkit.model.generation.chat_inputs import inputs_for, prepare_inputs
from grpo_toolkit.model.generation.decode_ahead import DecodeAhead
from grpo_toolkit.model.generation.generate import GREEDY, rivals
from grpo_toolkit.model.hardware.environment import environment_of, probe_hardware
from grpo_toolkit.model.hardware.model_sizes import live_sizes
from grpo_toolkit.model.hardware.synchronize import synchronize
from grpo_toolkit.model.live_model import base_model
from grpo_toolkit.model.load import load_model
from grpo_toolkit.model.memory import resident_peak, room_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    import torch

    from grpo_toolkit.model.generation.request import Request


class LocalEngine(Engine):
    """A model and its processor, where they are, as they stand (eval mode or not, cache on or not)."""

    def __init__(self, model: torch.nn.Module, processor: Any) -> None:
        self.model = model
        self.processor = processor
        self._tokenizer = getattr(processor, "tokenizer", processor)
        self._compiled_for: set[str | None] = set()
        self._ahead = DecodeAhead(model)

    def facts(self) -> EngineFacts:
        """Return dtype, sizes, attention and the environment of this process."""
        inner = base_model(self.model)
        return EngineFacts(
            model_type=inner.config.model_type,
            dtype=str(inner.dtype).removeprefix("torch."),
            device=str(inner.device),
            parameters=sum(parameter.numel() for parameter in self.model.parameters()),
            attn_implementation=getattr(inner.config, "_attn_implementation", None),
            places=sorted({str(place) for place in (getattr(inner, "hf_device_map", None) or {}).values()}),
            sizes=live_sizes(self.model),
            environment=self.environment(),
        )

    def ask(self, requests: Sequence[Request], options: Options) -> Answer:
        """Answer a batch, timed (see `Engine.ask`)."""
        cap, exact = requests[0].max_new_tokens, requests[0].exact
        device = base_model(self.model).device
        options = replace(options, device=str(device))  # of a live model, the caller need not have said
        with self._ready(requests, options), VisionTimer(self.model, device) as vision:
            clock = TokenClock(device)
            with timed_images(self.processor) as images_s:
                inputs = prepare_inputs(self.processor, requests)
            tokenized_s = clock.now()
            inputs = inputs_for(self.model, inputs)
            synchronize(device)
            transferred_s = clock.now()
            decoder: Any = self._ahead if options.ahead else self.model
            output = decoder.generate(**inputs, **_settings(cap, options), streamer=clock)
            prompt = int(inputs["input_ids"].shape[1])
            texts = self._tokenizer.batch_decode(output[:, prompt:], skip_special_tokens=True)
            end_s = clock.now()
            allocated, reserved = clock.peaks()
            before_s, after_s = vision.seconds(first_token=clock.first_token)
        times = clock.times_s
        tokens = self._cut(output[:, prompt:].tolist(), exact=exact, options=options)
        phases = {
            "tokenize_s": tokenized_s - sum(images_s),
            "image_s": sum(images_s),
            "transfer_s": transferred_s - tokenized_s,
            "vision_s": before_s + after_s,
            "prefill_s": times[0] - transferred_s - before_s,
            "decode_s": times[-1] - times[0] - after_s,
            "detokenize_s": end_s - times[-1],
        }
        think = None
        if len(tokens) == 1:
            think = count_thinking([self._tokenizer.decode([token]) for token in tokens[0]])
        del output
        return Answer(
            timeline=Timeline(
                token_times_s=times,
                prompt_tokens=prompt,
                output_tokens=sum(map(len, tokens)),
                output_lengths=[len(row) for row in tokens],
                image_tokens=self._image_tokens(inputs["input_ids"]),
                think_tokens=think,
                answer_tokens=None if think is None else len(tokens[0]) - think,
                first_answer_s=None if think is None or think == len(tokens[0]) else times[think],
                is_capped=not exact and any(len(row) == cap and not self._ends(row, options) for row in tokens),
                phases_s=phases,
            ),
            tokens=tokens,
            texts=texts,
            peak_allocated_bytes=allocated,
            peak_reserved_bytes=reserved,
            peak_resident_bytes=resident_peak(),
        )

    def prove(self, requests: Sequence[Request], options: Options) -> Evidence:
        """Answer a batch under observation: lengths of every forward, the cache, the vision tower. Not compiled."""
        cap, exact = requests[0].max_new_tokens, requests[0].exact
        options = replace(options, device=str(base_model(self.model).device))
        with self._ready(requests, options), CacheProbe(self.model) as probe:
            inputs = inputs_for(self.model, prepare_inputs(self.processor, requests))
            settings = _settings(cap, options, compiled=False) | {"output_logits": requests[0].with_rivals}
            output = cast("Any", self.model).generate(**inputs, **settings, return_dict_in_generate=True)
            prompt = int(inputs["input_ids"].shape[1])
            said = output.sequences[0, prompt:].tolist()
            grid = inputs.get("image_grid_thw")
            return Evidence(
                proof=Proof(
                    is_cached=probe.is_cached, step_lengths=probe.step_lengths, vision_calls=probe.vision_calls
                ),
                kv_bytes=cache_bytes(cache_in(output)),
                tokens=self._cut(output.sequences[:, prompt:].tolist(), exact=exact, options=options),
                patches=0 if grid is None else int(grid.prod(dim=-1).sum()),
                rivals=[rivals(logits[0], token) for logits, token in zip(output.logits or (), said, strict=False)],
            )

    def environment(self) -> dict[str, str]:
        """Return the environment of this process, now, with the memory that answers could still take."""
        device = str(base_model(self.model).device)
        room = room_bytes(device)
        return environment_of(device) | ({} if room is None else {FREE_MEMORY: str(room)})

    def probe_hardware(self) -> dict[str, float]:
        """Measure bandwidth and matrix throughput of the model's device."""
        return probe_hardware(base_model(self.model).device, base_model(self.model).dtype)

    def close(self) -> None:
        """Do nothing: the model is its owner's."""

    @contextmanager
    def _ready(self, requests: Sequence[Request], options: Options) -> Iterator[None]:
        import torch

        if len({(request.max_new_tokens, request.exact) for request in requests}) != 1:
            raise InputError("requests of one batch must ask for as many new tokens, all exactly or none")
        changes: dict[str, Any] = {}
        if requests[0].exact:
            changes["eos_token_id"] = None  # nothing ends the answer, and nothing is paid for barring its end
        elif options.eos_token_ids is not None:
            changes["eos_token_id"] = list(options.eos_token_ids)
        if options.cache_implementation == "dynamic":
            changes["cache_implementation"] = None
        if self._decodes_without_cache(options):
            # A model of random weights may say an image token, which the next full forward looks for an image for.
            changes["suppress_tokens"] = self._image_ids() or None
        if options.is_compiled:
            self._compile_for(options.sdpa_backend)
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(generation_config_changed(base_model(self.model), changes))
            if options.sdpa_backend is not None:
                stack.enter_context(sdpa_limited_to(options.sdpa_backend))
                if options.is_compiled:
                    stack.enter_context(without_stored_graphs())
            stack.enter_context(self._state(options))
            if options.packed_vision:
                stack.enter_context(packed_vision(self.model))
            if options.sample:
                torch.manual_seed(0)
            with expected_errors(f"a batch of {len(requests)}"):
                yield

    def _state(self, options: Options) -> AbstractContextManager[None]:
        return left_in_training(self.model) if options.training else nullcontext()

    def _compile_for(self, kernels: str | None) -> None:
        """Drop what was compiled for other SDPA kernels: torch chooses one when it compiles, and never looks again."""
        import torch

        if self._compiled_for - {kernels}:
            torch.compiler.reset()
        self._compiled_for = {kernels}

    def _decodes_without_cache(self, options: Options) -> bool:
        said = options.use_cache
        return (base_model(self.model).generation_config.use_cache if said is None else said) is False

    def _image_ids(self) -> list[int]:
        config = base_model(self.model).config
        names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
        return sorted({found for name in names if isinstance(found := getattr(config, name, None), int)})

    def _image_tokens(self, tokens: torch.Tensor) -> int | None:
        config = base_model(self.model).config
        token = getattr(config, "image_token_id", getattr(config, "image_token_index", None))
        return None if token is None else int((tokens[0] == token).sum())

    def _cut(self, rows: list[list[int]], *, exact: bool, options: Options) -> list[list[int]]:
        """Cut each sequence at its own end: `generate` pads those that end before the longest."""
        if exact:
            return rows
        ends = self._eos(options)
        return [row[: next((i + 1 for i, token in enumerate(row) if token in ends), len(row))] for row in rows]

    def _ends(self, row: list[int], options: Options) -> bool:
        return bool(row) and row[-1] in self._eos(options)

    def _eos(self, options: Options) -> set[int]:
        generation_config = base_model(self.model).generation_config
        found: Any = options.eos_token_ids or getattr(generation_config, "eos_token_id", None)
        return set() if found is None else set(found if isinstance(found, list | tuple) else [found])


def load_as(path: Path, options: Options) -> tuple[torch.nn.Module, Any]:
    """Load a folder as options say; returns the model and its processor."""
    model, processor, _ = load_model(
        path,
        device=options.device,
        attn_implementation=options.attn_implementation,
        dtype=options.dtype or "auto",
        device_map=options.device_map,
    )
    return model, processor


def cache_bytes(cache: Any) -> int | None:
    """Return the bytes of a KV cache: allocated keys and values of every layer."""
    if cache is None:
        return None
    layers = getattr(cache, "layers", None)
    if layers is not None:
        # A layer of linear attention has states of a fixed size, and no keys.
        pairs = [(layer.keys, layer.values) for layer in layers if hasattr(layer, "keys")]
    else:  # transformers before 4.54 (huggingface/transformers#39106)
        pairs = list(zip(cache.key_cache, cache.value_cache, strict=True))
    return sum(int(t.numel() * t.element_size()) for pair in pairs for t in pair if hasattr(t, "numel"))


def _settings(cap: int, options: Options, *, compiled: bool | None = None) -> dict[str, Any]:
    chosen: dict[str, Any] = {"max_new_tokens": cap, **({} if options.sample else GREEDY)}
    if options.use_cache is not None:
        chosen["use_cache"] = options.use_cache
    if options.cache_implementation not in (None, "dynamic"):
        chosen["cache_implementation"] = options.cache_implementation
        wanted = options.is_compiled if compiled is None else compiled
        if not wanted:
            chosen["disable_compile"] = True
        elif options.device == "cpu" or options.compile_mode is not None:
            from transformers.generation.configuration_utils import CompileConfig

            mode = {} if options.compile_mode is None else {"mode": options.compile_mode}
            chosen["compile_config"] = CompileConfig(**mode)
            # generate compiles on accelerators alone, unless it is told
            chosen["compile_config"]._compile_all_devices = True
    return chosen
