"""Train, save and export on one GPU and on two of this machine, as every kind that people launch: NCCL, bfloat16.

    python scripts/check_two_gpus.py [--base BASE] [--kinds ddp fsdp2_full ...]

The tests do the same on two processes of a CPU (tests/test_distributed.py); this is for a machine that has the GPUs.
It prints a table: what it ran on, whether the export was verified, and how far its tensors are from those of one GPU
that trained on the same completions.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from launch import ALONE, KINDS, launch, stored_weights  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="a bfloat16 Qwen2.5-VL; by default a tiny one is made")
    parser.add_argument("--kinds", nargs="+", choices=[ALONE, *KINDS], default=[ALONE, *KINDS])
    parser.add_argument("--lora", action="store_true", help="train an adapter instead of all the weights")
    parser.add_argument("--timeout", type=int, default=300, help="seconds for each kind")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="check-two-gpus-") as scratch:
        base = Path(options.base) if options.base else tiny_base(Path(scratch, "base"))
        reference: dict[str, Any] = {}
        for kind in options.kinds:
            began, folder = time.monotonic(), Path(scratch, kind)
            main_report, _ = launch(
                kind,
                "all_callbacks",
                folder,
                device="cuda",
                timeout_s=options.timeout,
                model=str(base),
                lora=options.lora,
                learning_rate=1e-4,
                save_strategy="no",
            )
            found = stored_weights(folder / "export")
            reference = reference or found
            print(
                f"{kind:>24}: {main_report['runs_on']}; exported {main_report['exported']}, "
                f"failures {main_report['failures']}, {len(found)} tensors {compared(found, reference)}, "
                f"{time.monotonic() - began:.0f} s",
                flush=True,
            )


def tiny_base(folder: Path) -> Path:
    from models import build_qwen2_5_vl

    return build_qwen2_5_vl(folder, dtype="bfloat16")


def compared(found: dict[str, Any], reference: dict[str, Any]) -> str:
    if found.keys() != reference.keys():
        return f"of OTHER NAMES: {sorted(found.keys() ^ reference.keys())[:3]}"
    far = max(float((found[name].float() - tensor.float()).abs().max()) for name, tensor in reference.items())
    return f"({next(iter(found.values())).dtype}), at most {far:.1e} from the first kind's"


if __name__ == "__main__":
    main()
