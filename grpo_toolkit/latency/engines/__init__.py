"""The engines, of one protocol: a live model, a folder in a fresh process, an OpenAI-compatible endpoint."""
