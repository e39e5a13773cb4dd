"""What can be asked: a live model, a folder in a fresh process, an OpenAI-compatible endpoint. One protocol."""
