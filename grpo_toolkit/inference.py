"""Load a saved folder as its user would, generate, and keep a record of every token.

One request in, one record out: the tokens, the time of each, the length of every forward's input, how often the
vision tower ran. Verification reads the tokens and lengths, the latency lab reads the times; both ask the same
functions, in this process or in a fresh one (`worker.py`).
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final, cast

from grpo_toolkit.cache import base_model
from grpo_toolkit.checkpoint import CONFIG, Kind, base_of_adapter, open_checkpoint, read_json
from grpo_toolkit.distributed import world_size
from grpo_toolkit.evidence import Evidence, collect
from grpo_toolkit.inputs import inputs_for, prepare_inputs
from grpo_toolkit.probe import CacheProbe
from grpo_toolkit.whole_weights import is_collective

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import torch
    from PIL.Image import Image
    from transformers import PreTrainedModel


GREEDY: Final[dict[str, Any]] = {
    "do_sample": False,
    "temperature": None,
    "top_p": None,
    "top_k": None,
    "min_p": None,
    "repetition_penalty": 1.0,
}
"""Greedy decoding for `generate`, with every sampling setting and penalty off: the same weights say the same."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One generation request.

    Attributes:
        messages: the conversation in chat form, `[{"role": ..., "content": str | parts}]`.
        images: images for the conversation's image parts, in order; where the contents are plain strings they go in
            front of the first user text.
        max_new_tokens: the most tokens to generate.
        exact: generate exactly `max_new_tokens`, ignoring the end-of-sequence token.
        use_cache: None leaves it to the model's own files, which is what a user gets.
        with_rivals: also record by how much each token won, and over which (costs keeping the logits).
        with_evidence: also keep what the processor gave and the first logits, to compare another model with.
        forced: tokens to say whatever the logits are: two models can be compared where they would part.
    """

    messages: Sequence[Mapping[str, Any]]
    images: Sequence[Image] = ()
    max_new_tokens: int = 64
    exact: bool = False
    use_cache: bool | None = None
    with_rivals: bool = False
    with_evidence: bool = False
    forced: Sequence[int] = ()


@dataclass(frozen=True, kw_only=True)
class Record:
    """What one request did. Times are seconds since the request began; lists run over tokens or forwards.

    `rivals` has, per token, the next best tokens and how far their logits were below that of the token chosen.
    """

    prompt_tokens: int
    tokens: list[int]
    token_times_s: list[float]
    step_lengths: list[int]
    is_cached: bool | None
    vision_calls: int
    peak_memory_bytes: int
    rivals: list[dict[int, float]] = field(default_factory=list)
    evidence: Evidence | None = field(default=None, repr=False, compare=False)

    @property
    def ttft_s(self) -> float:
        """Time to first token, preprocessing included."""
        return self.token_times_s[0]

    @property
    def e2e_s(self) -> float:
        """Time to the last token."""
        return self.token_times_s[-1]

    @property
    def tpot_s(self) -> float | None:
        """Time per output token, (t_last - t_first) / (n - 1); None where n < 2."""
        count = len(self.token_times_s)
        return (self.token_times_s[-1] - self.token_times_s[0]) / (count - 1) if count > 1 else None

    def to_json(self) -> dict[str, Any]:
        """Everything but the evidence, which is tensors."""
        found = asdict(replace(self, evidence=None))
        del found["evidence"]
        return found


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What loading a folder said: keys that the model missed, did not expect, or that had another shape.

    `tied` says whether the output embeddings are the input embeddings; None where the model does not have both.
    """

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    dtype: str = ""
    parameters: int = 0
    tied: bool | None = None

    @property
    def is_clean(self) -> bool:
        return not (self.missing or self.unexpected or self.mismatched)


