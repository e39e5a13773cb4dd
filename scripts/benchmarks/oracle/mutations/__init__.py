"""Operators that make a good folder ill: each finds the places where it applies, and changes one of them."""
