"""The result of a tuning: as code, as keys of `generation_config.json`, as serving commands."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.checkpoint.short_repr import HtmlTable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from grpo_toolkit.latency.engines.protocol import Options
    from grpo_toolkit.latency.rows.row import Ratio

STATIC_SINCE: Final = {
    "qwen2_vl": "4.57",
    "qwen2_5_vl": "4.57",
    "mixtral": "4.57",
    **dict.fromkeys(
        ("llama", "llava", "llava_next", "llava_onevision", "qwen2", "mistral", "gemma", "gemma2"), "4.49"
    ),
    **dict.fromkeys(("phi3", "granite", "olmo2", "mllama", "paligemma"), "4.49"),
}
"""Since which transformers `generate` takes cache_implementation="static" for a model type; it raises before (in 4.49
`_supports_static_cache` is False for Qwen2.5-VL, True for Llama; 4.57 has no such switch any more). A type that is not
here is taken for a late one."""

OLDEST: Final = "4.49"
_LATE: Final = "4.57"


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A setting that was tried.

    Attributes:
        name: in a few words.
        options, batch_size: the setting.
        tpot_s: median time per output token of a sequence; None where it could not run.
        tokens_per_s: of the whole batch, decoding alone.
        peak_bytes: of memory.
        first_s: the first answer, compilation included.
        equal_tokens: how many tokens are the default's; `is_same` also where a tie of logits decided otherwise.
        note: why it is not eligible, or what is to be known.
    """

    name: str
    options: Options
    batch_size: int = 1
    tpot_s: float | None = None
    tokens_per_s: float | None = None
    peak_bytes: int | None = None
    first_s: float | None = None
    equal_tokens: int | None = None
    is_same: bool = False
    note: str = ""

    @property
    def is_eligible(self) -> bool:
        """Return whether it ran, gave the same tokens, and is within the limits."""
        return self.is_same and self.tpot_s is not None and not self.note


