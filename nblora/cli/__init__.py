"""The `nblora` command. Each module of this folder is one command, its click object named `command`."""

import difflib
import importlib
import pkgutil

import click

from nblora._version import __version__
from nblora.errors import NbloraError

INTERRUPTED = 130  # 128 + SIGINT, as shells have it


class _CommandFolder(click.Group):
    """A group whose commands are the modules of this folder, imported when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        command: click.Command = importlib.import_module(f"{__name__}.{cmd_name}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            near = difflib.get_close_matches(args[0], self.list_commands(ctx), 1)
            if near:
                raise click.UsageError(f"{error.message} Did you mean '{near[0]}'?", ctx) from None
            raise

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except (NbloraError, OSError) as error:
            click.echo(f"nblora: {error}", err=True)
            ctx.exit(2)
        except KeyboardInterrupt:
            click.echo("nblora: interrupted", err=True)
            ctx.exit(INTERRUPTED)


@click.group(cls=_CommandFolder, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="nblora")
def main() -> None:
    """Adapters on pretrained layers, without a deep-learning framework."""
