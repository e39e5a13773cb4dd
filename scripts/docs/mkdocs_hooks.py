"""The hooks that `docs/mkdocs.yml` names: where the pages are, and those that are made when the site is built."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mkdocs.structure.files import File

from scripts.docs.site import pages, relinked

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page


def on_config(config: MkDocsConfig) -> None:
    """Take the pages from the folder of `mkdocs.yml`, which mkdocs refuses where it is written there.

    It would publish `mkdocs.yml` as well; `exclude_docs` leaves that out.
    """
    config.docs_dir = str(Path(config.config_file_path).parent)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made from the code, and those that stand outside of `docs/`."""
    for place, text in pages().items():
        files.append(File.generated(config, place, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Mend the links of a page in `docs/` that lead out of it, such as one to CONTRIBUTING.md."""
    place = page.file.src_uri
    return markdown if page.file.generated_by else relinked(markdown, f"docs/{place}", place)