@dataclass(frozen=True, kw_only=True, repr=False)
class Tuning(HtmlTable):
    """The fastest setting that gives the same tokens.

    Attributes:
        path: the folder.
        model_type, dtype: of the model.
        trials: everything that was tried, the default first.
        best: the setting to use.
        ratio: its TPOT over the default's at batch 1, in turns; None where the default is the best.
        environment: where it was measured; elsewhere another setting may be.
    """

    path: str
    model_type: str
    dtype: str
    new_tokens: int
    trials: tuple[Trial, ...]
    best: Trial
    ratio: Ratio | None
    environment: Mapping[str, str]

    @property
    def speedup(self) -> float:
        """The default's time per token of a sequence over this setting's."""
        return 1.0 if self.ratio is None else 1 / self.ratio.median

    def generation_keys(self) -> dict[str, Any]:
        """Return the keys of a generation config that make `generate` run so by itself.

        None where decoding is compiled on a CPU: `generate` does that only when it is told, and the static cache alone
        would be no faster.
        """
        options = self.best.options
        return {} if options.is_compiled and not self._compiles_by_itself else _cache_keys(options)

    @property
    def _compiles_by_itself(self) -> bool:
        return self.best.options.device.startswith("cuda")

    def code(self) -> str:
        """Return Python that loads and runs the model so."""
        options = self.best.options
        loading = [f'dtype="{self.dtype}"', f'device_map="{options.device}"']
        if options.attn_implementation is not None:
            loading.append(f'attn_implementation="{options.attn_implementation}"')
        running = ["**inputs", "do_sample=False"]
        running += [f'{key}="{value}"' for key, value in _cache_keys(options).items()]
        imports = [f"from transformers import {self._auto_class}"]
        lines = [f'model = {self._auto_class}.from_pretrained("{self.path}", {", ".join(loading)})']
        if options.is_compiled:
            config = "" if options.compile_mode is None else f'mode="{options.compile_mode}"'
            imports.append("from transformers import CompileConfig")
            running.append("compile_config=compile_config")
            lines.append(f"compile_config = CompileConfig({config})")
            if not self._compiles_by_itself:
                lines.append("compile_config._compile_all_devices = True  # generate compiles on accelerators alone")
        if options.ahead:
            packed = ", packed_vision=True" if options.packed_vision else ""
            imports.append("from grpo_toolkit import DecodeAhead")
            lines.append(f"ahead = DecodeAhead(model{packed})  # one for all requests: it keeps the cache")
        elif options.packed_vision:
            imports.append("from grpo_toolkit import inference_ready")
        lines = [*imports, "", *lines]
        call = f"{'ahead' if options.ahead else 'model'}.generate({', '.join(running)})"
        inside = []
        if options.packed_vision and not options.ahead:
            inside.append("inference_ready(model, packed_vision=True)")
        if options.sdpa_backend is not None:
            lines[0:0] = ["from torch.nn.attention import SDPBackend, sdpa_kernel"]
            kernels = ", ".join(f"SDPBackend.{name}" for name in _KERNELS[options.sdpa_backend])
            inside.append(f"sdpa_kernel([{kernels}])")
        return "\n".join([*lines, *([f"with {', '.join(inside)}:", f"    {call}"] if inside else [call])])

    @property
    def _auto_class(self) -> str:
        from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

        sees = self.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
        return "AutoModelForImageTextToText" if sees else "AutoModelForCausalLM"

    def serving_commands(self) -> list[str]:
        """Return commands for servers with as many sequences at once; their caches and CUDA graphs are their own."""
        batch = self.best.batch_size
        ours = f"transformers serve {self.path} --dtype {self.dtype}"
        if self.best.options.attn_implementation is not None:
            ours += f" --attn-implementation {self.best.options.attn_implementation}"
        if self.best.options.is_compiled:
            ours += " --compile"
        return [ours, f"vllm serve {self.path} --dtype {self.dtype} --max-num-seqs {batch}"]

    def to_json(self) -> dict[str, Any]:
        found = asdict(self)
        return {
            **found,
            "speedup": self.speedup,
            "code": self.code(),
            "generation_config": self.generation_keys(),
            "serving": self.serving_commands(),
        }

    def table_rows(self) -> list[dict[str, object]]:
        return [
            {
                "setting": trial.name,
                "TPOT ms": "" if trial.tpot_s is None else f"{trial.tpot_s * 1e3:.2f}",
                "tokens/s": "" if trial.tokens_per_s is None else f"{trial.tokens_per_s:.0f}",
                "": "best" if trial == self.best else trial.note,
            }
            for trial in self.trials
        ]


def _cache_keys(options: Options) -> dict[str, Any]:
    implementation = options.cache_implementation
    return {} if implementation in (None, "dynamic") else {"cache_implementation": implementation}


_KERNELS: Final = {
    "flash": ("FLASH_ATTENTION",),
    "efficient": ("EFFICIENT_ATTENTION",),
    "math": ("MATH",),
    "cudnn": ("CUDNN_ATTENTION",),
    "no_cudnn": ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH"),
}


def keys_for_files(tuning: Tuning, config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the keys of a tuning that may stand in an export's `generation_config.json`.

    An export loads wherever its base loads, so a key is left out if an older transformers that loads the base would
    fail on it.

    Args:
        tuning: what was found.
        config: the base's `config.json`.

    Returns:
        The keys, and a line for each that was left out.
    """
    from packaging.version import InvalidVersion, Version

    keys, left_out = tuning.generation_keys(), []
    if tuning.best.options.ahead:
        left_out.append("decoding ahead is code, and no key of generation_config.json: grpo_toolkit.DecodeAhead")
    if tuning.best.options.packed_vision:
        left_out.append("packed vision is code, and no key of generation_config.json: grpo_toolkit.inference_ready")
    since = STATIC_SINCE.get(str(config.get("model_type")), _LATE)
    try:
        written = Version(str(config.get("transformers_version")))
    except InvalidVersion:
        written = Version(OLDEST)
    if "static" in str(keys.get("cache_implementation")) and max(written, Version(OLDEST)) < Version(since):
        left = keys.pop("cache_implementation")
        left_out.append(
            f'cache_implementation="{left}" is left out of generation_config.json: this base loads in transformers '
            f"{max(written, Version(OLDEST))}, whose generate refuses it ({since} takes it); pass it to generate"
        )
    return keys, left_out
