"""What mkdocs is told of links that lead out of docs/, to the source beside it: a site has no such page, so they are names."""

from __future__ import annotations

import posixpath
import re
from typing import Any

LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Called by mkdocs with the text of each page."""
    folder = posixpath.dirname(page.file.src_uri)

    def name_of(link: re.Match[str]) -> str:
        text, target = link[1], link[2]
        leads_out = posixpath.normpath(posixpath.join(folder, target)).startswith("..")
        return text if "://" not in target and leads_out else link[0]

    return LINK.sub(name_of, markdown)


def on_post_page(output: str, *, page: Any, **_: Any) -> str:
    """Called with the HTML of each page: the theme would fetch from the network what lets its search run from a file."""
    return output.replace("https://unpkg.com/iframe-worker/shim", f"{'../' * page.url.count('/')}assets/file_worker.js")
