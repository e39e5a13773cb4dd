"""Safetensors files: read from a base, cast, renamed, copied and written shard by shard."""
