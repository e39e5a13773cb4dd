"""Folders that people reported as broken in 2025 and 2026, each built anew of a tiny base: situations, not copies."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from scripts.models.base_variants import change_json, change_weights

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Report:
    """A report from the wild: where it stands, the base it is made of, and how.

    `thread` is a path of github.com. `build` takes the base's folder and the new one, which is a copy of it or, for
    an adapter, empty.
    """

    thread: str
    base: str
    build: Callable[[Path, Path], None]
    is_adapter: bool = False


def edited(file: str, **values: Any) -> Callable[[Path, Path], None]:
    """Return a builder that sets keys of a JSON file; ... deletes one."""

    def change(content: dict[str, Any]) -> None:
        content.update(values)
        for key in [key for key, value in values.items() if value is ...]:
            del content[key]

    return lambda _base, folder: void(change_json(folder, file, change))


def reweighted(change: Callable[[Tensors], Tensors]) -> Callable[[Path, Path], None]:
    return lambda _base, folder: void(change_weights(folder, change))


def void(_: object) -> None:
    return None


def cut_by_the_tokenizer(_base: Path, folder: Path) -> None:
    """The tokenizer was called with truncation while it was trained or calibrated with, and saved so."""
    limit = {"direction": "Right", "max_length": 24, "strategy": "LongestFirst", "stride": 0}
    change_json(folder, "tokenizer.json", lambda content: content.update(truncation=limit))


def text_only_processor(_base: Path, folder: Path) -> None:
    """The tokenizer was saved, and of the processor a file without the image side."""
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "Qwen2_5_VLProcessor"}))


TEXT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def text_only_template(_base: Path, folder: Path) -> None:
    change_json(folder, "chat_template.json", lambda content: content.update(chat_template=TEXT_TEMPLATE))
    change_json(folder, "tokenizer_config.json", lambda content: content.update(chat_template=TEXT_TEMPLATE))


def template_in_the_tokenizer(base: Path, folder: Path) -> None:
    template = json.loads((base / "chat_template.json").read_text())["chat_template"]
    (folder / "chat_template.json").unlink()
    change_json(folder, "tokenizer_config.json", lambda content: content.update(chat_template=template))


def without_tower(weights: Tensors) -> Tensors:
    return {name: tensor for name, tensor in weights.items() if not name.startswith("visual.")}


def stacked_experts(weights: Tensors) -> Tensors:
    """The experts as transformers 5 holds them, saved without its way back."""
    kept = {name: tensor for name, tensor in weights.items() if ".experts." not in name}
    layers = sorted({name.partition(".experts.")[0] for name in weights if ".experts." in name})
    for layer in layers:
        count = len(
            {name.split(".experts.")[1].split(".")[0] for name in weights if name.startswith(layer + ".experts")}
        )
        parts: dict[str, list[torch.Tensor]] = {"gate": [], "up": [], "down": []}
        for expert in range(count):
            for part, found in parts.items():
                found.append(weights[f"{layer}.experts.{expert}.{part}_proj.weight"])
        both = [torch.cat(pair) for pair in zip(parts["gate"], parts["up"], strict=True)]
        kept[f"{layer}.experts.gate_up_proj"] = torch.stack(both)
        kept[f"{layer}.experts.down_proj"] = torch.stack(parts["down"])
    return kept


def headless(_base: Path, folder: Path) -> None:
    """A body that was trained and saved without its head, by a trainer of embeddings."""
    change_weights(
        folder, lambda held: {n.removeprefix("model."): t for n, t in held.items() if n != "lm_head.weight"}
    )
    change_json(folder, "config.json", lambda content: content.update(architectures=["LlamaModel"]))


def padded_rows(weights: Tensors) -> Tensors:
    """Rows that only tensor parallelism needed."""
    name = "model.embed_tokens.weight"
    return {**weights, name: torch.cat([weights[name], weights[name][:8]])}


def theta_in_scaling(_base: Path, folder: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content.pop("rope_parameters", None)
        content.pop("rope_theta", None)
        content["rope_scaling"] = {"rope_type": "default", "rope_theta": 500000.0}

    change_json(folder, "config.json", change)


def part_alone(weights: Tensors) -> Tensors:
    """The language model's own state dict under the whole model's config."""
    return {n.removeprefix("model."): t for n, t in weights.items() if not n.startswith("visual.")}


def other_end(_base: Path, folder: Path) -> None:
    """The template's end of turn became the tokenizer's, in the tokenizer alone."""
    change_json(folder, "tokenizer_config.json", lambda content: content.update(eos_token="<s>"))


def adapter(base: Path, folder: Path, **options: Any) -> Tensors:
    """Save a LoRA of the base with second factors that are not zero, and return its tensors."""
    from peft import LoraConfig, get_peft_model

    from grpo_toolkit.model.load import load_model

    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    torch.manual_seed(0)
    model = get_peft_model(load_model(base)[0], LoraConfig(**{**settings, **options}))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    change_json(folder, "adapter_config.json", lambda config: config.update(base_model_name_or_path=str(base)))
    return load_file(folder / "adapter_model.safetensors")


def store(folder: Path, tensors: Tensors) -> None:
    held = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    save_file(held, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def merged_adapter_config(base: Path, folder: Path) -> None:
    """verl's merger loses the task and the scale."""
    adapter(base, folder)
    change_json(folder, "adapter_config.json", lambda config: config.update(task_type=None, lora_alpha=0))


