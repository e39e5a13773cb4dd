"""Attention functions that compute what the library's compute, with less waiting."""
