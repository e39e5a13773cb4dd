"""Write the faulty checkpoints that real stacks write, for the doctor's tests.

    python -m scripts.models.faulty_checkpoints base --base /tmp/base
    python -m scripts.models.faulty_checkpoints vlm_r1_449 --base /tmp/base --out tests/data
    python -m scripts.models.faulty_checkpoints exports --base /tmp/base

Each route is run in the environment of its day (its name ends with the transformers version, which is checked), on the
tiny Qwen2.5-VL of the tests in published form. What lands under `tests/data/<route>` is the folder as that stack wrote
it, with two things cut: a safetensors file keeps its header alone (the tests pad it with zeros to its full length),
and tokenizers lose their vocabulary. `tests/data/README.md` says how each was made.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import struct
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parents[2]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "disabled")

BASE_NAME = "tiny/Qwen2.5-VL"
ROUTES: dict[str, Callable[[Path, Path], Path]] = {}
# The optimizer and the random state are megabytes of tensors; their names are enough to know a trainer checkpoint.
EMPTIED = ("*.pt", "*.pth", "*.bin", "*.distcp", ".metadata", "merges.txt")


def route(*versions: str) -> Callable[[Callable[[Path, Path], Path]], Callable[[Path, Path], Path]]:
    """Register a function `(base, work folder) -> checkpoint folder` under `<its name>_<version>`."""

    def register(function: Callable[[Path, Path], Path]) -> Callable[[Path, Path], Path]:
        for version in versions:
            ROUTES[f"{function.__name__}_{version}"] = function
        return function

    return register


@route("449", "451")
def vlm_r1(base: Path, work: Path) -> Path:
    """VLM-R1, R1-V: `from_pretrained(..., use_cache=False)` because gradient checkpointing is on."""
    return train(load(base, use_cache=False), base, work)


@route("449")
def visual_rft(base: Path, work: Path) -> Path:
    """Visual-RFT: `use_cache=None` passed the same way, which saves as null."""
    return train(load(base, use_cache=None), base, work)


@route("455")
def config_flag(base: Path, work: Path) -> Path:
    """TRL of that day: `model.config.use_cache = False` after loading (4.55 refuses the argument, as 5.x does)."""
    model = load(base)
    model.config.use_cache = False
    return train(model, base, work)


@route("457")
def open_r1(base: Path, work: Path) -> Path:
    """open-r1, VLM-R1's SFT: `use_cache=False` at load, `config.use_cache = True` before the last save."""
    model = load(base, use_cache=False)
    train(model, base, work)
    model.config.use_cache = True
    model.save_pretrained(work / "final")
    return work / "final"


@route("451")
def easyr1_merger(base: Path, work: Path) -> Path:
    """EasyR1's model_merger: an empty model from the actor's config, saved with the gathered weights."""
    import torch
    from transformers import AutoConfig, AutoModelForVision2Seq

    config = AutoConfig.from_pretrained(base, use_cache=False)
    weights = load(base).state_dict()
    with torch.device("meta"):
        model = AutoModelForVision2Seq.from_config(config, torch_dtype=torch.bfloat16)
    model.to_empty(device="cpu")
    model.save_pretrained(work / "huggingface", state_dict=weights)
    return work / "huggingface"


@route("523", "457")
def trl_grpo(base: Path, work: Path) -> Path:
    """TRL's GRPOTrainer on a model given by name, full fine-tune."""
    from scripts.models.tiny_training import grpo_trainer

    grpo_trainer(base, work, max_steps=1, save_strategy="steps", save_steps=1).train()
    return work / "checkpoint-1"


@route("523")
def trl_lora(base: Path, work: Path) -> Path:
    """TRL's GRPOTrainer with a LoRA adapter on the usual seven names, which the vision tower has too."""
    from peft import LoraConfig

    from scripts.models.tiny_training import grpo_trainer

    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    grpo_trainer(
        base, work, max_steps=1, save_strategy="steps", save_steps=1, peft_config=LoraConfig(r=2, target_modules=names)
    ).train()
    return work / "checkpoint-1"