def load_model(
    path: Path,
    *,
    device: str = "cpu",
    attn_implementation: str | None = None,
    base: Path | None = None,
    dtype: str = "auto",
    device_map: str | None = None,
) -> tuple[PreTrainedModel, Any, LoadReport]:
    """Load a model folder (or an adapter on its base, unmerged) with its processor.

    Args:
        path: a folder with a full model, or with an adapter.
        device: where to put it.
        attn_implementation: None leaves it to the library.
        base: for an adapter, the base's folder; by default the one that the adapter names.
        dtype: "auto" is that of its files.
        device_map: accelerate's, such as "auto"; it then decides where the model goes.

    Returns:
        The model in eval mode on `device`, its processor (or tokenizer, for a text model), and what loading said.

    Raises:
        CheckpointError: not a checkpoint, or an adapter whose base is not here.
    """
    checkpoint = open_checkpoint(path)
    if checkpoint.kind is Kind.ADAPTER:
        settings = {"attn_implementation": attn_implementation, "dtype": dtype, "device_map": device_map}
        return _load_adapter(path, device=device, base=base, settings=settings)
    extra = {"attn_implementation": attn_implementation, "device_map": device_map}
    model, info = auto_class(path).from_pretrained(
        path,
        output_loading_info=True,
        **{dtype_argument(): dtype},
        **{name: value for name, value in extra.items() if value is not None},
    )
    report = LoadReport(
        missing=sorted(info["missing_keys"]),
        unexpected=sorted(info["unexpected_keys"]),
        mismatched=sorted(str(key) for key in info["mismatched_keys"]),
        dtype=str(model.dtype).removeprefix("torch."),
        parameters=model.num_parameters(),
        tied=_is_tied(model),
    )
    return (model if device_map else model.to(device)).eval(), load_processor(path), report


def _is_tied(model: PreTrainedModel) -> bool | None:
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    return None if inputs is None or outputs is None else getattr(outputs, "weight", None) is inputs.weight


def _load_adapter(
    path: Path, *, device: str, base: Path | None, settings: Mapping[str, Any]
) -> tuple[PreTrainedModel, Any, LoadReport]:
    from peft import PeftModel, get_peft_model_state_dict

    base = base or base_of_adapter(path)
    model, processor, report = load_model(base, device=device, **settings)
    adapted = PeftModel.from_pretrained(model, path).eval()
    if not settings["device_map"]:
        adapted = adapted.to(device)
    # PEFT only warns about keys that fit nowhere, and leaves fresh random weights in their place.
    stored, wanted = set(open_checkpoint(path).tensors()), set(get_peft_model_state_dict(adapted))
    report = replace(
        report,
        missing=[*report.missing, *sorted(wanted - stored)],
        unexpected=[*report.unexpected, *sorted(stored - wanted)],
    )
    return adapted, load_processor(path) if has_processor(path) else processor, report


def has_processor(path: Path) -> bool:
    """Whether the folder carries a tokenizer or processor of its own."""
    return any((path / name).is_file() for name in ("tokenizer_config.json", "preprocessor_config.json"))


def load_processor(path: Path) -> Any:
    """The folder's processor, or its tokenizer where it has no image side."""
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(path)


def auto_class(path: Path) -> Any:
    """The Auto class that loads this folder for generation: image-text-to-text if the model type has one."""
    import transformers
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    model_type = read_json(path / CONFIG).get("model_type")
    if model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return transformers.AutoModelForImageTextToText
    return AutoModelForCausalLM


def dtype_argument() -> str:
    """`dtype` since transformers 4.56, `torch_dtype` before (huggingface/transformers#39782)."""
    import transformers
    from packaging.version import Version

    return "dtype" if Version(transformers.__version__) >= Version("4.56") else "torch_dtype"


