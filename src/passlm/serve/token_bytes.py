"""Bytes and readable text of single tokens, as log-probabilities report them."""

from __future__ import annotations

import re

from transformers import PreTrainedTokenizerBase

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "\u2581"  # SentencePiece's mark for a space


class TokenBytes:
    """Maps token ids to their bytes and to readable text.

    A token may contain only a part of a character. Bytes that are not valid UTF-8 are written as
    escapes, as in OpenAI's API.

    Args:
        tokenizer: tokenizer of the model.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._added = {token: str(text) for token, text in tokenizer.added_tokens_decoder.items()}
        self._byte_of_char = _byte_of_chars() if _is_byte_level(tokenizer) else None
        self._cache: dict[int, tuple[str, bytes]] = {}

    def __call__(self, token: int) -> tuple[str, bytes]:
        """Return text and bytes of a token."""
        if token not in self._cache:
            raw = self._bytes(token)
            self._cache[token] = _readable(raw), raw
        return self._cache[token]

    def _bytes(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].encode()
        piece = self._tokenizer.convert_ids_to_tokens([token])[0]
        if piece is None:  # a padding row of the output layer, without a token
            return b""
        if self._byte_of_char is not None and all(char in self._byte_of_char for char in piece):
            return bytes(self._byte_of_char[char] for char in piece)
        byte = _BYTE.fullmatch(piece)
        if byte is not None:
            return bytes([int(byte[1], 16)])
        return str(piece).replace(_SPACE, " ").encode()


def _readable(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "".join(f"\\x{byte:02x}" for byte in raw)


def _is_byte_level(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the tokenizer writes bytes as characters in the way of GPT-2."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = getattr(backend, "decoder", None)
    return decoder is not None and b'"ByteLevel"' in decoder.__getstate__()


def _byte_of_chars() -> dict[str, int]:
    """Return the byte of each character in GPT-2's encoding.

    Printable bytes stand for themselves; the others are written as the characters from 256 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    chars = {chr(byte): byte for byte in printable}
    return chars | {chr(256 + index): byte for index, byte in enumerate(others)}
