"""The report of prepare as a page: the figures, and examples of what was left out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from ..errors import ConfigurationError
from .clean import MAX_EXAMPLES
from .shards import write_atomically

_STYLE = (
    "body{font:16px sans-serif;max-width:60em;margin:2em auto}pre{white-space:pre-wrap;background:#eee;padding:.5em}"
)


def check_report_path(path: str) -> None:
    """Refuse what could not be written, before the work.

    Raises:
        ConfigurationError: another ending than .html or .md, or no such folder.
    """
    if not path.endswith((".html", ".md")):
        raise ConfigurationError(f"report = {path}: the ending decides the format; give FILE.html or FILE.md")
    if not Path(path).parent.is_dir() or Path(path).is_dir():
        raise ConfigurationError(
            f"report = {path}: is a folder, or its folder does not exist; give the name of a file in a folder that does"
        )


def write_report(
    path: Path, title: str, figures: Iterable[tuple[str, str]], examples: Mapping[str, Sequence[Sequence[str]]]
) -> None:
    """Write HTML or Markdown, by the path's ending.

    Args:
        figures: name and value of each line.
        examples: by reason, pairs of what was found and an excerpt.
    """
    page = _as_html(title, figures, examples) if path.suffix == ".html" else _as_markdown(title, figures, examples)
    with write_atomically(path) as file:
        file.write(page.encode())


def _heading(reason: str) -> str:
    return f"{reason.replace('_', ' ')}: the first {MAX_EXAMPLES}"


def _as_html(title: str, figures: Iterable[tuple[str, str]], examples: Mapping[str, Sequence[Sequence[str]]]) -> str:
    rows = "".join(f"<tr><td>{escape(name.strip())}</td><td>{escape(value)}</td></tr>\n" for name, value in figures)
    parts = [f"<!doctype html>\n<meta charset=utf-8>\n<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n"]
    parts.append(f"<h1>{escape(title)}</h1>\n<table>\n{rows}</table>\n")
    for reason, found in examples.items():
        parts.append(f"<h2>{escape(_heading(reason))}</h2>\n")
        for detail, text in found:
            parts.append((f"<p>{escape(detail)}</p>\n" if detail else "") + f"<pre>{escape(text)}</pre>\n")
    return "".join(parts)


def _as_markdown(
    title: str, figures: Iterable[tuple[str, str]], examples: Mapping[str, Sequence[Sequence[str]]]
) -> str:
    """Excerpts are indented blocks, in which nothing needs escaping."""
    parts = [f"# {title}\n\n| | |\n|---|---|\n"]
    parts += [f"| {name.strip().replace('|', chr(92) + '|')} | {value} |\n" for name, value in figures]
    for reason, found in examples.items():
        parts.append(f"\n## {_heading(reason)}\n")
        for detail, text in found:
            block = "\n".join("    " + line for line in text.split("\n"))
            parts.append(f"\nfound: `{detail.replace('`', ' ')}`\n\n{block}\n" if detail else f"\n&nbsp;\n\n{block}\n")
    return "".join(parts)
