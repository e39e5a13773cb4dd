#!/usr/bin/env bash
# Serve rollouts for --config recipes/configs/with_vllm_server.yaml, on GPUs that the training does not use:
#
#   CUDA_VISIBLE_DEVICES=7 bash recipes/launch/vllm_server.sh [MODEL [MAX_PIXELS [MAX_LENGTH]]]
#
# The limits must be those of the training: its max_pixels, and max_prompt_length + max_completion_length. Every other
# flag that TRL's trainer counts on (weight transfer, log-probabilities) is set by `trl vllm-serve`.
set -euo pipefail
model=${1:-Qwen/Qwen2.5-VL-3B-Instruct}
max_pixels=${2:-401408}
max_length=${3:-2048}
if ! python -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("vllm") is None)'; then
    echo "recipes/launch/vllm_server.sh: vLLM is not installed here: pip install 'trl[vllm]'" >&2
    exit 2
fi
# --limit-mm-per-prompt: without it vLLM also reserves memory for a video of 16,384 tokens.
exec trl vllm-serve --model "$model" --max_model_len "$max_length" \
    --mm-processor-kwargs "{\"max_pixels\": $max_pixels}" \
    --limit-mm-per-prompt '{"image": 4, "video": 0}'