def generate(model: torch.nn.Module, processor: Any, request: Request) -> Record:
    """Answer one request greedily and record it.

    Greedy with every sampling setting and penalty switched off, so that two models with the same weights must say
    the same; `eos_token_id`, `pad_token_id` and `use_cache` come from the model's own generation config.
    """
    import torch

    device = base_model(model).device
    stopwatch = Stopwatch(device)
    with torch.no_grad(), CacheProbe(model) as probe:
        prepared = prepare_inputs(processor, [request])
        given = dict(prepared) if request.with_evidence else {}
        inputs = inputs_for(model, prepared)
        options: dict[str, Any] = {
            **GREEDY,
            "max_new_tokens": request.max_new_tokens,
            "return_dict_in_generate": True,
            "output_logits": request.with_rivals or request.with_evidence,
        }
        if request.forced:
            begin, forced = int(inputs["input_ids"].shape[1]), list(request.forced)
            options["prefix_allowed_tokens_fn"] = lambda _, said: [forced[min(len(said) - begin, len(forced) - 1)]]
        if getattr(base_model(model).generation_config, "cache_implementation", None) is not None:
            options["disable_compile"] = True  # the probe's hooks would be compiled anew at every step
        if request.exact:
            options["min_new_tokens"] = request.max_new_tokens
        if request.use_cache is not None:
            options["use_cache"] = request.use_cache
        if world_size() > 1:  # where forwards are collective every rank makes as many as the one that says most
            options["synced_gpus"] = is_collective(model)
        output = cast("Any", model).generate(**inputs, **options, streamer=stopwatch)
        peak = stopwatch.peak_memory_bytes()
    prompt_tokens = int(inputs["input_ids"].shape[1])
    tokens = output.sequences[0, prompt_tokens:].tolist()
    return Record(
        prompt_tokens=prompt_tokens,
        tokens=tokens,
        token_times_s=stopwatch.times_s,
        step_lengths=probe.step_lengths,
        is_cached=probe.is_cached,
        vision_calls=probe.vision_calls,
        peak_memory_bytes=peak,
        rivals=_rivals_of(output, tokens) if request.with_rivals else [],
        evidence=collect(given, output.logits) if request.with_evidence else None,
    )


def _rivals_of(output: Any, tokens: list[int]) -> list[dict[int, float]]:
    return [rivals(logits[0], token) for logits, token in zip(output.logits, tokens, strict=False)]


def rivals(logits: torch.Tensor, chosen: int, count: int = 4) -> dict[int, float]:
    """The tokens that came next after the one chosen, and how far their logits were below its own."""
    # In bfloat16 two logits are often equal, and topk need not put the one first that argmax chose.
    best = logits.float().topk(count + 1)
    gaps = (best.values[0] - best.values).tolist()
    others = [(token, gap) for token, gap in zip(best.indices.tolist(), gaps, strict=True) if token != chosen]
    return dict(others[:count])


class Stopwatch:
    """A `generate` streamer that notes the time and the peak memory of every token.

    `generate` hands over the prompt first, then each token after it has reached the host, so on a GPU a token's
    time includes its computation. Memory is CUDA's allocator peak on a GPU; on a CPU it is the process's resident
    peak, reset at the start where the kernel allows it (Linux, /proc/self/clear_refs).
    """

    def __init__(self, device: torch.device) -> None:
        import torch

        self.device = device
        self.times_s: list[float] = []
        self._saw_prompt = False
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        else:
            reset_resident_peak()
        self._start = time.perf_counter()

    def put(self, value: torch.Tensor) -> None:
        if not self._saw_prompt:
            self._saw_prompt = True
            return
        self.times_s.append(time.perf_counter() - self._start)

    def end(self) -> None:
        """Nothing to do: the last token has been noted."""

    def peak_memory_bytes(self) -> int:
        if self.device.type == "cuda":
            import torch

            return int(torch.cuda.max_memory_allocated(self.device))
        return resident_peak()


def reset_resident_peak() -> None:
    """Begin a new resident peak, where the kernel allows it."""
    try:
        with open("/proc/self/clear_refs", "w") as file:  # noqa: PTH123 (a kernel switch, not a path to read)
            file.write("5")
    except OSError:  # not Linux, or not allowed: the peak is then that of the whole process
        return


def resident_peak() -> int:
    """The process's resident peak in bytes since the last reset."""
    import resource
    import sys
    from pathlib import Path

    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
