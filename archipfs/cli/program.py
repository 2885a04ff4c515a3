"""How a command line is carried out: every error ends as one line and an exit code.

Exit codes: 0 done, 1 failed, 2 wrong usage. What a signal or a closed pipe ended has the shell's code for that.
"""

import io
import os
import sys
from collections.abc import Sequence

import click

from archipfs.cli.output import printable
from archipfs.errors import FAILED_EXIT_CODE, USAGE_EXIT_CODE, ArchipError, exit_code_of

INTERRUPTED_EXIT_CODE = 130
CLOSED_PIPE_EXIT_CODE = 141


def make_output_safe() -> None:
    """Have what the terminal's encoding lacks printed escaped."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def run_program(command: click.Command, name: str, arguments: Sequence[str]) -> int:
    """Carry out one command line of the program ``name``; the exit code."""
    try:
        code = _invoke(command, name, arguments)
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        _give_up_output()
        return CLOSED_PIPE_EXIT_CODE
    except KeyboardInterrupt:
        return _failed(name, "interrupted", INTERRUPTED_EXIT_CODE)
    except ArchipError as error:
        return _failed(name, str(error), exit_code_of(error))
    except click.UsageError as error:
        return _failed(name, _usage_line(error, name), USAGE_EXIT_CODE)
    except OSError as error:
        if error.filename is None:
            _give_up_output()  # it may be what cannot be written, as on a full disk
        return _failed(name, f"{error.filename or 'cannot go on'}: {error.strerror or error}", FAILED_EXIT_CODE)
    return code


def _give_up_output() -> None:
    """Let what is not printed yet go nowhere, so that the interpreter does not fail on it once more when it ends."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, sys.stdout.fileno())
    os.close(nothing)


def _invoke(command: click.Command, name: str, arguments: Sequence[str]) -> int:
    try:
        with command.make_context(name, list(arguments)) as ctx:
            command.invoke(ctx)
    except click.exceptions.Exit as leaving:
        return leaving.exit_code
    return 0


def _usage_line(error: click.UsageError, name: str) -> str:
    """Click's complaint as our kind of sentence, with where to read more."""
    message = " ".join(error.format_message().split()).rstrip(".?")
    command = error.ctx.command_path if error.ctx is not None else name
    return f"{message[0].lower()}{message[1:]}; see {command} --help"


def _failed(name: str, message: str, code: int) -> int:
    click.echo(f"{name}: {printable(message)}", err=True)
    return code