def compiled_adapter(base: Path, folder: Path) -> None:
    tensors = adapter(base, folder)
    prefix = "base_model.model."
    store(folder, {n.replace(prefix, f"{prefix}_orig_mod.", 1): t for n, t in tensors.items()})


def wide_adapter(base: Path, folder: Path) -> None:
    adapter(base, folder, r=64)


def mlx_adapter(base: Path, folder: Path) -> None:
    """An adapter of mlx-lm: other keys, another file, matrices the other way round."""
    tensors = adapter(base, folder)
    shutil.rmtree(folder)
    folder.mkdir()
    settings = {
        "fine_tune_type": "lora",
        "num_layers": 2,
        "lora_parameters": {"rank": 4, "scale": 2.0, "dropout": 0.0},
    }
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "model": str(base)}))
    renamed = {
        name.removeprefix("base_model.model.").replace("lora_A.weight", "lora_a").replace("lora_B.weight", "lora_b"):
        tensor.T.clone().contiguous() for name, tensor in tensors.items()
    }  # fmt: skip
    save_file(renamed, folder / "adapters.safetensors")


def ungathered_adapter(base: Path, folder: Path) -> None:
    tensors = adapter(base, folder)
    store(folder, {name: torch.zeros(0) for name in tensors})


def unembedding_adapter(base: Path, folder: Path) -> None:
    """Tinker calls the head `unembed_tokens`; a tied base has none under any name."""
    tensors = adapter(base, folder)
    rows, width = load_file(base / "model.safetensors")["model.embed_tokens.weight"].shape
    prefix = "base_model.model.model.unembed_tokens.lora_"
    store(folder, {**tensors, f"{prefix}A.weight": torch.randn(4, width), f"{prefix}B.weight": torch.randn(rows, 4)})


def text_adapter(base: Path, folder: Path) -> None:
    """An adapter that was trained on the text model alone, for the model with the tower."""
    tensors = adapter(base, folder)
    live = "model.language_model.layers."
    store(folder, {name.replace(live, "model.layers."): tensor for name, tensor in tensors.items()})


def value_head(weights: Tensors) -> Tensors:
    width = len(weights["model.norm.weight"])
    return {**weights, "v_head.summary.weight": torch.randn(1, width), "v_head.summary.bias": torch.zeros(1)}


REPORTS = {
    "tokenizer that cuts": Report("vllm-project/llm-compressor/pull/2917", "qwen", cut_by_the_tokenizer),
    "adapter without task and scale": Report(
        "verl-project/verl/issues/5488", "llama", merged_adapter_config, is_adapter=True
    ),
    "value head": Report("hiyouga/LlamaFactory/issues/8635", "llama", reweighted(value_head)),
    "limit of the rollouts": Report(
        "vllm-project/vllm/pull/34063", "qwen", edited("generation_config.json", max_new_tokens=4)
    ),
    "text-only processor": Report("unslothai/unsloth/issues/4671", "qwen", text_only_processor),
    "text-only template": Report("hiyouga/LlamaFactory/issues/8356", "qwen", text_only_template),
    "template in the tokenizer": Report("QwenLM/Qwen3-VL/issues/1488", "qwen", template_in_the_tokenizer),
    "tower dropped by the merge": Report("modelscope/ms-swift/issues/9187", "qwen", reweighted(without_tower)),
    "stacked experts": Report("vllm-project/vllm/pull/42577", "moe", reweighted(stacked_experts)),
    "part alone": Report("hiyouga/LlamaFactory/issues/10345", "qwen", reweighted(part_alone)),
    "compiled adapter": Report("MakazhanAlpamys/Soup/issues/351", "llama", compiled_adapter, is_adapter=True),
    "wide adapter": Report("gpustack/gpustack/issues/5438", "llama", wide_adapter, is_adapter=True),
    "padded rows": Report("NVIDIA-NeMo/Megatron-Bridge/pull/5375", "qwen", reweighted(padded_rows)),
    "theta in rope_scaling": Report("sgl-project/sglang/pull/14772", "llama", theta_in_scaling),
    "headless class": Report("sgl-project/sglang/pull/17597", "llama", headless),
    "no architectures": Report(
        "vllm-project/vllm/issues/14105", "llama", edited("config.json", architectures=...)
    ),
    "adapter on an unembedding": Report(
        "thinking-machines-lab/tinker-cookbook/pull/593", "qwen", unembedding_adapter, is_adapter=True
    ),
    "MLX adapter": Report("ml-explore/mlx-lm/issues/1119", "llama", mlx_adapter, is_adapter=True),
    "ungathered adapter": Report("OpenRLHF/OpenRLHF/issues/651", "llama", ungathered_adapter, is_adapter=True),
    "replaced end": Report("hiyouga/LlamaFactory/pull/10834", "llama", other_end),
    "text adapter": Report("vllm-project/vllm/issues/48019", "qwen", text_adapter, is_adapter=True),
}  # fmt: skip


def build_report(name: str, base: Path, folder: Path) -> Path:
    """Build a report's folder of the base that it names."""
    report = REPORTS[name]
    if report.is_adapter:
        folder.mkdir()
    else:
        shutil.copytree(base, folder)
    report.build(base, folder)
    return folder
