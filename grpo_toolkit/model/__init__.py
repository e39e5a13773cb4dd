"""A model in memory: its KV cache, its saves, its resumes, and what generation with it needs."""
