"""Builders of small and random models and of faulty folders."""
