"""Standard streams that are closed, full, left by their reader, or poor in characters."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = r'''
import sys
from contextlib import redirect_stdout
import click
from rich.console import Console
from unispec import cli
from unispec.commands.console import Answers

@cli.unispec.command()
@click.option("--json", is_flag=True)
@click.option("--lines", default=1)
def answer(json, lines):
    """Writes as `generate` does: answers, progress, and one JSON object."""
    terminal, answers = Console(stderr=True), Answers(["prompt"], sys.stdout)
    with redirect_stdout(sys.stderr):
        print("a library speaks")
        terminal.print("begin \u00e9 \u2500")
        for _ in range(0 if json else lines):
            answers.add(0, "w\u00f6rld \u65e5\u672c\n")
    if json:
        click.echo("{}")
    terminal.print("end")

cli.main()
'''
FULL = "error: the output cannot be written (No space left on device); free space or send it"


def shell(
    command: str, stdout: int = subprocess.PIPE, **environment: str
) -> subprocess.CompletedProcess[bytes]:
    """Runs a line of bash in which `unispec` is the command line, with `answer` beside it."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("LC_")}
    return subprocess.run(
        ["bash", "-c", f'unispec() {{ "{sys.executable}" -c "$SCRIPT" "$@"; }}; {command}'],
        env=inherited | {"LC_ALL": "C.UTF-8", "SCRIPT": SCRIPT} | environment,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.PIPE,
    )


@pytest.mark.parametrize(
    ("environment", "answer", "progress"),
    [
        ({}, "wörld 日本\n".encode(), "begin é ─\n".encode()),
        ({"PYTHONIOENCODING": "latin-1"}, "wörld ??\n".encode("latin-1"), b"begin \xe9 \\u2500\n"),
        ({"PYTHONIOENCODING": "ascii"}, b"w?rld ??\n", b"begin \\xe9 \\u2500\n"),
        (
            {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
            b"w?rld ??\n",
            b"begin \\xe9 \\u2500\n",
        ),
        (
            {"PYTHONIOENCODING": "ascii:xmlcharrefreplace"},
            b"w&#246;rld &#26085;&#26412;\n",
            b"begin \\xe9 \\u2500\n",
        ),
    ],
)
def test_what_the_encoding_lacks_is_replaced(
    environment: dict[str, str], answer: bytes, progress: bytes
) -> None:
    done = shell("unispec answer", **environment)
    assert (done.returncode, done.stdout) == (0, answer)
    assert done.stderr == b"a library speaks\n" + progress + b"end\n"


def test_an_error_is_written_in_the_encoding_of_its_stream() -> None:
    command = "unispec generate --model m --prompt-file nö"
    for encoding, shown in (("utf-8", "nö".encode()), ("latin-1", b"n\xf6"), ("ascii", b"n\\xf6")):
        done = shell(command, PYTHONIOENCODING=encoding)
        assert (done.returncode, done.stdout) == (2, b"")
        assert b"cannot read '" + shown + b"'" in done.stderr
        assert len(done.stderr.splitlines()) == 1


COMMANDS = (
    "answer",
    "answer --json",
    "--help",
    "--version",
    "generate --help",
    "train --help",
)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk_is_one_sentence(command: str) -> None:
    done = shell(f"unispec {command} > /dev/full")
    assert done.returncode == 1
    assert done.stderr.decode().splitlines()[-1].startswith(FULL)
    assert b"Traceback" not in done.stderr
    assert b"Exception" not in done.stderr


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("redirect", ["", "2>&1"])
def test_a_reader_that_has_gone_ends_the_command_in_silence(command: str, redirect: str) -> None:
    """As SIGPIPE ends other commands, 128 + 13."""
    reader, writer = os.pipe()
    os.close(reader)
    done = shell(f"unispec {command} {redirect}", stdout=writer)
    os.close(writer)
    assert done.returncode == 141
    assert set(done.stderr.decode().splitlines()) <= {"a library speaks", "begin é ─"}


def test_a_reader_gets_what_it_asks_for() -> None:
    done = shell("unispec answer --lines 100000 2> /dev/null | head -n 1; exit ${PIPESTATUS[0]}")
    assert (done.returncode, done.stdout.decode(), done.stderr) == (141, "wörld 日本\n", b"")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("closed", [">&-", "<&- >&-", "<&- >&- 2>&-"])
def test_a_closed_output_is_the_null_device(command: str, closed: str) -> None:
    done = shell(f"unispec {command} {closed}")
    assert done.returncode == 0
    speaks = command.startswith("answer") and "2>" not in closed
    said = "a library speaks\nbegin é ─\nend\n" if speaks else ""
    assert (done.stdout, done.stderr.decode()) == (b"", said)


@pytest.mark.parametrize("errors", ["2>&-", "2>/dev/full"])
def test_progress_that_nobody_can_read_does_not_cost_the_answer(errors: str) -> None:
    done = shell(f"unispec answer {errors}")
    assert (done.returncode, done.stdout.decode(), done.stderr) == (0, "wörld 日本\n", b"")
    wrong = shell(f"unispec generate --model m --prompt-file nowhere {errors}")
    assert (wrong.returncode, wrong.stdout, wrong.stderr) == (2, b"", b"")


def test_a_closed_input_is_an_empty_one() -> None:
    done = shell("unispec generate --model m <&-")
    assert done.returncode == 2
    assert done.stderr.startswith(b"error: no prompt; give --prompt TEXT")


def test_a_file_that_is_opened_later_does_not_become_the_output(tmp_path: Path) -> None:
    """With closed streams it would get their numbers, and what a library prints."""
    script = (
        "import os; from unispec.commands.streams import prepare_streams; prepare_streams();"
        f" file = open({str(tmp_path / 'file')!r}, 'w'); os.write(1, b'x'); os.write(2, b'x');"
        " assert file.fileno() > 2; import subprocess; subprocess.run(['echo', 'x'], check=True)"
    )
    done = subprocess.run(
        ["bash", "-c", 'exec "$0" -c "$1" <&- >&- 2>&-', sys.executable, script],
        env=dict(os.environ),
    )
    assert done.returncode == 0
    assert (tmp_path / "file").read_bytes() == b""


def test_a_pipe_that_is_full_and_does_not_block_is_waited_for() -> None:
    """Some programs leave a pipe or terminal that they share in this mode."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, "answer", "--lines", "20000"],
        env=dict(os.environ) | {"LC_ALL": "C.UTF-8"},
        stdout=writer,
        stderr=subprocess.PIPE,
    ) as process:
        os.close(writer)
        with os.fdopen(reader, "rb") as stream:
            assert stream.read().decode() == "wörld 日本\n" * 20_000
        assert process.stderr is not None
        assert b"Traceback" not in process.stderr.read()
    assert process.returncode == 0
