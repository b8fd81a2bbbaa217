"""Every command explains itself, and a wrong call is an error."""

import pytest
from click.testing import CliRunner

import nblora
from nblora.cli import main

COMMANDS = main.list_commands(None)


def test_the_commands_that_the_readme_names_are_there():
    assert {"demo", "info"} <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_names_each_option_with_a_sentence(command):
    result = CliRunner().invoke(main, [command, "--help"])
    assert result.exit_code == 0
    assert f"Usage: main {command}" in result.output
    for parameter in main.get_command(None, command).params:
        if parameter.param_type_name == "option":
            assert parameter.help, f"{command} {parameter.opts[0]} has no help text"


def test_help_of_nblora_lists_every_command():
    result = CliRunner().invoke(main, ["--help"])
    assert result.exit_code == 0
    for command in COMMANDS:
        assert f"  {command} " in result.output


def test_version():
    result = CliRunner().invoke(main, ["--version"])
    assert result.output == f"nblora, version {nblora.__version__}\n"


def test_an_unknown_command_is_an_error():
    result = CliRunner().invoke(main, ["no-such-command"])
    assert result.exit_code == 2
    assert "No such command" in result.output


def test_an_unknown_option_is_an_error():
    result = CliRunner().invoke(main, ["info", "--no-such-option"])
    assert result.exit_code == 2
    assert "No such option" in result.output


@pytest.mark.parametrize(
    ("typed", "meant"), [("merg", "merge"), ("plto", "plot"), ("comapre", "compare"), ("xyz", None)]
)
def test_a_misspelt_command_is_answered_with_the_one_that_was_meant(typed, meant):
    result = CliRunner().invoke(main, [typed])
    assert result.exit_code == 2
    assert result.stderr.endswith(f"No such command '{typed}'." + (f" Did you mean '{meant}'?\n" if meant else "\n"))
