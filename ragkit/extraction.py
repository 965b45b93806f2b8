"""The title and the text of text, Markdown, HTML, PDF and Word files."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

from .errors import DataError, MissingExtra

Extract: TypeAlias = tuple[str, str, dict[str, Any]]
"""Title ("" for none), text, and metadata."""


def extract(path: Path) -> Extract:
    """Return title (the file's stem for want of one), text and metadata of a file of `EXTRACTORS`.

    Only a PDF has metadata: {"pages": their number}.

    Raises:
        DataError: the file cannot be read or parsed, or it holds no text.
        MissingExtra: the package that parses such files is not installed.
    """
    try:
        title, text, metadata = EXTRACTORS[path.suffix.lower()](path)
    except (DataError, MissingExtra):
        raise
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}") from error
    except Exception as error:  # parsers of damaged files raise whatever they stumble over
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"cannot be parsed as {path.suffix.lower()} ({reason})") from error
    if not text.strip():
        raise DataError("holds no text")
    return " ".join(title.split()) or path.stem, text, metadata


def _read(path: Path) -> str:
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        byte = f"byte 0x{data[error.start]:02x} at offset {error.start}, line {line}"
        raise DataError(f"not UTF-8 ({byte}); save the file as UTF-8") from error
    return text.replace("\r\n", "\n")


def _plain(path: Path) -> Extract:
    return "", _read(path), {}


_FRONT_MATTER = re.compile(r"---[ \t]*\n(?=[\w-]+:)(.*?\n)(?:---|\.\.\.)[ \t]*(?:\n|\Z)", re.DOTALL)
_TITLE_FIELD = re.compile(r"^title:[ \t]*(.+)$", re.MULTILINE | re.IGNORECASE)
_CODE_BLOCK = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^# +(.+)$", re.MULTILINE)


def _markdown(path: Path) -> Extract:
    text = _read(path)
    front = _FRONT_MATTER.match(text)
    if front:
        text = text[front.end() :]
        field = _TITLE_FIELD.search(front[1])
        if field:
            return field[1].strip().strip("\"'"), text, {}
    heading = _HEADING.search(_CODE_BLOCK.sub("", text))
    return heading[1] if heading else "", text, {}


_DROPPED = {"script", "style", "template", "noscript", "nav", "head"}
_BLOCKS = {
    *("address", "article", "aside", "blockquote", "body", "details", "dialog", "div", "dl"),
    *("fieldset", "figcaption", "figure", "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6"),
    *("header", "hr", "main", "ol", "p", "pre", "section", "summary", "table", "ul"),
}
_ROWS = {"br", "caption", "dd", "dt", "li", "option", "tr"}
_CELLS = ["td", "th"]


def _html(path: Path) -> Extract:
    try:
        from bs4 import BeautifulSoup
    except ImportError:
        raise MissingExtra("beautifulsoup4", "documents", "reading HTML files") from None
    soup = BeautifulSoup(_read(path), "html.parser")
    name = soup.title or soup.h1
    lines = (line.strip() for line in "".join(_html_pieces(soup)).split("\n"))
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()
    return name.get_text() if name else "", text, {}


def _html_pieces(soup: Any) -> Iterator[str]:
    """Yield the text between the tags, and line breaks where blocks, rows and cells meet."""
    from bs4.element import NavigableString, Tag

    space = True  # whether the text so far ends with white space
    waiting: list[tuple[Any, bool]] = [
        (soup, False)
    ]  # a stack: trees nest deeper than Python calls
    while waiting:
        node, verbatim = waiting.pop()
        if isinstance(node, Tag):
            if node.name in _DROPPED:
                continue
            verbatim = verbatim or node.name == "pre"
            block = "\n\n" if node.name in _BLOCKS else ""
            waiting.append((block, True))
            waiting += [(child, verbatim) for child in reversed(node.contents)]
            text = " | " if _follows_a_cell(node) else "\n" if node.name in _ROWS else block
        elif type(node) in {str, NavigableString}:  # not a comment
            text = node if verbatim else re.sub(r"\s+", " ", node)
            text = text[1:] if space and text.startswith(" ") and not verbatim else text
        else:
            continue
        if text:
            space = text[-1].isspace()
            yield text


def _follows_a_cell(tag: Any) -> bool:
    if tag.name not in _CELLS:
        return False
    # html.parser puts a cell inside the one before it if that was never closed
    return tag.parent.name in _CELLS or tag.find_previous_sibling(_CELLS) is not None


def _pdf(path: Path) -> Extract:
    try:
        import pypdf
    except ImportError:
        raise MissingExtra("pypdf", "documents", "reading PDF files") from None
    with pypdf.PdfReader(path) as reader:
        if reader.is_encrypted and not reader.decrypt(""):
            raise DataError("the PDF is encrypted; save it without its password")
        text = "\n\n".join(page.extract_text().strip() for page in reader.pages).strip()
        title = (reader.metadata and reader.metadata.title) or ""
        pages = len(reader.pages)
    if not text:
        raise DataError("the PDF holds no text (scanned pages?); run OCR over it first")
    return _whole_characters(title), _whole_characters(text), {"pages": pages}


def _whole_characters(text: str) -> str:
    # broken font tables give halves of surrogate pairs, which no UTF-8 file can hold
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _word(path: Path) -> Extract:
    try:
        import docx
    except ImportError:
        raise MissingExtra("python-docx", "documents", "reading Word files") from None
    document = docx.Document(str(path))
    title = document.core_properties.title or next(
        (
            paragraph.text
            for paragraph in document.paragraphs
            if paragraph.text and _style(paragraph).startswith(("Title", "Heading"))
        ),
        "",
    )
    return title, "\n\n".join(_word_blocks(document)), {}


def _style(paragraph: Any) -> str:
    return (paragraph.style and paragraph.style.name) or ""


def _word_blocks(container: Any) -> Iterator[str]:
    for block in container.iter_inner_content():
        if hasattr(block, "rows"):
            rows = []
            for row in block.rows:
                # row.cells names a merged cell once for each column that it spans
                cells = {cell._tc: cell for cell in row.cells}
                rows.append(" | ".join("\n".join(_word_blocks(cell)) for cell in cells.values()))
            yield "\n".join(rows)
        elif block.text.strip():
            yield block.text.strip()


EXTRACTORS: dict[str, Callable[[Path], Extract]] = {
    ".txt": _plain,
    ".md": _markdown,
    ".html": _html,
    ".htm": _html,
    ".pdf": _pdf,
    ".docx": _word,
}
