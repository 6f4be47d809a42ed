"""What `mkdocs build` does beyond docs/: two pages of the repository and the files that pages link to come along.

Pages link to results, examples and scripts as GitHub wants it, `../benchmarks/results/audit.csv`. The site has a copy
of such a file under `files/`, so that the link holds there too, without a network.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
"""Page of the site -> the file at the repository's root that it is made of."""

LINK = re.compile(r"^```.*?^```$|(?<=\]\()([^)#\s:]+)(?=[)#\s])", re.MULTILINE | re.DOTALL)
"""A link to a file, or a fenced block, in which nothing is a link."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages and files that lie outside of docs/.

    Args:
        files: the files of docs/.
        config: the site's configuration.

    Returns:
        The same, with more in it.

    Raises:
        PluginError: a page links to what is no file of the repository.
    """
    for page, source in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text("utf-8")))
    for page in list(files.documentation_pages()):
        for target in filter(None, LINK.findall(page.content_string)):
            uri, source = _resolve(page.src_uri, target)
            if not uri.startswith("files/") or files.get_file_from_path(uri) is not None:
                continue
            if not (ROOT / source).is_file():
                raise PluginError(f"{page.src_uri} links to {target}, which is no file of the repository.")
            files.append(File.generated(config, uri, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links that leave docs/ to where the site has their files.

    Args:
        markdown: the page's source.
        page: the page.
        config: the site's configuration.
        files: all files.

    Returns:
        The source with other links.
    """
    return LINK.sub(lambda found: _resolve(page.file.src_uri, found[1])[0] if found[1] else found[0], markdown)


def _resolve(page: str, target: str) -> tuple[str, str]:
    """Where a link of a page leads: `(path on the site, path in the repository)`."""
    source = posixpath.normpath(posixpath.join("" if page in OUTSIDE else "docs", target))
    moved = {name: uri for uri, name in OUTSIDE.items()} | {"README.md": "index.md"}
    if source in moved:
        return moved[source], source
    return source.removeprefix("docs/") if source.startswith("docs/") else f"files/{source}", source
