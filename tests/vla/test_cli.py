"""The `vla` command: help, refusals, exit codes, and every registered subcommand."""

import ast
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points

import pytest

from vla import cli, configuration, options
from vla.errors import SimrealError

HEAVY = ("torch", "ray", "mujoco", "transformers", "training", "deployment", "calibration")
REGISTERED = sorted(entry_points(group=cli.GROUP), key=lambda entry: entry.name)


@dataclass(frozen=True)
class GreetConfig:
    """name: who is greeted; times: how often."""

    name: str
    times: int = 1
    loud: bool = False


def greet(config: GreetConfig) -> int:
    if config.name == "nobody":
        raise SimrealError("there is nobody to greet", code="NOBODY", remedy="Give another name=...")
    if config.name == "bug":
        raise RuntimeError("unexpected")
    print(f"hello {config.name}{'!' if config.loud else ''} " * config.times)
    return 3


command = cli.Command(name="greet", help="Greet someone.", schema=GreetConfig, run=greet, subject="name")


@pytest.fixture
def greeting(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("greet", f"{__name__}:command", cli.GROUP)
    gone = EntryPoint("gone", "no_such_module.part:command", cli.GROUP)
    monkeypatch.setattr(cli, "entry_points", lambda group: (entry, gone) if group == cli.GROUP else ())
    monkeypatch.setattr(EntryPoint, "load", lambda self: command if self is entry else load_entry(self))
    monkeypatch.delenv("VLA_DEBUG", raising=False)


load_entry = EntryPoint.load


@pytest.mark.usefixtures("greeting")
class TestGreeting:
    def test_run_gets_the_typed_configuration(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["greet", "name=world", "times=2", "--loud"]) == 3
        assert capsys.readouterr().out.strip() == "hello world! hello world!"

    def test_a_word_alone_is_the_subject(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["greet", "world", "--loud"]) == 3
        assert capsys.readouterr().out.strip() == "hello world!"

    def test_expected_errors_are_text_with_exit_code_2(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["greet", "name=nobody"]) == 2
        captured = capsys.readouterr()
        assert captured.err == "vla: [NOBODY] there is nobody to greet\nGive another name=...\n"
        assert captured.out == ""

    def test_debug_shows_the_traceback(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("VLA_DEBUG", "1")
        with pytest.raises(SimrealError, match="nobody to greet"):
            cli.main(["greet", "name=nobody"])

    def test_unexpected_errors_are_not_hidden(self) -> None:
        with pytest.raises(RuntimeError, match="unexpected"):
            cli.main(["greet", "name=bug"])

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["great"], "unknown subcommand 'great': did you mean 'greet'?"),
            (["greet", "nmae=x"], "unknown key 'nmae': did you mean 'name'?"),
            (["greet", "name=x", "times=x"], "'times': expected int, found 'x'"),
            (["greet"], "'name' is required (who is greeted): give name=VALUE"),
            (["gone"], "needs the Python module 'no_such_module'"),
        ],
    )
    def test_refusals(self, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(arguments) == 2
        assert message in capsys.readouterr().err

    def test_help_lists_types_defaults_and_texts(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["greet", "times=5", "--help"]) == 0
        text = capsys.readouterr().out
        assert text.startswith("usage: vla greet NAME [key=value ...]\n")
        assert "Greet someone." in text and "name: str required\n      who is greeted" in text
        assert "times: int = 5\n      how often." in text and "loud: bool = false" in text


def test_overview_names_every_subcommand_and_imports_none() -> None:
    program = f"""if True:
        import sys, vla.cli
        vla.cli.main(["--help"])
        print([name for name in {HEAVY} if name in sys.modules])
    """
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    *lines, imported = result.stdout.splitlines()
    assert ast.literal_eval(imported) == []
    listed = lines[lines.index("subcommands:") + 1 :]
    assert [line.split()[0] for line in listed] == [entry.name for entry in REGISTERED]
    assert any(line.endswith("name the command that installs each missing part.") for line in listed)


def test_the_console_script_prints_no_traceback() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "vla", "doctor", "quik=true"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert result.stderr == "vla: [CONFIG] unknown key 'quik': did you mean 'quick'?\n"


@pytest.mark.parametrize("entry", REGISTERED, ids=lambda entry: entry.name)
def test_every_registered_subcommand_composes_and_explains_its_options(entry: EntryPoint) -> None:
    found = entry.load()
    assert isinstance(found, cli.Command) and found.name == entry.name and found.help
    data = configuration.compose_data(found.schema, found.config_name)
    unexplained = [option.key for option in options.listing(found.schema, data) if not option.doc]
    assert not unexplained, f"no text in the class docstring for {unexplained}"
