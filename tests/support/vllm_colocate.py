"""Two steps of the recipe's trainer with vLLM in the same process, on a CPU: `python vllm_colocate.py BASE OUT`.

vLLM packs the weights of linear layers on a CPU and throws them away, so that no later ones can be loaded; here it
keeps them, as it does where it cannot pack (`dispatch_cpu_unquantized_gemm`). All else is as on a GPU.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def main(base: str, out: str) -> None:
    import torch
    from trl import GRPOConfig
    from vllm.model_executor.layers import utils

    from grpo_vlm.training.trainer import AccuracyTrainer
    from tests.support.training import length_reward, rows

    def keep(layer: Any, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    utils.dispatch_cpu_unquantized_gemm = keep
    arguments = GRPOConfig(
        output_dir=out, max_steps=2, per_device_train_batch_size=4, num_generations=4, max_completion_length=8,
        learning_rate=1e-3, logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, bf16=False, seed=7,
        use_vllm=True, vllm_mode="colocate", vllm_max_model_length=256, vllm_gpu_memory_utilization=0.1,
    )  # fmt: skip
    trainer = AccuracyTrainer(model=base, args=arguments, reward_funcs=length_reward, train_dataset=rows())
    trainer.train()
    print(json.dumps(trainer.state.log_history))


if __name__ == "__main__":
    main(*sys.argv[1:])
