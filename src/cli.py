"""The command line: `unispec COMMAND`, or `python -m unispec.cli COMMAND`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import click
from click.exceptions import NoArgsIsHelpError

from unispec.allocator import restart_with_jemalloc
from unispec.commands.compile import compile_graph
from unispec.commands.convert import convert
from unispec.commands.generate import generate
from unispec.commands.serve import serve
from unispec.commands.streams import prepare_streams
from unispec.commands.train import train
from unispec.errors import InputError
from unispec.telemetry import turn_off_telemetry

__all__ = ["main", "unispec"]

INPUT_ERROR_STATUS = 2
INTERRUPTED_STATUS = 130  # 128 + SIGINT, as a shell reports it


class CommandLine(click.Group):
    """A group that reports wrong input as one line on stderr, never as a traceback."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Runs a command and, in standalone mode, exits with its status.

        The status is 0 after success, 2 after wrong input (`click.UsageError` or
        `InputError`), 1 after another `click.ClickException` (output that cannot be written)
        and 130 after Ctrl-C; 141 where the output's reader has gone (`prepare_streams`). Any
        other exception is a defect and propagates.
        """
        arguments = (args, prog_name, complete_var)
        if not standalone_mode:
            return super().main(*arguments, standalone_mode=False, **extra)
        try:
            status = super().main(*arguments, standalone_mode=False, **extra)
        except NoArgsIsHelpError as error:
            error.show()
            sys.exit(INPUT_ERROR_STATUS)
        except click.ClickException as error:
            _fail(error.format_message(), error.exit_code)
        except InputError as error:
            _fail(str(error), INPUT_ERROR_STATUS)
        except (click.Abort, KeyboardInterrupt):
            sys.exit(INTERRUPTED_STATUS)
        sys.exit(status)


def _fail(message: str, status: int) -> NoReturn:
    """Prints a message as one line on stderr and exits."""
    # click would write UTF-8 to a terminal that says it reads ASCII.
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    sys.exit(status)


@click.group(cls=CommandLine, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="unispec")
def unispec() -> None:
    """Speculative decoding as one compiled MAX graph."""


unispec.add_command(compile_graph)
unispec.add_command(convert)
unispec.add_command(generate)
unispec.add_command(serve)
unispec.add_command(train)


def main() -> None:
    """Entry point of the `unispec` script."""
    prepare_streams()
    turn_off_telemetry()
    restart_with_jemalloc()
    unispec(prog_name="unispec")


if __name__ == "__main__":
    main()
