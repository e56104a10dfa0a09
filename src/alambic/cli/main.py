"""The `alambic` command: a lazy group, one file per subcommand, errors turned into exit codes.

Exit codes: 0 done, 1 failed, 2 misused, 3 budget missed.
"""

from __future__ import annotations

import importlib
import os
import sys

import click

from alambic import __version__

# Command -> one line of help. The module of the same name is imported only when the command is used.
COMMANDS = {
    "new": "Write a first task file and example data.",
    "check": "Validate a task and audit its data.",
    "label": "Annotate texts in a local page, the most useful first.",
    "build": "Build the smallest model that meets the budget.",
    "measure": "Measure a bundle on labelled data, on this machine.",
    "predict": "Predict the labels of texts, or write the answers.",
    "chat": "Talk with a bundle that writes, in the terminal.",
    "serve": "Answer over HTTP, with a page to try.",
    "show": "Show what a bundle or a run holds.",
    "verify": "Check every byte of a bundle and its golden predictions.",
    "bases": "List, show or fetch base models.",
    "compare": "Measure several bundles on one data file, interleaved.",
    "pretrain": "Train a model of your own from raw text.",
    "distil": "Teach an encoder a further language.",
    "export": "Export a bundle to ONNX, Hugging Face or a single file.",
    "doctor": "Say what this machine and this installation can do.",
}


class LazyGroup(click.Group):
    """A group that imports a command's module when the command is used, so that help stays fast."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands in the order of `COMMANDS`."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Import and return the command `name`."""
        if name not in COMMANDS:
            return None
        command: click.Command = getattr(importlib.import_module(f"alambic.cli.{name}"), name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command, or fail with the nearest one."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            from alambic.errors import nearest

            ctx.fail(f"no command {args[0]!r}; {nearest(args[0], COMMANDS)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, "-V", "--version", prog_name="alambic")
def cli() -> None:
    """Distil a task into a small language model that runs on the CPU you have.

    \b
    alambic new tickets          write a first task
    alambic build tickets/task.toml
    alambic predict runs/tickets/bundle "my washing machine shows E18"
    """  # noqa: D301


def main(argv: list[str] | None = None) -> None:
    """Run the command line and exit."""
    try:
        code = cli.main(args=argv, prog_name="alambic", standalone_mode=False)
    except click.exceptions.Abort:
        click.echo("interrupted", err=True)
        code = 130
    except click.ClickException as error:
        error.show()
        code = 2
    except BrokenPipeError:
        _close_stdout()
        code = 1
    except Exception as error:  # the edge of the program: anything else is a bug and keeps its traceback
        code = _explain(error)
    sys.exit(code if isinstance(code, int) else 0)


def _explain(error: Exception) -> int:
    from alambic import _extras
    from alambic.errors import AlambicError

    if isinstance(error, ModuleNotFoundError):
        error = _extras.missing(error) or error
    if not isinstance(error, AlambicError):
        raise error
    click.secho("error: ", fg="red", bold=True, err=True, nl=False)
    click.echo(str(error), err=True)
    return error.exit_code


def _close_stdout() -> None:
    """Keep Python from writing to a closed pipe at exit."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, sys.stdout.fileno())


if __name__ == "__main__":
    main()
