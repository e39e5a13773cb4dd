"""The fastest setting that says the same, what may stand in files, and gates."""

from __future__ import annotations

import argparse
import json
import re
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from grpo_toolkit import LatencyCallback
from grpo_toolkit.cli import main
from grpo_toolkit.cli.bench import report_missed
from grpo_toolkit.errors import GateError, InputError
from grpo_toolkit.export.export import export_model
from grpo_toolkit.latency.bench.gate import Missed, gate_of, missed_by
from grpo_toolkit.latency.engines.pool import Engines, Source
from grpo_toolkit.latency.engines.protocol import Options
from grpo_toolkit.latency.rows.row import LatencyRow, Proof, Ratio, Settings, Workload
from grpo_toolkit.latency.rows.store import read_rows
from grpo_toolkit.latency.tune.tune import _ahead, _Bench, tune_latency
from grpo_toolkit.latency.tune.tuning import Trial, Tuning, keys_for_files
from grpo_toolkit.model.generation.request import Request
from grpo_toolkit.reporting.terminal.console import say, show
from scripts.benchmarks.seeded_causes import FILES
from tests.support.models import build_llama
from tests.support.training import grpo_trainer

if TYPE_CHECKING:
    from pathlib import Path

STATIC = Options(
    device="cuda", cache_implementation="static", compiled=True, compile_mode="max-autotune", sdpa_backend="no_cudnn"
)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_llama(tmp_path_factory.mktemp("tuned") / "llama")


@pytest.fixture(scope="module")
def tuning(llama: Path) -> Tuning:
    return tune_latency(
        llama, new_tokens=16, prompt_tokens=96, rounds=6, compile_modes=(), max_memory_bytes=10**12, isolated=False
    )


def test_every_setting_of_a_cpu_is_tried_and_says_the_same(tuning: Tuning) -> None:
    names = [trial.name for trial in tuning.trials]
    assert names[:3] == ["as it is", "static cache", "attention eager"]
    assert names[3:4] != ["SDPA math"] or "SDPA math" not in names[4:]  # not tried where eager attention is the best
    assert {trial.equal_tokens for trial in tuning.trials} == {16}
    assert all(trial.is_eligible for trial in tuning.trials)
    assert tuning.best == max(tuning.trials, key=lambda trial: trial.tokens_per_s or 0.0)
    said = json.loads(json.dumps(tuning.to_json()))
    assert said["speedup"] == tuning.speedup
    assert tuning.batches is not None
    assert [point["size"] for point in said["batches"]["points"]][:2] == [1, 4]


def test_batches_grow_within_the_limits(tuning: Tuning) -> None:
    sizes = [trial.batch_size for trial in tuning.trials if trial.batch_size > 1]
    assert sizes == [2**power for power in range(1, len(sizes) + 1)]
    assert sizes  # how far it pays is up to the clock


@pytest.mark.parametrize("ahead", [False, True])
def test_the_printed_code_runs(tuning: Tuning, llama: Path, ahead: bool) -> None:
    from grpo_toolkit.model.load import load_processor

    inputs = load_processor(llama)("a text", return_tensors="pt")
    scope: dict[str, Any] = {"inputs": inputs}
    options = Options(cache_implementation="static", compiled=False, sdpa_backend="math", ahead=ahead)
    best = replace(tuning.best, options=options)
    exec(replace(tuning, best=best).code(), scope)
    assert scope["model"].config.model_type == "llama"
    assert ("ahead" in scope) is ahead


def tuned(options: Options, **changes: Any) -> Tuning:
    best = Trial(name="static cache, compiled", options=options, batch_size=8, tpot_s=0.004, is_same=True)
    ratio = Ratio(against="default", median=0.125, low=0.1, high=0.2, pairs=6, verdict="faster")
    settings: dict[str, Any] = {
        "path": "out/export", "model_type": "qwen2_5_vl", "dtype": "bfloat16", "new_tokens": 256, "trials": (best,),
        "best": best, "ratio": ratio, "environment": {},
    }  # fmt: skip
    return Tuning(**settings | changes)


