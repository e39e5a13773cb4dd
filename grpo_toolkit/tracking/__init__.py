"""Where results are shown: Weights & Biases, the console, pictures. The truth is on disk; these mirror it."""
