"""Pages of the manual's reference, made from the code: each module has a function from nothing to Markdown.

Standard library only, so that the pages can be made, and tested, without mkdocs.
"""