def test_a_setting_as_code_as_keys_and_as_serving_commands() -> None:
    found = tuned(STATIC)
    assert found.speedup == 8
    assert found.generation_keys() == {"cache_implementation": "static"}
    assert found.code().splitlines() == [
        "from torch.nn.attention import SDPBackend, sdpa_kernel",
        "from transformers import AutoModelForImageTextToText",
        "from transformers import CompileConfig",
        "",
        'model = AutoModelForImageTextToText.from_pretrained("out/export", dtype="bfloat16", device_map="cuda")',
        'compile_config = CompileConfig(mode="max-autotune")',
        "with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):",
        '    model.generate(**inputs, do_sample=False, cache_implementation="static", compile_config=compile_config)',
    ]
    assert found.serving_commands() == [
        "transformers serve out/export --dtype bfloat16 --compile",
        "vllm serve out/export --dtype bfloat16 --max-num-seqs 8",
    ]


def test_decoding_ahead_is_tried_on_a_gpu_where_a_step_is_compiled_and_is_code_alone() -> None:
    late = replace(STATIC, ahead=True)
    assert _ahead(STATIC) == [("decoding ahead", late)]
    assert _ahead(Options(device="cuda")) == _ahead(replace(STATIC, device="cpu")) == []
    found = tuned(replace(late, compile_mode=None, sdpa_backend=None))
    assert found.code().splitlines()[-3:] == [
        "compile_config = CompileConfig()",
        "ahead = DecodeAhead(model)  # one for all requests: it keeps the cache",
        'ahead.generate(**inputs, do_sample=False, cache_implementation="static", compile_config=compile_config)',
    ]
    keys, left_out = keys_for_files(found, {"model_type": "qwen2_5_vl", "transformers_version": "5.2.0"})
    assert keys == {"cache_implementation": "static"}
    assert left_out == ["decoding ahead is code, and no key of generation_config.json: grpo_toolkit.DecodeAhead"]


def test_packed_vision_is_code_alone() -> None:
    found = tuned(Options(device="cuda", packed_vision=True))
    assert found.code().splitlines()[-2:] == [
        "with inference_ready(model, packed_vision=True):",
        "    model.generate(**inputs, do_sample=False)",
    ]
    ahead = tuned(replace(STATIC, ahead=True, packed_vision=True))
    assert "ahead = DecodeAhead(model, packed_vision=True)  # one for all requests: it keeps the cache" in ahead.code()
    assert "inference_ready" not in ahead.code()
    keys, left_out = keys_for_files(found, {"model_type": "qwen2_5_vl"})
    assert keys == {}
    assert left_out == ["packed vision is code, and no key of generation_config.json: grpo_toolkit.inference_ready"]


def test_every_setting_of_a_vision_model_is_tried_packed(qwen: Path) -> None:
    settings: dict[str, Any] = {"new_tokens": 6, "prompt_tokens": 96, "image_tokens": 16, "rounds": 1}
    found = tune_latency(qwen, packed_vision=True, compile_modes=(), isolated=False, **settings)
    assert {trial.options.packed_vision for trial in found.trials} == {True}
    assert found.trials[0].is_same
    scope: dict[str, Any] = {"inputs": vision_inputs(qwen)}
    exec(replace(found, best=found.trials[0]).code(), scope)  # which one is best is up to the clock
    assert scope["model"].config.model_type == found.model_type
    assert scope["model"].config.vision_config._attn_implementation == "sdpa"  # put back


def vision_inputs(folder: Path) -> Any:
    """A prompt with an image, as the model takes it."""
    from PIL import Image

    from grpo_toolkit.model.load import load_processor

    processor = load_processor(folder)
    content = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    return processor(text=[text], images=[[Image.new("RGB", (112, 112))]], return_tensors="pt")


def test_a_compiled_step_on_a_cpu_is_for_code_alone() -> None:
    found = tuned(replace(STATIC, device="cpu", compile_mode=None, sdpa_backend=None))
    assert found.generation_keys() == {}
    assert found.code().splitlines()[-3:] == [
        "compile_config = CompileConfig()",
        "compile_config._compile_all_devices = True  # generate compiles on accelerators alone",
        'model.generate(**inputs, do_sample=False, cache_implementation="static", compile_config=compile_config)',
    ]


