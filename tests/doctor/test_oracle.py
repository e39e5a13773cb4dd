"""A sample of the oracle's mutations: the doctor against what the installed reader does with the mutated folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from scripts.benchmarks.doctor_oracle import Mutation, judge, score
from scripts.models.tiny_bases import build_llama

if TYPE_CHECKING:
    from pathlib import Path

ILL = (
    Mutation("drop file", "config.json"),
    Mutation("drop file", "model.safetensors"),
    Mutation("empty file", "tokenizer.json"),
    Mutation("drop key", "config.json", ("hidden_size",)),
    Mutation("drop key", "config.json", ("model_type",)),
    Mutation("drop key", "generation_config.json", ("eos_token_id",)),
    Mutation("drop key", "generation_config.json", ("do_sample",)),
)
WELL = (
    Mutation("drop key", "config.json", ("initializer_range",)),
    Mutation("drop key", "config.json", ("transformers_version",)),
    Mutation("drop key", "config.json", ("attention_dropout",)),
    Mutation("drop key", "generation_config.json", ("transformers_version",)),
)


def test_the_doctor_and_the_reader_agree(tmp_path: Path) -> None:
    rows = judge(build_llama(tmp_path / "base"), [*ILL, *WELL])
    assert {row["mutation"] for row in rows if row["reader"] != "same"} == set(map(str, ILL))
    scored = score(rows)
    assert (scored["recall"], scored["false_alarms"]) == (1.0, 0.0), scored
