"""The command line in this process, put together once: what a command says, and what a wrong one says."""

from functools import cache

from plait.__main__ import app
from typer import testing
from typer.main import get_command

testing._get_command = cache(get_command)  # every invocation would put all commands together anew


def run(*args: object, stdin: str | bytes | None = None) -> testing.Result:
    """One command; anything but an exit is a bug."""
    result = testing.CliRunner().invoke(app, [str(a) for a in args], input=stdin)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def good(*args: object, stdin: str | bytes | None = None) -> testing.Result:
    result = run(*args, stdin=stdin)
    assert result.exit_code == 0, result.stderr
    return result


def said(*args: object, stdin: str | bytes | None = None) -> str:
    """What a good command leaves on stdout."""
    return good(*args, stdin=stdin).stdout


def bad(*args: object, stdin: str | bytes | None = None) -> str:
    """The message of a user's error: exit code 1, nothing on stdout, no traceback, one screen."""
    result = run(*args, stdin=stdin)
    assert (result.exit_code, result.stdout) == (1, ""), result.output
    assert result.stderr.startswith("plait: error: ") and "Traceback" not in result.stderr
    assert len(result.stderr.splitlines()) < 50
    return result.stderr


def wrong(*args: object) -> str:
    """The message of wrong usage: exit code 2, nothing on stdout."""
    result = run(*args)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    return result.stderr
