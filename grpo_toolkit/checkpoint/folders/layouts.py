"""The layouts in which trainers leave weights that no reader of models finds, as rows of data.

Each is known by the names in its folder, and named with the command that its own makers have for turning it into a
model folder. A new layout is a row and a test.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from grpo_toolkit.checkpoint.file_names import Kind

if TYPE_CHECKING:
    from collections.abc import Collection


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A layout of shards, and how it becomes a model.

    Attributes:
        name: what it is, as the field calls it.
        kind: what its folder counts as.
        holds: patterns, each of which the whole name of some entry of the folder fits.
        near: patterns of names of which one is in the folder or in the one above; empty where none is needed.
        named: a pattern that the folder's own name fits; empty where any name does.
        convert: the command of its makers. `{folder}` is the folder of the shards, `{parent}` the one above.
        source: where the command is written down.
        is_read: `export` reads these shards itself.
    """

    name: str
    kind: Kind = Kind.FOREIGN
    holds: tuple[str, ...]
    near: tuple[str, ...] = ()
    named: str = ""
    convert: str
    source: str
    is_read: bool = False

    def fits(self, name: str, entries: Collection[str], above: Collection[str]) -> bool:
        """Return whether a folder of this name, with these entries and those beside it, has this layout."""
        return (
            all(_any(pattern, entries) for pattern in self.holds)
            and (not self.near or any(_any(pattern, (*entries, *above)) for pattern in self.near))
            and (not self.named or re.fullmatch(self.named, name) is not None)
        )


def _any(pattern: str, names: Collection[str]) -> bool:
    fits = re.compile(pattern).fullmatch
    return any(fits(name) for name in names)


VERL_SHARD: Final = r"model_world_size_([0-9]{1,5})_rank_([0-9]{1,5})\.pt"
_DISTCP: Final = r".*\.distcp"
_ZERO_STATES: Final = r"(bf16_|fp16_)?(zero_pp_rank_[0-9]+_)?mp_rank_[0-9]+_(model|optim)_states\.pt"

VERL: Final = Layout(
    name="FSDP shards of verl's family (verl, EasyR1, SkyRL, rLLM)",
    holds=(VERL_SHARD,),
    convert="grpo-toolkit export {folder} OUT, or verl's own merger: python -m verl.model_merger merge --backend fsdp "
    "--local_dir {folder} --target_dir OUT",
    source="https://verl.readthedocs.io/en/latest/advance/checkpoint.html",
    is_read=True,
)
_DEEPSPEED: Final = "python -m deepspeed.utils.zero_to_fp32 {} OUT (it opens pickles: only of a folder that you trust)"
_MEGATRON: Final = "https://docs.nvidia.com/nemo/megatron-bridge/latest/bridge-guide.html"

