"""How the attention of a live model is computed."""