@route("455")
def trl_llama(base: Path, work: Path) -> Path:
    """TRL 0.21's GRPOTrainer on a text-only Llama."""
    from trl import GRPOConfig, GRPOTrainer

    from scripts.models.tiny_bases import build_llama
    from scripts.models.tiny_training import length_reward, rows

    args = GRPOConfig(
        output_dir=str(work),
        max_steps=1,
        save_steps=1,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=4,
        gradient_checkpointing=True,
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
    )
    GRPOTrainer(
        model=str(build_llama(work / "base")),
        args=args,
        reward_funcs=length_reward,
        train_dataset=rows(with_images=False),
    ).train()
    return work / "checkpoint-1"


@route("523")
def llava(base: Path, work: Path) -> Path:
    """The tests' tiny LLaVA, built and saved by transformers 5: nobody's fault, and 4.x cannot read it."""
    from scripts.models.tiny_bases import build_llava

    return build_llava(work / "llava")


@route("457")
def peft_prefixes(base: Path, work: Path) -> Path:
    """A PEFT model's state dict saved as if it were the model's."""
    from peft import LoraConfig, get_peft_model

    model = load(base)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    model.save_pretrained(work / "final", state_dict=adapted.state_dict(), safe_serialization=True)
    copy_processor(base, work / "final")
    return work / "final"


@route("523")
def compiled(base: Path, work: Path) -> Path:
    """A compiled model's state dict saved beside its config."""
    import torch
    from safetensors.torch import save_model

    model = load(base)
    model.config.save_pretrained(work)
    model.generation_config.save_pretrained(work)
    save_model(torch.compile(model), str(work / "model.safetensors"), metadata={"format": "pt"})
    copy_processor(base, work)
    return work


@route("523")
def fsdp_full(base: Path, work: Path) -> Path:
    """FSDP2, FULL_STATE_DICT, two processes (gloo)."""
    return fsdp(base, work, "FULL_STATE_DICT")


@route("523")
def fsdp_sharded(base: Path, work: Path) -> Path:
    """FSDP2, SHARDED_STATE_DICT, two processes (gloo)."""
    return fsdp(base, work, "SHARDED_STATE_DICT")


@route("523")
def zero3(base: Path, work: Path) -> Path:
    """DeepSpeed ZeRO-3 with 16-bit gathering, two processes."""
    return deepspeed(base, work, gather=True)


@route("523")
def zero3_ungathered(base: Path, work: Path) -> Path:
    """DeepSpeed ZeRO-3 without 16-bit gathering, two processes."""
    return deepspeed(base, work, gather=False)


def fsdp(base: Path, work: Path, state_dict_type: str) -> Path:
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        state_dict_type=state_dict_type,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Qwen2_5_VLDecoderLayer"],
        cpu_ram_efficient_loading=False,
    )
    # accelerate promotes only GPU-like types to FSDP; on CPUs every new state has to be told.
    plain = AcceleratorState.__init__

    def promoted(self: Any, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        self.fsdp_plugin = plugin

    AcceleratorState.__init__ = promoted
    return train(load(base), base, work, expect="FSDP")


def deepspeed(base: Path, work: Path, *, gather: bool) -> Path:
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": gather},
        "zero_force_ds_cpu_optimizer": False,
    }
    return train(base, base, work, expect="DEEPSPEED", deepspeed=config)


def load(base: Path, **options: Any) -> Any:
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    return Qwen2_5_VLForConditionalGeneration.from_pretrained(base, torch_dtype=torch.bfloat16, **options)


def train(model: Any, base: Path, work: Path, *, expect: str = "NO", **options: Any) -> Path:
    """Train one step of a plain Trainer on text, gradient checkpointing on, and return its checkpoint."""
    import torch
    from transformers import AutoProcessor, Trainer, TrainingArguments

    processor = AutoProcessor.from_pretrained(base)
    tokens = processor.tokenizer("What is this?", return_tensors="pt").input_ids[0]
    args = TrainingArguments(
        output_dir=str(work),
        max_steps=1,
        save_steps=1,
        per_device_train_batch_size=1,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        bf16=expect == "DEEPSPEED",
        **options,
    )
    # After the arguments: DeepSpeed's must stand before a model is loaded, or its weights are not sharded.
    model = load(model) if isinstance(model, Path) else model
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=[{"input_ids": tokens, "labels": tokens}] * 4,
        data_collator=lambda rows: {key: torch.stack([row[key] for row in rows]) for key in rows[0]},
        processing_class=processor,
    )
    assert trainer.accelerator.distributed_type.name in (expect, expect.replace("NO", "MULTI_CPU")), (
        trainer.accelerator.distributed_type
    )
    trainer.train()
    return work / "checkpoint-1"


