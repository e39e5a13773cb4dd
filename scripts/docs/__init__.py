"""Builders of generated pages and pictures."""
