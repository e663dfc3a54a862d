"""Which files of the repository are pages of the site: a hook of mkdocs.

Pages lie where they lie in the repository, so that their links work there and here. A Python file that a page links to
becomes a page with its source.
"""

from __future__ import annotations

import re
from pathlib import Path
from posixpath import dirname, join, normpath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "docs/**/*.md",
    "benchmarks/LOG.md",
    "benchmarks/results/**/*.md",
)
PICTURES = ("docs/**/*.png", "benchmarks/results/**/*.png")
LINK = re.compile(r"(?<=\]\()(?!https?://)([^)#\s]+)(?=[)#])")


def on_files(files: Files, config: Any) -> Files:
    """The pages, their pictures, the theme's own files, and every other file that a page links to."""
    for file in [file for file in files if not file.src_uri.startswith("assets/")]:
        files.remove(file)
    paths = [str(path.relative_to(ROOT)) for glob in (*PAGES, *PICTURES) for path in sorted(ROOT.glob(glob))]
    for path in paths:
        files.append(File(path, str(ROOT), config.site_dir, config.use_directory_urls))
    linked = {
        target(path, link) for path in paths if path.endswith(".md") for link in LINK.findall((ROOT / path).read_text())
    }
    for path in sorted(linked - set(paths)):
        if (ROOT / path).is_file():
            files.append(source(path, config))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links to Python files lead to the pages with their source."""
    here = page.file.src_uri

    def to_page(link: re.Match[str]) -> str:
        path = target(here, link[1])
        return f"{link[1]}.md" if path.endswith((".py", "LICENSE")) and (ROOT / path).is_file() else link[1]

    return markdown if here.endswith(".py.md") else LINK.sub(to_page, markdown)


def target(page: str, link: str) -> str:
    """The path, from the root of the repository, that a link of a page means."""
    return normpath(join(dirname(page), link))


def source(path: str, config: Any) -> File:
    """A page with the content of a Python file, or the file itself."""
    text = (ROOT / path).read_text(encoding="utf-8")
    if not path.endswith((".py", "LICENSE")):
        return File(path, str(ROOT), config.site_dir, config.use_directory_urls)
    language = "python" if path.endswith(".py") else "text"
    head = f"---\ntitle: {path}\nsearch: {{ exclude: true }}\nhide: [navigation, toc]\n---\n"
    return File.generated(config, f"{path}.md", content=f"{head}# {path}\n\n````{language}\n{text}````\n")
