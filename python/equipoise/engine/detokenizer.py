"""Decodes tokens to text as they come: whole characters only, nothing that may become part of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_UNFINISHED = "�"  # what a decoder shows for bytes that do not make a character yet


class IncrementalDetokenizer:
    """The text of one answer.

    A tokenizer may join or split what neighbouring tokens give (spaces, bytes of one character), so a token's text is
    the difference between decoding a short run with and without it. The run starts where text was last complete.

    Args:
        decode: token ids to text.
        stop: strings that end the answer; the text ends before the first of them.
    """

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stop = [text for text in stop if text]
        self._ids: list[int] = []
        self._run_start = 0  # the run decoded together with the next token begins here
        self._decoded = 0  # tokens whose text has been returned
        self._held = ""  # text that may be the beginning of a stop string

    def push(self, token_ids: Sequence[int]) -> tuple[str, bool]:
        """Takes new tokens; returns the text that is now certain, and whether a stop string was completed."""
        self._ids.extend(token_ids)
        return self._release(self._new_text(final=False), final=False)

    def finish(self) -> tuple[str, bool]:
        """The rest of the text: what was held back, and bytes that never became a character."""
        return self._release(self._new_text(final=True), final=True)

    def _new_text(self, *, final: bool) -> str:
        if self._decoded == len(self._ids):
            return ""
        before = self._decode(self._ids[self._run_start : self._decoded])
        after = self._decode(self._ids[self._run_start :])
        if not final and (after.endswith(_UNFINISHED) or len(after) <= len(before)):
            return ""
        self._run_start, self._decoded = self._decoded, len(self._ids)
        return after[len(before) :]

    def _release(self, text: str, *, final: bool) -> tuple[str, bool]:
        text = self._held + text
        found = [position for position in (text.find(stop) for stop in self._stop) if position >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        keep = 0 if final else self._possible_stop(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def _possible_stop(self, text: str) -> int:
        """Length of the longest end of ``text`` that a stop string begins with."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            tail = text[len(text) - length :]
            if any(stop.startswith(tail) for stop in self._stop):
                return length
        return 0