LAYOUTS: Final = (
    VERL,
    Layout(
        name="Megatron shards of verl",
        holds=("dist_ckpt",),
        near=("huggingface", r"transformer_config\.json", r"latest_checkpointed_iteration\.txt"),
        convert="python -m verl.model_merger merge --backend megatron --local_dir {folder} --target_dir OUT",
        source="https://verl.readthedocs.io/en/latest/advance/checkpoint.html",
    ),
    Layout(
        name="NeMo checkpoint",
        holds=("context", "weights"),
        convert="""python -c "from nemo.collections import llm; llm.export_ckpt(path='{folder}', target='hf', """
        """output_path='OUT')\"""",
        source="https://docs.nvidia.com/nemo-framework/user-guide/latest/nemo-2.0/features/hf-integration.html",
    ),
    Layout(
        name="NeMo archive",
        holds=(r".*\.nemo",),
        convert="NeMo's scripts/checkpoint_converters/convert_*_nemo_to_hf.py for the model's family",
        source="https://docs.nvidia.com/nemo-framework/user-guide/latest/nemotoolkit/checkpoints/intro.html",
    ),
    Layout(
        name="torch.distributed checkpoint of NeMo-RL",
        holds=("policy", r"(training_info\.json|config\.yaml)"),
        near=(r"training_info\.json",),
        convert="uv run examples/converters/convert_dcp_to_hf.py --config={folder}/config.yaml "
        "--dcp-ckpt-path={folder}/policy/weights --hf-ckpt-path=OUT (in NeMo-RL)",
        source="https://docs.nvidia.com/nemo/rl/latest/design-docs/checkpointing.html",
    ),
    Layout(
        name="Megatron-core checkpoint of ms-swift",
        holds=(_DISTCP, r"(common\.pt|metadata\.json)"),
        near=(r"args\.json",),
        convert="swift export --mcore_model {parent} --to_hf true --output_dir OUT",
        source="https://swift.readthedocs.io/en/latest/Megatron-SWIFT/Quick-start.html",
    ),
    Layout(
        name="Megatron-core checkpoint",
        holds=(_DISTCP, r"(common\.pt|metadata\.json)"),
        convert="the converter of the trainer that wrote it, such as Megatron-Bridge's: "
        "AutoBridge.from_hf_pretrained(BASE).export_ckpt({folder}, OUT)",
        source=_MEGATRON,
    ),
    Layout(
        name="Megatron checkpoint, one file a rank",
        holds=(r"mp_rank_[0-9]{2}(_[0-9]{3}){0,2}",),
        convert="the converter of the trainer that wrote it (Megatron-LM: tools/checkpoint/convert.py; ms-swift: "
        "swift export --mcore_model {parent} --to_hf true --output_dir OUT)",
        source="https://github.com/NVIDIA/Megatron-LM/blob/main/tools/checkpoint/convert.py",
    ),
    Layout(
        name="FSDP shards (accelerate)",
        kind=Kind.FSDP,
        holds=(r"pytorch_model_fsdp_[0-9]+",),
        convert="grpo-toolkit export {folder} OUT --base BASE; or accelerate merge-weights "
        "{folder}/pytorch_model_fsdp_0 OUT, then add the base's config and tokenizer",
        source="https://huggingface.co/docs/accelerate/usage_guides/fsdp",
        is_read=True,
    ),
    Layout(
        name="FSDP shards (accelerate)",
        kind=Kind.FSDP,
        holds=(_DISTCP,),
        named=r"pytorch_model_fsdp_[0-9]+",
        convert="grpo-toolkit export {folder} OUT --base BASE; or accelerate merge-weights {folder} OUT, then add the "
        "base's config and tokenizer",
        source="https://huggingface.co/docs/accelerate/usage_guides/fsdp",
        is_read=True,
    ),
    Layout(
        name="FSDP state dict in one file (accelerate)",
        kind=Kind.FSDP,
        holds=(r"pytorch_model_fsdp\.bin",),
        convert="load it with torch.load(..., weights_only=True) into the base's class, then save_pretrained",
        source="https://huggingface.co/docs/accelerate/usage_guides/fsdp",
    ),
    Layout(
        name="torch.distributed checkpoint of torchtitan",
        holds=(_DISTCP,),
        named=r"step-[0-9]+",
        convert="python scripts/checkpoint_conversion/convert_to_hf.py {folder} OUT --model_name NAME --model_flavor "
        "FLAVOR (in torchtitan)",
        source="https://github.com/pytorch/torchtitan/blob/main/docs/checkpoint.md",
    ),
    Layout(
        name="torch.distributed checkpoint (DCP)",
        kind=Kind.FSDP,
        holds=(_DISTCP,),
        convert="python -m torch.distributed.checkpoint.format_utils dcp_to_torch {folder} OUT.pt, then load that "
        "into the base's class and save_pretrained; or the converter of the trainer that wrote it",
        source="https://docs.pytorch.org/docs/stable/distributed.checkpoint.html",
    ),
    Layout(
        name="DeepSpeed universal checkpoint",
        kind=Kind.DEEPSPEED,
        holds=("zero", _ZERO_STATES),
        convert="from the ZeRO checkpoint that it was made of: " + _DEEPSPEED.format("ZERO_FOLDER"),
        source="https://www.deepspeed.ai/tutorials/universal-checkpointing/",
    ),
    Layout(
        name="DeepSpeed ZeRO shards",
        kind=Kind.DEEPSPEED,
        holds=(_ZERO_STATES,),
        convert=_DEEPSPEED.format("{parent}"),
        source="https://github.com/huggingface/transformers/issues/20082",
    ),
    Layout(
        name="DeepSpeed ZeRO shards",
        kind=Kind.DEEPSPEED,
        holds=(r"(zero_to_fp32\.py|global_step[0-9]+)",),
        convert=_DEEPSPEED.format("{folder}"),
        source="https://github.com/huggingface/transformers/issues/20082",
    ),
)
"""Every layout; the first that fits counts."""


def layout_of(name: str, entries: Collection[str], above: Collection[str] = ()) -> Layout | None:
    """Return the layout of a folder's shards, or None.

    Args:
        name: the folder's own.
        entries: the names in it.
        above: the names beside it.
    """
    return next((layout for layout in LAYOUTS if layout.fits(name, entries, above)), None)