def copy_processor(base: Path, folder: Path) -> None:
    from transformers import AutoProcessor

    AutoProcessor.from_pretrained(base).save_pretrained(folder)


def make_exports(work: Path) -> dict[str, Path]:
    """Export under transformers 5: of a published base, and of one that transformers 5 wrote."""
    from grpo_toolkit import export_model
    from grpo_toolkit.model.load import load_model
    from scripts.models.tiny_bases import build_qwen2_5_vl

    published = build_qwen2_5_vl(work / "published")
    model, processor, _ = load_model(published)
    model.save_pretrained(work / "saved")
    processor.save_pretrained(work / "saved")
    exports = {}
    for name, base in (("of_published_base", published), ("of_v5_base", work / "saved")):
        folder = export_model(base, work / name, verify=False).path
        (folder / "grpo_toolkit.json").unlink()
        exports[name] = folder
    return exports


def cut(folder: Path, target: Path, base: Path) -> None:
    """Keep a checkpoint's JSON, headers and file names; drop its weights and vocabularies."""
    shutil.rmtree(target, ignore_errors=True)
    for path in sorted(folder.rglob("*")):
        copy = target / path.relative_to(folder)
        if path.is_dir():
            continue
        copy.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            copy.write_bytes(header_of(path))
        elif any(path.match(pattern) for pattern in EMPTIED):
            copy.write_bytes(b"")
        elif path.name == "vocab.json":
            copy.write_text("{}\n")
        elif path.name == "tokenizer.json":
            content = json.loads(path.read_text(encoding="utf-8"))
            content["model"] |= {"vocab": {}, "merges": []}
            copy.write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")
        elif path.name in ("config.json", "adapter_config.json", "README.md", "trainer_state.json"):
            # Where it was made is nobody's business; the base gets the name that such a folder would really have.
            text = path.read_text(encoding="utf-8").replace(str(base), BASE_NAME).replace(str(folder.parent), "out")
            copy.write_text(text, encoding="utf-8")
        elif path.suffix == ".py":
            copy.write_text("# emptied\n")
        else:
            copy.write_bytes(path.read_bytes())


def header_of(path: Path) -> bytes:
    with path.open("rb") as file:
        length = file.read(8)
        return length + file.read(struct.unpack("<Q", length)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("route", choices=["base", "exports", *ROUTES])
    parser.add_argument("--base", type=Path, required=True, help="where the tiny base is (`base`: where to build it)")
    parser.add_argument("--out", type=Path, default=ROOT / "tests" / "data")
    arguments = parser.parse_args()
    if arguments.route == "base":
        from scripts.models.tiny_bases import build_qwen2_5_vl

        if not arguments.base.exists():
            build_qwen2_5_vl(arguments.base, dtype="bfloat16")
        cut(arguments.base, arguments.out / "base", arguments.base)
        return
    if arguments.route == "exports":
        with tempfile.TemporaryDirectory() as work:
            for name, folder in make_exports(Path(work)).items():
                cut(folder, arguments.out / "exports" / name, folder)
        return
    import transformers

    version = "".join(transformers.__version__.split(".")[:2])
    if not arguments.route.endswith(version):
        parser.error(f"{arguments.route} is for transformers {arguments.route[-3:]}, this is {version}")
    # The same folder for every rank of one launch.
    work = Path(tempfile.gettempdir(), f"faulty-{arguments.route}")
    if int(os.environ.get("RANK", 0)) == 0:
        shutil.rmtree(work, ignore_errors=True)
    folder = ROUTES[arguments.route](arguments.base, work)
    if int(os.environ.get("RANK", 0)) == 0:
        cut(folder, arguments.out / arguments.route, arguments.base)
        print(arguments.out / arguments.route)


if __name__ == "__main__":
    main()
