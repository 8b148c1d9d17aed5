"""A folder of documents as numbered lines of text: Markdown, HTML, plain text, tables, code, and PDF where pypdf is.

A line keeps the number that it has in its file, so that a citation leads there. Of a PDF it is the number of the page.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

from qnext.errors import UsageError, warn
from qnext.text.files import read_user_text

MARKDOWN, HTML, CODE, PLAIN, PDF = "markdown", "html", "code", "plain", "pdf"
_FORMS = {
    **dict.fromkeys((".md", ".markdown", ".rst"), MARKDOWN),
    **dict.fromkeys((".html", ".htm", ".xhtml"), HTML),
    **dict.fromkeys((".py", ".pyi", ".js", ".ts", ".go", ".rs", ".java", ".c", ".h", ".cpp", ".hpp", ".cs"), CODE),
    **dict.fromkeys((".txt", ".text", ".csv", ".tsv", ".toml", ".yaml", ".yml", ".ini", ".cfg", ".json"), PLAIN),
    ".pdf": PDF,
}
_MAX_BYTES = 16 << 20  # of one file
_HEADINGS = {f"h{level}": "#" * level for level in range(1, 7)}
_BLOCKS = {"p", "div", "li", "ul", "ol", "table", "tr", "br", "pre", "section", "article", "dt", "dd", *_HEADINGS}
_UNSEEN = {"script", "style", "template", "noscript", "svg"}


class NumberedLine(NamedTuple):
    """A line of text, and its number in the file; of a PDF that of its page."""

    number: int
    text: str


@dataclass(frozen=True)
class SourceDocument:
    """`name` is the path below the folder. Headings begin with #, cells of tables stand between |, in every form."""

    name: str
    form: str
    lines: tuple[NumberedLine, ...]

    def at(self, number: int) -> str:
        """What stands at a number: a line, or a whole page."""
        return "\n".join(line.text for line in self.lines if line.number == number)


def read_folder(root: Path) -> list[SourceDocument]:
    """Every readable document below a folder, or one file, in the order of the names. Hidden files and folders are left
    out. Raises UsageError where there is none."""
    if not root.exists():
        raise UsageError(f"{root}: no such folder")
    paths = [root] if root.is_file() else sorted(path for path in root.rglob("*") if path.is_file())
    found, left_out = [], []
    for path in paths:
        relative = path.relative_to(root) if path != root else Path(path.name)
        if path.suffix.lower() not in _FORMS or any(part.startswith(".") for part in relative.parts):
            continue
        try:
            found.append(_read(path, relative.as_posix()))
        except UsageError as error:
            left_out.append(str(error))
    if not found:
        reason = f": {left_out[0]}" if left_out else f"; read are {', '.join(_FORMS)}"
        raise UsageError(f"{root}: no readable document{reason}")
    if left_out:
        warn(f"{len(left_out)} files are left out, such as {left_out[0]}", error=UsageError)
    return [document for document in found if document.lines]


def _read(path: Path, name: str) -> SourceDocument:
    if path.stat().st_size > _MAX_BYTES:
        raise UsageError(f"{path}: larger than {_MAX_BYTES >> 20} MiB")
    form = _FORMS[path.suffix.lower()]
    if form == PDF:
        return SourceDocument(name, form, tuple(_pages(path)))
    reader = _READERS.get(form, _plain_lines)
    return SourceDocument(name, form, tuple(reader(read_user_text(path))))


def _plain_lines(text: str) -> Iterator[NumberedLine]:
    for number, line in enumerate(text.splitlines(), 1):
        yield NumberedLine(number, line.rstrip())


def _pages(path: Path) -> Iterator[NumberedLine]:
    try:
        import pypdf
    except ImportError:
        raise UsageError(f"{path}: PDF needs pypdf (pip install 'qnext[pdf]')") from None
    try:
        for number, page in enumerate(pypdf.PdfReader(path).pages, 1):
            yield from (NumberedLine(number, line) for line in page.extract_text().splitlines() if line.strip())
    except Exception as error:  # whatever a damaged file makes the library raise
        raise UsageError(f"{path}: no readable PDF: {type(error).__name__}") from None


def _html_lines(text: str) -> Sequence[NumberedLine]:
    parser = _Html()
    parser.feed(text)
    parser.close()
    parser.end_line()
    return parser.lines


class _Html(HTMLParser):
    """Text by blocks, with the line of the file where each begins."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.lines: list[NumberedLine] = []
        self._text, self._number, self._unseen, self._is_row = "", 0, 0, False

    def handle_starttag(self, tag: str, attributes: object) -> None:
        if tag in _UNSEEN:
            self._unseen += 1
        if tag in _BLOCKS:
            self.end_line()
        if tag in _HEADINGS:
            self._add(f"{_HEADINGS[tag]} ")
        if tag in ("td", "th"):
            self._add(" | " if self._is_row else "| ")
            self._is_row = True

    def handle_endtag(self, tag: str) -> None:
        if tag in _UNSEEN:
            self._unseen = max(0, self._unseen - 1)
        if tag == "tr" and self._is_row:
            self._add(" |")
        if tag in _BLOCKS:
            self.end_line()

    def handle_data(self, data: str) -> None:
        if not self._unseen:
            self._add(data)

    def _add(self, text: str) -> None:
        if not self._text.strip() and text.strip():
            skipped = text[: len(text) - len(text.lstrip())].count("\n")
            self._number = self.getpos()[0] + skipped
        self._text += text

    def end_line(self) -> None:
        text = " ".join(self._text.split())
        if text.strip("#| "):
            self.lines.append(NumberedLine(self._number, text))
        self._text, self._is_row = "", False


_READERS: Mapping[str, Callable[[str], Iterator[NumberedLine] | Sequence[NumberedLine]]] = {HTML: _html_lines}
