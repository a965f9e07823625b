"""The command says what it does: each of its commands has a help with an example, and the examples are real."""

import re
import shlex

import pytest
from fastloss import diagnosis
from fastloss.__main__ import __doc__ as OVERVIEW
from fastloss.__main__ import main

COMMANDS = sorted({line.split()[1] for line in OVERVIEW.splitlines() if line.startswith("    fastloss ")})


def test_commands_are_found():
    assert COMMANDS == ["check", "demo", "info", "plot"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_what_it_does_with_an_example(command, capsys, monkeypatch):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: python -m fastloss {command}")
    assert not re.search(r"^  (-\S+, )?--?\S+( [A-Z_]+)?$(?!\n {10})", text, re.M), "an option without a word"
    description = text.partition("\n\n")[2].partition("\n\n")[0]
    assert len(description.split()) >= 10, description
    example = re.search(rf"example: python -m fastloss ({command}\b.*)\n\Z", text)  # one line, which can be copied
    assert example, text
    words = shlex.split(example[1].partition(">")[0])
    # The example is parsed, up to what would be computed.
    reached = []
    for place in ("demo._run", "diagnosis.command.check", "plot._command.curves", "_library.ops"):
        monkeypatch.setattr(f"fastloss.{place}", Reached(reached))
    with pytest.raises(Reached):
        raise_what_is_reached(words, reached)


class Reached(Exception):
    """In the place of what a command calls after it has read its arguments."""

    def __init__(self, reached):
        self.reached = reached

    def __call__(self, *args, **kwargs):
        self.reached.append(args)
        raise self

    def __getattr__(self, name):
        return self


def raise_what_is_reached(words, reached):
    main(words)
    if reached:
        raise Reached(reached)


def test_kinds_are_listed(capsys):
    with pytest.raises(SystemExit):
        main(["check", "--help"])
    text = capsys.readouterr().out
    assert all(f"  {kind} " in text for kind in diagnosis.KINDS)


@pytest.mark.parametrize("arguments", [[], ["help"], ["-h"], ["--help"]])
def test_overview(arguments, capsys):
    assert main(arguments or ["help"]) == 0
    out = capsys.readouterr().out
    assert all(f"fastloss {command}" in out for command in COMMANDS)


def test_what_is_no_command_is_named(capsys):
    assert main(["chek"]) == 2
    err = capsys.readouterr().err
    assert "no command 'chek'" in err and "fastloss check" in err
    with pytest.raises(SystemExit) as ended:
        main(["info", "--all"])
    assert ended.value.code == 2 and "--all" in capsys.readouterr().err
