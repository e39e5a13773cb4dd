"""Latency: arms take turns, lengths are exact, rows survive on disk."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise as pairs
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from grpo_toolkit.checkpoint.folders.model_folder import open_checkpoint
from grpo_toolkit.errors import InputError, WorkerError
from grpo_toolkit.export.verification_process import Worker
from grpo_toolkit.latency.bench.measure import measure_latency
from grpo_toolkit.latency.bench.statistics import summary
from grpo_toolkit.latency.bench.workload import traffic_of
from grpo_toolkit.latency.engines import arms as arms_module
from grpo_toolkit.latency.engines.arms import Arm, fitting
from grpo_toolkit.latency.engines.protocol import Options
from grpo_toolkit.latency.rows.row import LatencyRow, Summary, Timeline
from grpo_toolkit.latency.rows.store import append_rows, read_measurements, read_rows, row_of
from grpo_toolkit.model.generation.chat_inputs import image_messages
from grpo_toolkit.model.generation.model_process import worker_environment
from grpo_toolkit.model.generation.request import Request, requests_from_rows
from grpo_toolkit.model.load import load_model
from grpo_toolkit.model.memory import process_bytes

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def turns() -> list[tuple[str, int]]:
    return []


@pytest.fixture(scope="module")
def measured(qwen: Path, turns: list[tuple[str, int]]) -> list[LatencyRow]:
    from PIL import Image

    request = Request(messages=[{"role": "user", "content": "What?"}], images=[Image.new("RGB", (56, 56))])
    arms = [Arm(name="export", path=qwen), Arm(name="export_no_cache", path=qwen, options=Options(use_cache=False))]
    return measure_latency(
        arms, [request], new_tokens=12, rounds=3, warmup=1, progress=lambda arm, turn, _: turns.append((arm, turn))
    )


def test_every_arm_generates_exactly_what_was_asked(measured: list[LatencyRow]) -> None:
    assert [row.arm for row in measured] == ["export", "export_no_cache"]
    for row in measured:
        assert row.workload.max_new_tokens == 12
        assert row.rounds == 3
        assert [len(timeline.token_times_s) for timeline in row.timelines] == [12] * 3
        assert all(early < late for t in row.timelines for early, late in pairs(t.token_times_s))
        assert row.memory.peak_bytes > 0


def test_the_proof_without_a_clock_is_in_the_row(measured: list[LatencyRow]) -> None:
    cached, uncached = measured
    assert (cached.proof.is_cached, uncached.proof.is_cached) == (True, False)
    assert cached.proof.step_lengths[1:] == [1] * 11
    assert uncached.proof.step_lengths == [uncached.workload.prompt_tokens + step for step in range(12)]


def test_arms_take_turns_in_alternating_order(measured: list[LatencyRow], turns: list[tuple[str, int]]) -> None:
    a, b = "export", "export_no_cache"
    assert turns == [(a, -1), (b, -1), (a, 0), (b, 0), (b, 1), (a, 1), (b, 2), (a, 2)]


def test_rows_survive_on_disk(measured: list[LatencyRow], tmp_path: Path) -> None:
    path = tmp_path / "latency" / "latency.jsonl"
    append_rows(path, measured[:1])
    append_rows(path, measured[1:])
    assert read_rows(path) == measured
    with path.open("a") as file:
        file.write('{"arm": "cut o')  # a crash in the middle of a row
    assert len(read_rows(path)) == 2
    append_rows(path, measured[:1])
    assert [row.arm for row in read_measurements(path)] == ["export", "export_no_cache", "export"]
    path.write_text("nonsense\n" + path.read_text())
    with pytest.raises(InputError, match="line 1 is not JSON"):
        read_rows(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 1}, "row: schema_version is 1, this version of grpo_toolkit reads 2"),
        ({"kind": "other"}, "row: kind is 'other', expected one of ['explanation', 'measurement']"),
        ({"rounds": "many"}, "row: rounds: Input should be a valid integer"),
        ({"tpot_s": {"n": 1}}, "row: tpot_s.median: Field required"),
    ],
)
def test_what_is_not_a_row_is_refused_with_its_key(
    measured: list[LatencyRow], change: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        row_of(measured[0].to_json() | change)


def test_a_summary_is_median_and_quartiles() -> None:
    assert summary([4.0, 1.0, 3.0, 2.0, 5.0]) == Summary(n=5, median=3.0, q1=2.0, q3=4.0)
    assert summary([2.0]) == Summary(n=1, median=2.0, q1=2.0, q3=2.0)


def of_tokens(times: list[float]) -> Timeline:
    return Timeline(token_times_s=times, prompt_tokens=1, output_tokens=len(times))


def test_tpot_leaves_the_first_token_out_and_is_null_for_one() -> None:
    assert of_tokens([0.5, 0.6, 0.8]).tpot_s == pytest.approx(0.15)
    assert of_tokens([0.5, 0.6, 0.8]).ttft_s == 0.5
    assert of_tokens([0.5]).tpot_s is None


@pytest.mark.parametrize("change", [{"rounds": 0}, {"new_tokens": 0}, {"requests": []}, {"arms": []}])
def test_nothing_to_measure_is_an_error(tmp_path: Path, change: dict[str, object]) -> None:
    request = Request(messages=[{"role": "user", "content": "?"}])
    settings: dict[str, object] = {"arms": {"a": tmp_path}, "requests": [request]} | change
    arms, requests = settings.pop("arms"), settings.pop("requests")
    with pytest.raises(InputError, match="at least one arm"):
        measure_latency(arms, requests, **settings)  # type: ignore[arg-type]


def test_a_folder_that_cannot_be_loaded_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no-such-model"}')
    with pytest.raises(WorkerError, match="no-such-model"), Worker(tmp_path) as worker:
        _ = worker.report


def test_a_worker_that_dies_is_one_error(qwen: Path) -> None:
    with Worker(qwen) as worker:
        assert worker.report.is_clean
        scratch = worker._scratch
        worker._process.kill()
        worker._process.wait()
        with pytest.raises(WorkerError, match="ended"):
            worker.generate(Request(messages=[{"role": "user", "content": "?"}]))
    assert not scratch.exists()


def test_a_workers_imports_are_not_taken_from_the_current_folder(
    qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_workers: None
) -> None:
    (tmp_path / "queue.py").write_text("raise RuntimeError('not this one')")
    monkeypatch.chdir(tmp_path)
    with Worker(qwen) as worker:
        assert worker.report.is_clean


def test_a_worker_is_outside_the_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "ACCELERATE_USE_FSDP", "FSDP_VERSION"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    environment = worker_environment()
    assert environment["CUDA_VISIBLE_DEVICES"] == "0"
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "ACCELERATE_USE_FSDP"} & set(environment)


def test_requests_from_rows_as_trl_takes_them() -> None:
    picture, one, two = (Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue"))
    rows = [
        {"prompt": "plain text"},
        {"prompt": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "image": picture},
        {"prompt": [{"role": "user", "content": "q"}], "images": [one, two], "image": None},
        {"prompt": "never read"},
    ]
    requests = requests_from_rows(rows, limit=3, max_new_tokens=9)
    assert [list(request.messages) for request in requests] == [
        [{"role": "user", "content": "plain text"}],
        [{"role": "user", "content": "q"}],
        [{"role": "user", "content": "q"}],
    ]
    assert [list(request.images) for request in requests] == [[], [picture], [one, two]]
    part = {"type": "image", "image": picture}
    inside = [{"role": "user", "content": [part, {"type": "text", "text": "q", "image": None}]}]
    (request,) = requests_from_rows([{"prompt": inside, "image": None}], limit=1)
    assert list(request.messages) == [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "q"}]}]
    assert list(request.images) == [picture]
    asked = traffic_of(requests, max_new_tokens=5).batch(0)
    assert [(request.exact, request.max_new_tokens) for request in asked] == [(True, 5)]


def test_images_go_in_front_of_the_first_user_text_unless_they_are_placed() -> None:
    plain = Request(
        messages=[{"role": "system", "content": "s"}, {"role": "user", "content": "q"}],
        images=["a", "b"],  # type: ignore[list-item]
    )
    assert image_messages(plain)[1]["content"] == [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "q"}]
    parts = [{"type": "text", "text": "q"}, {"type": "image"}]
    placed = Request(messages=[{"role": "user", "content": parts}], images=["a"])  # type: ignore[list-item]
    assert image_messages(placed)[0]["content"] == parts


def test_arms_that_a_gpu_has_no_room_for_are_left_out_or_said(qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = Options(device="cuda:0")
    arms = [
        Arm(name=name, path=qwen, options=options, process=turn) for turn, name in enumerate(("base", "checkpoint"))
    ]
    export = Arm(name="export", path=qwen, options=options, process=2)
    arms += [export, replace(export, name="export_no_cache", options=replace(options, use_cache=False))]  # one process
    each = process_bytes(qwen)
    assert each - 1_500_000_000 == sum(info.nbytes for info in open_checkpoint(qwen).tensors().values())

    def timed(free: int) -> list[str]:
        monkeypatch.setattr(arms_module, "free_bytes", {"cuda:0": free}.__getitem__)
        return [arm.name for arm in fitting(arms, spare=["checkpoint"])]

    assert timed(3 * each) == ["base", "checkpoint", "export", "export_no_cache"]
    assert timed(3 * each - 1) == timed(2 * each) == ["base", "export", "export_no_cache"]
    with pytest.raises(InputError, match=r"need about 3\.0 GB on cuda:0 at once, and 1\.5 GB are free"):
        timed(each)
    monkeypatch.setattr(arms_module, "free_bytes", lambda _: 0)
    with pytest.raises(InputError, match=r"need about 1\.5 GB"):
        fitting(arms[1:2], spare=["checkpoint"])
    on_cpu = [replace(arm, options=Options()) for arm in arms]
    assert fitting(on_cpu) == on_cpu


def test_an_adapter_takes_the_room_of_its_base(qwen: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(load_model(qwen)[0], LoraConfig(target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")
    own = sum(info.nbytes for info in open_checkpoint(tmp_path / "adapter").tensors().values())
    assert process_bytes(tmp_path / "adapter") == process_bytes(qwen) + own
