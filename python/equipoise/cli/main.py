"""The command line: flags made from the dataclasses in config.py, one class per subcommand.

A subcommand is a frozen dataclass with ``run() -> int``; what it needs is imported there, so that ``--help`` does not
wait for torch. Whatever a person got wrong ends in one line on stderr and exit code 2.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Protocol

import tyro

import equipoise
from equipoise.config import EngineConfig, EplbConfig, HttpConfig, ReplayConfig, ServeConfig
from equipoise.errors import ConfigError, EquipoiseError, InvalidInputError

EXIT_BAD_INPUT = 2
EXIT_FAILURE = 1
EXIT_INTERRUPTED = 130

_DESCRIPTION = """Keeps the experts of a Mixture-of-Experts model evenly loaded over the ranks that serve it.

Examples:
  equipoise serve --model-path demo --ep-size 4 --ep-num-redundant-experts 8 --enable-eplb
  equipoise replay dump.pt --algorithm deepseek --num-ranks 8 --num-redundant-experts 8 --window 8

`equipoise --version` prints the version, `equipoise COMMAND --help` the options of a command."""


class Subcommand(Protocol):
    def run(self) -> int:
        """Does the work; returns the exit code."""


@dataclass(frozen=True)
class Serve:
    """Serve a model over HTTP; experts are recorded, rebalanced and moved while it answers."""

    engine: EngineConfig
    eplb: EplbConfig
    http: HttpConfig

    def run(self) -> int:
        from equipoise.server.launch import serve

        return serve(ServeConfig(self.engine, self.eplb, self.http))


@dataclass(frozen=True)
class Replay:
    """Play recorded load window by window and compare placement algorithms on it."""

    traces: Annotated[
        tyro.conf.Positional[tuple[Path, ...]],
        tyro.conf.arg(metavar="TRACE [TRACE ...]", help_behavior_hint="(at least one)"),
    ]
    """Recorded load: Equipoise's or SGLang's dumps, or .npz token traces."""

    replay: ReplayConfig

    algorithm: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Algorithm to play, may be given several times; all of them if never. An unknown name lists the known ones."""

    json: Path | None = None
    """File that the results are written to as JSON, beside the table on the screen."""

    def run(self) -> int:
        if not self.traces:
            raise ConfigError("replay needs at least one TRACE, got none; see equipoise replay --help", field="traces")
        from rich.console import Console

        from equipoise.algorithms.registry import available_algorithms
        from equipoise.cli.replay import run_replay

        algorithms = list(self.algorithm) or available_algorithms()
        return run_replay(self.replay, list(self.traces), algorithms, self.json, Console())


@dataclass(frozen=True)
class ExplainTransfer:
    """Show what would move between two placements: who sends which expert to whom, in which round."""

    old: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OLD")]
    """Placement of now: JSON or .pt with `physical_to_logical_map`, as GET /eplb/expert_location answers."""

    new: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="NEW")]
    """Placement to reach."""

    num_ranks: int | None = None
    """Ranks the slots are spread over; from OLD if it says so."""

    num_nodes: int | None = None
    """Nodes the ranks form; from OLD if it says so, else 1."""

    max_staged_experts: int | None = None
    """Experts a rank may stage at once; layers that need more move in several steps."""

    layer: int | None = None
    """Show every transfer of this layer, instead of a line per layer."""

    def run(self) -> int:
        from rich.console import Console

        from equipoise.cli.explain_transfer import explain_transfer

        return explain_transfer(
            self.old,
            self.new,
            Console(),
            num_ranks=self.num_ranks,
            num_nodes=self.num_nodes,
            max_staged_experts=self.max_staged_experts,
            layer_id=self.layer,
        )


@dataclass(frozen=True)
class Doctor:
    """Check the flags of another engine's launch for what balancing would run into; exit code 1 if there is any."""

    launch: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="sglang [FLAGS ...]")]
    """The engine, then the flags as they follow `sglang serve`."""

    def run(self) -> int:
        from rich.console import Console

        from equipoise.cli.doctor import run_doctor

        return run_doctor(self.launch, os.environ, Console())


_Command = (
    Annotated[Serve, tyro.conf.subcommand("serve")]
    | Annotated[Replay, tyro.conf.subcommand("replay")]
    | Annotated[ExplainTransfer, tyro.conf.subcommand("explain-transfer")]
    | Annotated[Doctor, tyro.conf.subcommand("doctor")]
)


def parse(arguments: Sequence[str]) -> Subcommand:
    """The subcommand with its options.

    Raises:
        InvalidInputError: an option that is unknown, missing or has a value that cannot work.
        SystemExit: ``--help`` was printed (code 0).
    """
    if list(arguments[:1]) == ["doctor"] and not {"-h", "--help"} & set(arguments):
        return Doctor(tuple(arguments[1:]))  # flags of another program, which are not parsed here
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            command: Subcommand = tyro.cli(
                _Command,
                prog="equipoise",
                description=_DESCRIPTION,
                args=list(arguments),
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
        raise _as_input_error(exit_, said.getvalue(), arguments) from None
    return command


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line (the process's own if None); returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if list(arguments) == ["--version"]:
        print(f"equipoise {equipoise.__version__}")
        return 0
    try:
        return parse(arguments).run()
    except InvalidInputError as error:
        return _fail(str(error), EXIT_BAD_INPUT)
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


def _as_input_error(exit_: SystemExit, said: str, arguments: Sequence[str]) -> InvalidInputError:
    """tyro draws a box around its complaints and hides an exception of ours in the chain; both become one line."""
    cause: BaseException | None = exit_
    while cause is not None:
        if isinstance(cause, InvalidInputError):
            return _naming_the_flag(cause)
        cause = cause.__context__
    command = next((name for name in ("serve", "replay", "explain-transfer", "doctor") if name in arguments[:1]), None)
    where = f"equipoise {command} --help" if command else "equipoise --help"
    return ConfigError(f"{_first_section(said)}; see {where}")


def _naming_the_flag(error: InvalidInputError) -> InvalidInputError:
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
