"""What a person got wrong on the command line, in one line: the flag as it was typed, and what it may have meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

from equipoise.errors import ConfigError, InvalidInputError


def unknown_command(given: str, known: Iterable[str]) -> ConfigError:
    """The error for a word that is no command."""
    close = difflib.get_close_matches(given, list(known), 1)
    meant = f"; did you mean {close[0]}?" if close else ""
    return ConfigError(f"unknown command {given!r}{meant} It must be one of {', '.join(known)}; see equipoise --help")


def as_input_error(
    exit_: SystemExit, said: str, arguments: Sequence[str], commands: Iterable[str]
) -> InvalidInputError:
    """tyro draws a box around its complaints and hides an exception of ours in the chain; both become one line."""
    cause: BaseException | None = exit_
    while cause is not None:
        if isinstance(cause, InvalidInputError):
            return naming_the_flag(cause)
        cause = cause.__context__
    command = next((name for name in commands if name in arguments[:1]), None)
    where = f"equipoise {command} --help" if command else "equipoise --help"
    # tyro lists what may have been meant below its first rule.
    unknown = [word.split("=", 1)[0] for word in arguments if word.startswith("--") and word in said]
    similar = [flag for flag in re.findall(r"--[a-z][a-z-]+", said) if flag not in unknown]
    close = difflib.get_close_matches(unknown[0], similar, 1) if unknown and "nrecognized" in said else []
    meant = f"; did you mean {close[0]}?" if close else ""
    return ConfigError(f"{_first_section(said)}{meant}; see {where}".replace("?;", "?"))


def naming_the_flag(error: InvalidInputError) -> InvalidInputError:
    """``ep_size must be ...`` as the person typed it: ``--ep-size must be ...``."""
    if error.field is None or not str(error).startswith(error.field):
        return error
    flag = "--" + error.field.replace("_", "-")
    return ConfigError(flag + str(error).removeprefix(error.field), field=error.field)


def _first_section(box: str) -> str:
    """The words of a box up to its first rule, in one line.

    Where the terminal has no box characters, the title stands above a rule of its own.
    """
    sections: list[list[str]] = [[]]
    for line in box.splitlines():
        text = line.strip().strip("│").strip()
        if text and set(text) <= {"─", "-"}:
            sections.append([])
        elif text and not text.startswith(("╭", "╰")):
            sections[-1].append(text)
    body = sections[0] if "╭" in box or len(sections) == 1 else sections[1]
    return " ".join(body).rstrip(".") or "the arguments cannot be read"