@pytest.mark.parametrize(
    ("config", "keys"),
    [
        ({"model_type": "qwen2_5_vl", "transformers_version": "4.41.2"}, {}),  # 4.49 raises for a static cache
        ({"model_type": "qwen2_5_vl", "transformers_version": "5.2.0"}, {"cache_implementation": "static"}),
        ({"model_type": "llama", "transformers_version": "4.38.0"}, {"cache_implementation": "static"}),
        ({"model_type": "llama"}, {"cache_implementation": "static"}),
        ({"model_type": "brand_new", "transformers_version": "nonsense"}, {}),
    ],
)
def test_files_get_only_what_every_version_that_loads_the_base_can_read(
    config: dict[str, str], keys: dict[str, str]
) -> None:
    found, left_out = keys_for_files(tuned(STATIC), config)
    assert found == keys
    assert [line.partition(" is left out")[0] for line in left_out] == (
        [] if keys else ['cache_implementation="static"']
    )
    assert keys_for_files(tuned(Options()), config) == ({}, [])


@pytest.mark.parametrize(
    ("tokens", "is_same"),
    [([7, 8, 9], True), ([7, 5, 9], True), ([7, 6, 9], False), ([7, 4, 9], False), ([7, 8], False)],
)
def test_other_tokens_count_as_the_same_only_after_a_tie(tokens: list[int], is_same: bool) -> None:
    bench = _Bench(
        pool=Engines(),
        source=Source(path=None),
        request=Request(messages=[]),
        max_tpot_s=None,
        max_memory_bytes=None,
        progress=None,
        expected=[7, 8, 9],
        rivals=[{}, {5: 0.25, 6: 0.5}, {}],
        margin=0.25,
    )
    assert bench._is_same(tokens) is is_same


def test_an_export_with_a_static_cache_is_verified_and_says_so_in_its_files(llama: Path, tmp_path: Path) -> None:
    result = export_model(
        llama,
        tmp_path / "export",
        base=llama,
        generation_overrides={"cache_implementation": "static"},
        notes={"tuned": {"speedup": 8}},
    )
    assert result is not None
    assert result.verification is not None
    assert result.verification.passed
    base = json.loads((llama / "generation_config.json").read_text())
    assert json.loads((tmp_path / "export" / "generation_config.json").read_text()) == {
        **base,
        "cache_implementation": "static",
    }
    assert json.loads((tmp_path / "export" / "grpo_toolkit.json").read_text())["tuned"] == {"speedup": 8}


@pytest.mark.slow
def test_export_tuned_writes_the_keys_that_its_manifest_names(llama: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(llama, source)
    (source / "generation_config.json").write_text('{"use_cache": false}')  # what is tuned is as fast as the export
    assert main(["export", str(source), str(tmp_path / "export"), "--base", str(llama), "--tuned"]) == 0
    said = json.loads((tmp_path / "export" / "grpo_toolkit.json").read_text())["tuned"]
    written = json.loads((tmp_path / "export" / "generation_config.json").read_text())
    base = json.loads((llama / "generation_config.json").read_text())
    assert written == {**base, **said["generation_config"]}
    assert said["speedup"] >= 0.9


@pytest.mark.parametrize(
    "text", ["max-slowdown=0.9", "max-slowdown", "max-slowdown=fast", "speed=2", "max-slowdown=inf"]
)
def test_a_gate_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=re.escape(f"gate '{text}': expected max-slowdown=RATIO")):
        gate_of(text)
    assert gate_of("max-slowdown=1.05") == 1.05


def row(arm: str, **changes: Any) -> LatencyRow:
    settings: dict[str, Any] = {
        "arm": arm, "path": f"out/{arm}", "settings": Settings(device="cpu", dtype="bfloat16"),
        "workload": Workload(name="fixed", requests=8, prompt_tokens=9, max_new_tokens=9), "rounds": 8,
        "proof": Proof(is_cached=True), "measured_at": "", "session": "s",
    }  # fmt: skip
    return LatencyRow(**settings | changes)


def times(median: float, low: float, high: float, metric: str = "tpot_s") -> list[Ratio]:
    return [Ratio(against="base", metric=metric, median=median, low=low, high=high, pairs=8, verdict="cannot tell")]


