"""The command `anygpt`: its subcommands, their help, and what it says of mistakes; `scripts/` are the same, thin."""

import pytest
from training_utils import REPOSITORY, run_forked

from anygpt import commands

THIN = [name for name in commands.COMMANDS if name != "evaluate"]


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as end:
        commands.main(["--help"])
    said = capsys.readouterr().out
    assert end.value.code == 0 and all(f"  {name} " in said for name in commands.COMMANDS)


@pytest.mark.parametrize("name", THIN)
def test_each_command_says_what_it_does(name, capsys):
    with pytest.raises(SystemExit) as end:
        commands.main([name, "--help"])
    assert end.value.code == 0 and capsys.readouterr().out.startswith(f"usage: anygpt {name}")


@pytest.mark.parametrize("name", THIN)
def test_scripts_are_thin(name):
    path = REPOSITORY / "scripts" / f"{name.replace('-', '_')}.py"
    assert len(path.read_text().splitlines()) <= 6 and f'run("{name}")' in path.read_text()


def test_mistakes_are_one_line(capsys):
    with pytest.raises(SystemExit) as end:
        commands.main(["juggle"])
    assert end.value.code == 2 and "choose from 'chat'" in capsys.readouterr().err
    assert commands.main(["chat", "--checkpoint", "nowhere"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: nowhere does not exist") and said.count("\n") == 1


def test_as_a_module_and_from_a_pipe_that_closes():
    done = run_forked("-m", "anygpt", "validate-data", "nowhere.jsonl")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr
