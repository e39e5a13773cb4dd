"""Tied embeddings: the head missing, stored twice, or stored alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from grpo_toolkit.checkpoint.folders.model_folder import CONFIG
from grpo_toolkit.checkpoint.tensor_names import find_suffix, without_wrappers
from grpo_toolkit.checkpoint.tied_embeddings import TIE
from grpo_toolkit.doctor.findings import Edit, Fault, Severity, rule
from grpo_toolkit.doctor.installed_configs import installed_defaults
from grpo_toolkit.doctor.rules.tensors.tensor_facts import (
    EMBEDDING,
    HEAD,
    base_tensors,
    ends,
    has_lora,
    lone_head,
    read_tie_flags,
    weights,
)
from grpo_toolkit.doctor.tensor_changes import TensorChanges

if TYPE_CHECKING:
    from collections.abc import Iterator

    from grpo_toolkit.doctor.parsed_folder import Folder


@rule(
    Severity.WRONG,
    "no output head, and not tied",
    effect="the head is missing and the config does not tie it to the embedding where the reader looks: a random "
    "head, with a warning only",
    evidence="https://github.com/huggingface/transformers/pull/43429",
    mend="tie_word_embeddings true",
)
def head_missing(folder: Folder) -> Iterator[Fault]:
    if not folder.is_generative or ends(folder)[1] is None or ends(folder)[0]:
        return
    if has_lora(folder):
        return
    flags = read_tie_flags(folder)
    untied = [place for place, value in flags.items() if value is not True]
    if not flags and folder.family is not None and not folder.family.is_tied:
        untied = [()]
    if untied:
        key = (*untied[0], "tie_word_embeddings")
        yield Fault(
            file=CONFIG,
            key=".".join(key),
            found=folder.get(CONFIG, *key),
            expected="true, since no lm_head is stored",
            remedies=tuple(Edit(file=CONFIG, path=(*place, "tie_word_embeddings"), value=True) for place in untied),
        )


@rule(
    Severity.WRONG,
    "a tied matrix stored under the head's name",
    effect="the embedding is missing: libraries that look for it there start from random weights",
    evidence="https://huggingface.co/docs/safetensors/torch_shared_tensors",
    mend="renamed to the embedding (--rewrite-weights)",
    needs_base=True,
)
def embedding_under_head(folder: Folder) -> Iterator[Fault]:
    head, base = lone_head(folder), base_tensors(folder)
    embedding = find_suffix(base, EMBEDDING)
    if head and embedding and find_suffix(base, HEAD) is None and without_wrappers(head) == head:
        yield Fault(
            file=folder.tensors[head].file,
            key=head,
            found="the only copy of the embedding",
            expected=embedding,
            remedies=(TensorChanges(renames={head: embedding}),),
        )


@rule(
    Severity.WASTEFUL,
    "a tied head stored a second time",
    effect="the embedding lies in the folder twice; if the copies ever differ, 4.57 ignores the head and 5.x uses it",
    evidence="https://github.com/vllm-project/vllm/pull/6758",
    mend="the copy dropped, if it is one (--rewrite-weights)",
)
def head_doubled(folder: Folder) -> Iterator[Fault]:
    ours = weights(folder)
    head, embedding = ends(folder)
    flags = read_tie_flags(folder)
    if not head or not embedding or not flags or not all(value is True for value in flags.values()):
        return
    base = base_tensors(folder)
    if base and find_suffix(base, HEAD):
        return  # published that way
    if folder.digests is not None and folder.digests.heads_differ:
        return  # `head_differs`
    same = ours[head].shape == ours[embedding].shape and ours[head].dtype == ours[embedding].dtype
    yield Fault(
        file=ours[head].file,
        key=head,
        found=f"{ours[head].nbytes / 1e6:,.1f} MB beside {embedding}",
        expected="absent, since tie_word_embeddings is true",
        remedies=(TensorChanges(renames={head: None}),) if same else (),
    )


@rule(
    Severity.WRONG,
    "a tied head that differs from its embedding",
    effect="4.x and servers tie the ends and lose the stored head, 5.x and vLLM 0.31 use it: one folder, two models "
    "(found with --deep)",
    evidence="https://github.com/vllm-project/vllm/pull/51665",
    fails="transformers<5; vllm<0.31; sglang",
)
def head_differs(folder: Folder) -> Iterator[Fault]:
    ours = weights(folder)
    head, embedding = ends(folder)
    if head and embedding and folder.digests is not None and folder.digests.heads_differ and _ties_in_v4(folder):
        yield Fault(
            file=ours[head].file,
            key=head,
            found=f"other bytes than {embedding}",
            expected=f"the same, or tie_word_embeddings false in {CONFIG}; only you know which of the two was trained",
        )


def _ties_in_v4(folder: Folder) -> bool:
    """Return whether 4.x and servers tie the ends: the text model's own config says so, or its class."""
    text = folder.get(CONFIG, "text_config")
    if not isinstance(text, dict) or folder.family is None:
        return any(value is True for value in read_tie_flags(folder).values())
    return bool(text.get(TIE, True in installed_defaults(str(text.get("model_type")), (), TIE)))
