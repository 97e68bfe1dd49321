"""The command line: one frozen dataclass with ``run() -> int`` for each command.

They are in arguments.py and in offline/; flags are made from their fields and the dataclasses of config.py.
Whatever a person got wrong ends in one line on stderr and exit code 2.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import tyro

import equipoise
from equipoise.cli import arguments as serving
from equipoise.cli.complaints import as_input_error, naming_the_flag, unknown_command
from equipoise.cli.help_text import reflow_help
from equipoise.cli.offline import balance_arguments as balance
from equipoise.cli.offline import recording_arguments as recording
from equipoise.errors import EquipoiseError, InvalidInputError

EXIT_BAD_INPUT = 2
EXIT_FAILURE = 1
EXIT_INTERRUPTED = 130

COMMANDS = {
    "serve": serving.Serve,
    "inspect": recording.Inspect,
    "advise": balance.Advise,
    "compare": balance.Compare,
    "replay": serving.Replay,
    "plan": balance.Plan,
    "convert": recording.Convert,
    "merge": recording.Merge,
    "thin": recording.Thin,
    "synth": recording.Synth,
    "explain-transfer": serving.ExplainTransfer,
    "doctor": serving.Doctor,
    "warm-up": serving.WarmUp,
}

Command = (
    Annotated[serving.Serve, tyro.conf.subcommand("serve")]
    | Annotated[recording.Inspect, tyro.conf.subcommand("inspect")]
    | Annotated[balance.Advise, tyro.conf.subcommand("advise")]
    | Annotated[balance.Compare, tyro.conf.subcommand("compare")]
    | Annotated[serving.Replay, tyro.conf.subcommand("replay")]
    | Annotated[balance.Plan, tyro.conf.subcommand("plan")]
    | Annotated[recording.Convert, tyro.conf.subcommand("convert")]
    | Annotated[recording.Merge, tyro.conf.subcommand("merge")]
    | Annotated[recording.Thin, tyro.conf.subcommand("thin")]
    | Annotated[recording.Synth, tyro.conf.subcommand("synth")]
    | Annotated[serving.ExplainTransfer, tyro.conf.subcommand("explain-transfer")]
    | Annotated[serving.Doctor, tyro.conf.subcommand("doctor")]
    | Annotated[serving.WarmUp, tyro.conf.subcommand("warm-up")]
)

_DESCRIPTION = """Keeps the experts of a Mixture-of-Experts model evenly loaded over the ranks that serve it.

Examples:
  equipoise inspect dump.pt                                   what a recording holds
  equipoise advise dump.pt --gpu h100 --num-nodes 4           what balancing would be worth, and the flags for it
  equipoise serve --model-path demo --ep-size 4 --ep-num-redundant-experts 8 --enable-eplb

`equipoise -V` prints the version, `equipoise COMMAND --help` the options of a command."""


def parse(arguments: Sequence[str]) -> Command:
    """The command with its options.

    Raises:
        InvalidInputError: an option that is unknown, missing or has a value that cannot work.
        SystemExit: ``--help`` was printed (code 0).
    """
    if list(arguments[:1]) == ["doctor"] and not {"-h", "--help"} & set(arguments):
        return serving.Doctor(tuple(arguments[1:]))  # flags of another program, which are not parsed here
    if arguments and not arguments[0].startswith("-") and arguments[0] not in COMMANDS:
        raise unknown_command(arguments[0], COMMANDS)
    reflow_help(COMMANDS.values())
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            command: Command = tyro.cli(
                Command,
                prog="equipoise",
                description=_DESCRIPTION,
                args=list(arguments) or ["--help"],
                config=(
                    tyro.conf.OmitArgPrefixes,
                    tyro.conf.OmitSubcommandPrefixes,
                    tyro.conf.FlagCreatePairsOff,
                    tyro.conf.DisallowNone,
                ),
            )
    except SystemExit as exit_:
        if not exit_.code:
            raise
        raise as_input_error(exit_, said.getvalue(), arguments, COMMANDS) from None
    return command


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line (the process's own if None); returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if list(arguments) in (["--version"], ["-V"]):
        print(f"equipoise {equipoise.__version__}")
        return 0
    try:
        return parse(arguments).run()
    except InvalidInputError as error:
        return _fail(str(naming_the_flag(error)), EXIT_BAD_INPUT)
    except EquipoiseError as error:
        return _fail(str(error), EXIT_FAILURE)
    except KeyboardInterrupt:
        return _fail("interrupted", EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader of a pipe (head, less) left. Python must not complain once more while it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILURE
    except OSError as error:
        return _fail(str(error), EXIT_BAD_INPUT)


def _fail(message: str, code: int) -> int:
    print(f"equipoise: {'error: ' if code != EXIT_INTERRUPTED else ''}{' '.join(message.split())}", file=sys.stderr)
    return code