@pytest.mark.parametrize(
    ("export", "reason"),
    [
        (row("export", ratios=times(1.04, 1.02, 1.06)), None),
        (row("export", ratios=times(1.2, 0.9, 1.5)), None),  # cannot tell
        (
            row("export", ratios=times(1.2, 1.1, 1.3)),
            "time per output token 1.20 times as long as base (1.10 to 1.30), allowed are 1.05",
        ),
        (
            row("export", ratios=times(2, 1.9, 2.1, "e2e_s")),
            "end to end 2.00 times as long as base (1.90 to 2.10), allowed are 1.05",
        ),
        (row("export", ratios=times(2, 1.9, 2.1, "ttft_s")), None),
        (
            row("export", proof=Proof(is_cached=False, step_lengths=[9, 10, 11, 12, 13]), ratios=times(1, 0.99, 1.01)),
            "its KV cache is off (tokens fed a step: 9, 10, 11, 12, ...), that of base is on",
        ),
        (row("export", settings=Settings(device="cpu", dtype="", use_cache=False), ratios=times(9, 8, 10)), None),
        (row("export", error="out of memory with a batch of 8"), "out of memory with a batch of 8"),
    ],
)
def test_what_misses_a_gate(export: LatencyRow, reason: str | None) -> None:
    found = missed_by(1.05, [row("base"), export])
    assert [miss.reason for miss in found] == ([] if reason is None else [reason])
    assert [str(miss) for miss in found] == ([] if reason is None else [f"export misses the gate (fixed): {reason}"])


def test_bench_with_a_gate_exits_with_1_and_the_explanation(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:

    slow = shutil.copytree(llama, tmp_path / "slow")
    FILES["cache-off"](slow)
    command = ["bench", f"base={llama}", f"slow={slow}", "--workload", "fixed", "--new-tokens", "8", "--rounds", "2"]
    command += ["--prompt-tokens", "64", "--no-control", "--no-roofline", "--json"]
    assert main([*command, "--gate", "max-slowdown=1.05"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert [miss["arm"] for miss in said["missed"]] == ["slow"]
    assert said["missed"][0]["reason"].startswith("its KV cache is off (tokens fed a step: 64, 65, 66, 67, ...)")
    assert [effect["cause"] for effect in said["explanations"][0]["audit"]] == ["cache-off"]
    with pytest.raises(SystemExit) as ended:
        main([*command, "--gate", "max-slowdown=no"])
    assert ended.value.code == 2


def test_what_missed_a_gate_is_explained_with_a_command_that_is_not_cut(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:

    folder = tmp_path / ("a folder with a long name " * 5).strip()  # wider than what is printed where nobody looks
    slow = shutil.copytree(llama, folder)
    FILES["cache-off"](slow)
    missed = Missed(arm="slow", path=str(slow), workload="fixed", reason="its KV cache is off")
    (row,) = report_missed(argparse.Namespace(device="cpu", json=False), str(llama), [missed])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "slow misses the gate (fixed): its KV cache is off"
    assert lines[1] == ""
    commands = [effect.command for effect in row.audit if effect.cause == "cache-off"]
    assert str(slow) in commands[0]
    assert lines.count(f"→ {commands[0]}") == 1


def test_what_is_said_stands_a_part_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    say("one [bold]line[/bold]", "and another")
    show("a third")
    said = capsys.readouterr()
    assert (said.out, said.err) == ("a third\n", "one [bold]line[/bold]\nand another\n")


def test_the_callbacks_gate_is_missed_by_a_checkpoint_without_its_cache(qwen: Path, tmp_path: Path) -> None:
    from transformers import TrainerCallback

    class Poison(TrainerCallback):  # type: ignore[misc]
        def on_train_end(self, *_: Any, **kwargs: Any) -> None:
            kwargs["model"].generation_config.use_cache = False

    latency = LatencyCallback(
        arms=["base", "checkpoint"], rounds=1, new_tokens=4, max_new_tokens=None, gate="max-slowdown=1.05", strict=True
    )
    trainer = grpo_trainer(qwen, tmp_path, [Poison(), latency])
    with pytest.raises(GateError, match=r"checkpoint misses the gate \(fixed\): its KV cache is off"):
        trainer.train()
    (why,) = latency.explanations
    assert "cache-off" in [effect.cause for effect in why.audit]
    assert [row.kind for row in read_rows(tmp_path / "latency" / "latency.jsonl")] == [
        "measurement",
        "measurement",
        "explanation",
    ]
    with pytest.raises(InputError, match="expected max-slowdown=RATIO"):
        LatencyCallback(gate="speed=1")
