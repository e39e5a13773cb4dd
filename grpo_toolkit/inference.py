"""Load a saved folder as its user would, generate, and keep a record of every token.

One request in, one record out: the tokens, the time of each, the length of every forward's input, how often the
vision tower ran. Verification reads the tokens and lengths, the latency lab reads the times; both ask the same
functions, in this process or in a fresh one (`worker.py`).
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

from grpo_toolkit.cache import base_model
from grpo_toolkit.checkpoint import ADAPTER_CONFIG, CONFIG, Kind, find_base, open_checkpoint, read_json
from grpo_toolkit.distributed import is_sharded
from grpo_toolkit.errors import CheckpointError
from grpo_toolkit.probe import CacheProbe

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import torch
    from PIL.Image import Image
    from transformers import PreTrainedModel


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
    """

    messages: Sequence[Mapping[str, Any]]
    images: Sequence[Image] = ()
    max_new_tokens: int = 64
    exact: bool = False
    use_cache: bool | None = None
    with_rivals: bool = False


@dataclass(frozen=True, kw_only=True)
class Record:
    """What one request did. Times are seconds since the request began; lists run over tokens or forwards.

    `rivals` has, per token, the next best tokens and how far their logits were below that of the token chosen.
    """

    prompt_tokens: int
    tokens: list[int]
    token_times_s: list[float]
    step_lengths: list[int]
    is_cached: bool
    vision_calls: int
    peak_memory_bytes: int
    rivals: list[dict[int, float]] = field(default_factory=list)

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
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What loading a folder said: keys that the model missed, did not expect, or that had another shape."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    dtype: str = ""
    parameters: int = 0

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
    )
    return (model if device_map else model.to(device)).eval(), load_processor(path), report


def _load_adapter(
    path: Path, *, device: str, base: Path | None, settings: Mapping[str, Any]
) -> tuple[PreTrainedModel, Any, LoadReport]:
    from peft import PeftModel, get_peft_model_state_dict

    name = read_json(path / ADAPTER_CONFIG).get("base_model_name_or_path")
    base = base or find_base(name)
    if base is None:
        where = path / ADAPTER_CONFIG
        raise CheckpointError(f"{where}: base_model_name_or_path is {name!r}, which is not on this machine")
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
        inputs = prepare_inputs(processor, request).to(device)
        # Processors make float32 pixels; only some vision towers cast them (Qwen2.5-VL does, LLaVA does not).
        for name, value in inputs.items():
            if torch.is_floating_point(value):
                inputs[name] = value.to(base_model(model).dtype)
        options: dict[str, Any] = {
            "do_sample": False,
            "temperature": None,
            "top_p": None,
            "top_k": None,
            "min_p": None,
            "repetition_penalty": 1.0,
            "max_new_tokens": request.max_new_tokens,
            "return_dict_in_generate": True,
            "output_logits": request.with_rivals,
        }
        if request.exact:
            options["min_new_tokens"] = request.max_new_tokens
        if request.use_cache is not None:
            options["use_cache"] = request.use_cache
        if is_sharded(model):  # every rank has to make as many forwards as the one that says most
            options["synced_gpus"] = True
        output = cast("Any", model).generate(**inputs, **options, streamer=stopwatch)
        peak = stopwatch.peak_memory_bytes()
    prompt_tokens = int(inputs["input_ids"].shape[1])
    return Record(
        prompt_tokens=prompt_tokens,
        tokens=output.sequences[0, prompt_tokens:].tolist(),
        token_times_s=stopwatch.times_s,
        step_lengths=probe.step_lengths,
        is_cached=probe.is_cached,
        vision_calls=probe.vision_calls,
        peak_memory_bytes=peak,
        rivals=[_rivals(logits[0]) for logits in output.logits or ()],
    )


def _rivals(logits: torch.Tensor, count: int = 4) -> dict[int, float]:
    best = logits.float().topk(count + 1)
    gaps = (best.values[0] - best.values).tolist()
    return dict(zip(best.indices.tolist()[1:], gaps[1:], strict=True))


def prepare_inputs(processor: Any, request: Request) -> Any:
    """Render the chat template and run the processor on one request: a batch of one, as tensors."""
    messages = image_messages(request)
    if not hasattr(processor, "image_processor"):
        text = render_chat(processor, messages)
        return processor(text, return_tensors="pt", add_special_tokens=False)
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    images = list(request.images) or None
    return processor(text=[text], images=images, return_tensors="pt")


def render_chat(tokenizer: Any, messages: list[dict[str, Any]]) -> str:
    """The prompt as text; without a chat template, the texts one after the other."""
    flat = [{**message, "content": _text_of(message["content"])} for message in messages]
    if getattr(tokenizer, "chat_template", None) is None:
        return "\n".join(message["content"] for message in flat)
    return str(tokenizer.apply_chat_template(flat, tokenize=False, add_generation_prompt=True))


def _text_of(content: str | list[dict[str, Any]]) -> str:
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def image_messages(request: Request) -> list[dict[str, Any]]:
    """The messages with every content as typed parts, and an image part for each image that has none yet."""
    messages = [
        {**message, "content": [{"type": "text", "text": content}] if isinstance(content, str) else list(content)}
        for message in request.messages
        for content in [message["content"]]
    ]
    placed = sum(part.get("type") == "image" for message in messages for part in message["content"])
    for message in messages:
        if message["role"] == "user":
            message["content"] = [{"type": "image"}] * (len(request.images) - placed) + message["content"]
            break
    return messages


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
