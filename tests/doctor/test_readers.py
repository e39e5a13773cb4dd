"""Whom a finding concerns: in words, in the order of findings, in the verdict for one reader."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from grpo_toolkit.cli import main
from grpo_toolkit.doctor.diagnose import ALL_RULES, diagnose_checkpoint, diagnose_folder
from grpo_toolkit.doctor.installed_configs import installed_knows
from grpo_toolkit.doctor.parse import read_folder
from grpo_toolkit.doctor.readers import (
    ALL,
    SERVERS,
    TRAINER,
    V4,
    Reader,
    concerns,
    in_words,
    installed_version,
    parse_reader,
    without,
)
from grpo_toolkit.errors import InputError
from tests.support.faulty import unpack
from tests.support.memory_files import folder_of

if TYPE_CHECKING:
    from pathlib import Path

OLD = Reader("transformers", (4, 49), (4, 49))
NEW = Reader("transformers", (5, 24, 0), (5, 24, 0))


@pytest.mark.parametrize(
    ("fails", "reader", "expected"),
    [
        (ALL, NEW, True),
        (V4, OLD, True),
        (V4, NEW, False),
        (V4, Reader("vllm", (0, 31), (5, 17)), False),
        (V4, Reader("vllm", (0, 9), (4, 57)), True),
        (V4, Reader("vllm"), True),  # nothing is known about what it runs on
        (SERVERS, NEW, False),
        (SERVERS, Reader("sglang"), True),
        (TRAINER, NEW, False),
        ("transformers<4.52", Reader("transformers", (4, 52, 1)), False),
        ("transformers<4.52", Reader("transformers", (4, 51, 3)), True),
        ("transformers>=4.50<5", OLD, False),
        ("transformers>=4.50<5", Reader("transformers", (4, 57, 6)), True),
    ],
)
def test_who_is_concerned(fails: str, reader: Reader, expected: bool) -> None:
    assert concerns(fails, reader) is expected


def test_one_reader_less() -> None:
    assert without(ALL, "vllm") == "transformers; sglang"
    assert without("vllm@<5; sglang@<5", "vllm") == "sglang@<5"
    assert without("vllm<0.10", "vllm") == "vllm<0.10"


def test_the_words() -> None:
    assert in_words(ALL, NEW) == "every reader"
    assert in_words(V4) == "transformers before 5, vLLM and SGLang on transformers before 5"
    assert in_words("transformers>=4.50<5", NEW).endswith(
        "since 4.50 and before 5; fine in the installed transformers 5.24.0"
    )
    assert in_words("transformers", NEW) == "transformers"


def test_every_rule_names_readers_that_exist() -> None:
    assert all(in_words(rule.fails) for rule in ALL_RULES)


def test_a_reader_by_name() -> None:
    assert parse_reader("transformers==4.49") == Reader("transformers", (4, 49), (4, 49))
    assert parse_reader("vLLM").name == "vllm"
    for text in ("tgi", "transformers==.", "transformers==x", "transformers<5", "trainer"):
        with pytest.raises(InputError, match="--for"):
            parse_reader(text)


def test_the_installed_version_is_that_of_the_library() -> None:
    import transformers

    assert ".".join(map(str, installed_version("transformers"))) in transformers.__version__
    assert installed_version("no-such-library") == ()


def test_what_is_wrong_on_the_installed_stack_comes_first() -> None:
    folder = read_folder(
        folder_of(
            {
                "config.json": {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
                "generation_config.json": {"use_cache": False, "eos_token_id": 1},
                "tokenizer_config.json": {"extra_special_tokens": ["<a>"]},
                "tokenizer.json": {"added_tokens": [], "model": {"vocab": {}}},
            },
            {},
        )
    )
    codes = [finding.code for finding in diagnose_folder(folder, installed=NEW).findings]
    assert codes == ["generation-cache-off", "extra-special-tokens-list"]
    codes = [finding.code for finding in diagnose_folder(folder, installed=OLD).findings]
    assert codes == ["extra-special-tokens-list", "generation-cache-off"]


def test_the_exit_code_follows_the_reader(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = unpack("vlm_r1_451", tmp_path / "x")  # its cache is off, which only transformers reads
    assert main(["doctor", str(folder)]) == 1
    assert main(["doctor", str(folder), "--for", "transformers==4.49"]) == 1
    capsys.readouterr()
    assert main(["doctor", str(folder), "--for", "sglang"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == f"{folder}: clean (1 note) for SGLang"
    assert main(["doctor", str(folder), "--for", "tgi"]) == 2
    said = diagnose_checkpoint(folder, reader="vllm").to_json()
    assert said["clean"] is True
    assert said["reader"] == "vLLM"
    assert {(f["code"], f["concerns"]) for f in said["findings"]} >= {("generation-cache-off", False)}


def test_a_model_type_is_asked_of_the_library_that_is_installed(tmp_path: Path) -> None:
    from transformers import CONFIG_MAPPING

    for name in ("llama", "qwen2_5_vl", "gpt2", "no_such_model", "qwen2_5_v"):
        assert installed_knows(name) is (name in CONFIG_MAPPING), name
    folder = unpack("base", tmp_path / "x")
    text = (folder / "config.json").read_text(encoding="utf-8")
    (folder / "config.json").write_text(text.replace('"qwen2_5_vl"', '"qwen9_vl"'))
    found = diagnose_checkpoint(folder).findings[0]
    assert (found.code, found.key, found.found) == ("model-type-unknown", "model_type", "qwen9_vl")
    assert not found.concerns(parse_reader("transformers==4.1"))  # nothing is known about others
