"""How the programs split documents, and tell of those that an encoder will not read whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from ragkit.console import say
from ragkit.errors import SettingsError
from ragkit.types import Document

if TYPE_CHECKING:
    from ragkit.models.bi_encoder import BiEncoder


class Splitter:
    """Splits documents into pieces that the encoder, if there is one, reads whole.

    `tokens` and `overlap` are what was asked for, or what the encoder reads where that is less.

    Raises:
        SettingsError: as `ragkit.splitting.split` and `checked_window` do.
    """

    def __init__(
        self, tokens: int, overlap: int | None, encoder: BiEncoder | None, language: str
    ) -> None:
        overlap = checked_overlap(tokens, overlap)
        if encoder and tokens and encoder.document_window < tokens:
            tokens = checked_window(encoder)
            overlap = min(overlap, tokens // 2 - 1)
        self.tokens, self.overlap = tokens, overlap
        self._encoder, self._language = encoder, language
        self._cut = Cut(encoder) if encoder else None

    def __call__(self, documents: Iterable[Document]) -> Iterator[Document]:
        """Yield the documents' pieces; a document that fits is its own."""
        from ragkit.splitting import split

        if self.tokens:
            documents = split(
                documents,
                max_tokens=self.tokens,
                overlap=self.overlap,
                tokenize=self._encoder.spans if self._encoder else None,
                language=self._language,
            )
        for piece in documents:
            if self._cut:  # of what was split only a long title is too long
                self._cut.see(piece, len(piece.title) * 2 if self.tokens else len(piece.contents))
            yield piece

    def tell(self) -> None:
        """Say how many pieces the encoder will not read whole."""
        if self._cut:
            self._cut.tell("their titles are long" if self.tokens else "nothing was split")


class Cut:
    """Counts the documents of which an encoder reads only the beginning."""

    def __init__(self, encoder: BiEncoder) -> None:
        self._encoder = encoder
        self._cut = self._total = 0

    def see(self, document: Document, length: int) -> None:
        """Count a document, by how many characters may be too many: a token has one at least."""
        window = self._encoder.document_window
        self._total += 1
        if length > window:
            self._cut += len(self._encoder.spans(document.contents)) > window

    def tell(self, why: str) -> None:
        """Say how many there are, if there are any, and why."""
        if self._cut:
            say(
                f"{self._cut} of {self._total} documents are longer than the "
                f"{self._encoder.document_window} tokens that the encoder reads ({why}): the dense "
                "store knows only their beginnings"
            )


def checked_overlap(tokens: int, overlap: int | None) -> int:
    """Return the overlap of pieces, by default an eighth of their tokens, at most 32.

    Raises:
        SettingsError: as `split` does, and sooner; no tokens are no splitting.
    """
    from ragkit.splitting import split

    overlap = max(0, min(32, tokens // 8)) if overlap is None else overlap
    if tokens:
        split((), max_tokens=tokens, overlap=overlap)
    return overlap


def checked_window(encoder: BiEncoder) -> int:
    """Return how many tokens of a document an encoder reads.

    Raises:
        SettingsError: they are too few to be of use.
    """
    window = encoder.document_window
    if window < 8:
        raise SettingsError(
            f"the encoder reads {encoder.max_length} tokens, of which {window} are left for the "
            "document; 8 are needed. Raise --max-length, or shorten --document-prompt."
        )
    return window
