"""Weights & Biases, Trackio and TensorBoard as mirrors of what is on disk."""
