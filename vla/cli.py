"""The `vla` command: `vla SUBCOMMAND key=value ...`.

How a package adds a subcommand:

1. In its module, a dataclass for the options (its class docstring has a `name: text` line per field, which
   the help prints), a function that takes an instance of it, and the two tied together:

       @dataclass(frozen=True)
       class TrainConfig:
           \"\"\"Options of `vla train`.

           seed: seed of the whole run.
           \"\"\"

           seed: int = 0

       def train(config: TrainConfig) -> None: ...

       command = Command(
           name="train", help="Improve a policy by PPO.", schema=TrainConfig, config_name="train", run=train
       )

2. In pyproject.toml, under `[project.entry-points."simreal.commands"]`: `train = "training.train:command"`.

`config_name` names `configs/train.yaml`; leave it out for a command that needs no file. `run` returns None or
an exit code. Expected failures derive from `vla.errors.SimrealError`: they are printed as text and end with
exit code 2. This module imports no other package of the project until a subcommand is called: the list of
subcommands reads their `help` from the source.
"""

import ast
import importlib.util
import os
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from vla import configuration, options
from vla.errors import SimrealError

GROUP = "simreal.commands"
USAGE = """usage: vla SUBCOMMAND [key=value ...]
       vla SUBCOMMAND --help    every option with its type and default
"""


@dataclass(frozen=True)
class Command:
    """A subcommand.

    name: what is typed after `vla`.
    help: one line, a plain string literal.
    schema: dataclass of its options.
    run: called with an instance of `schema`; returns an exit code, None for 0.
    config_name: primary YAML file in `configs/`, None if the dataclass is all there is.
    subject: option that a word without `=` gives, as in `vla top RUN`; None if each has to be named. Several words
        are a list.
    base: the options that `from=FOLDER` takes in place of those of the YAML files; None if there is no such option.
    """

    name: str
    help: str
    schema: type
    run: Callable[[Any], int | None]
    config_name: str | None = None
    subject: str | None = None
    base: Callable[[Path], Mapping[str, Any]] | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _dispatch(arguments)
    except SimrealError as error:
        if os.environ.get("VLA_DEBUG") == "1":
            raise
        print(f"vla: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # `vla ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("vla: interrupted", file=sys.stderr)
        return 130


def _dispatch(arguments: list[str]) -> int:
    registered = {entry.name: entry for entry in entry_points(group=GROUP)}
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview(registered))
        return 0
    name, *rest = arguments
    if name not in registered:
        hint = options.nearest(name, list(registered)) if registered else "none is installed: `make setup`"
        raise SimrealError(f"unknown subcommand '{name}': {hint}", code="COMMAND")
    command = _load(registered[name])
    given = [text for text in rest if text not in ("-h", "--help")]
    overrides = _overrides(given, command.subject)
    folders = [text.partition("=")[2] for text in overrides if text.startswith("from=")]
    base = command.base(Path(folders[-1])) if command.base and folders else None
    if len(given) < len(rest):
        print(_command_help(command, overrides, base))
        return 0
    return command.run(configuration.load(command.schema, command.config_name, overrides, base=base)) or 0


def _load(entry: EntryPoint) -> Command:
    try:
        command = entry.load()
    except ModuleNotFoundError as error:
        raise SimrealError(
            f"'vla {entry.name}' needs the Python module '{error.name}', which is not installed",
            code="MISSING_MODULE",
            remedy="`vla doctor` names the command that installs each optional part.",
        ) from error
    if not isinstance(command, Command):
        raise TypeError(f"entry point {entry.name} = {entry.value} is not a vla.cli.Command")
    return command


def _overrides(texts: Sequence[str], subject: str | None) -> list[str]:
    """A word alone is the subject, several are a list of them; the others as they are meant."""
    words = [text for text in texts if subject is not None and "=" not in text and not text.startswith("--")]
    found = [_as_override(text) for text in texts if text not in words]
    if len(words) > 1:
        quoted = ",".join("'" + word.replace("'", "\\'") + "'" for word in words)
        return [f"{subject}=[{quoted}]", *found]
    return [*(f"{subject}={word}" for word in words), *found]


def _as_override(text: str) -> str:
    """`--json` is short for `json=true`, `--out=FILE` for `out=FILE`."""
    if not text.startswith("--"):
        return text
    key, equals, value = text[2:].partition("=")
    return f"{key.replace('-', '_')}={value if equals else 'true'}"


def _overview(registered: dict[str, EntryPoint]) -> str:
    width = max((len(name) for name in registered), default=0)
    lines = [f"  {name:<{width}}  {_help_line(entry)}" for name, entry in sorted(registered.items())]
    return "\n".join([USAGE, "subcommands:", *lines])


def _help_line(entry: EntryPoint) -> str:
    """The `help` of the module's `Command(...)`, read from its source: an import would load simulators."""
    package, *parts = entry.module.split(".")
    spec = importlib.util.find_spec(package)  # of a submodule it would import the package
    folders = spec.submodule_search_locations if spec else None
    source = Path(*folders, *parts).with_suffix(".py") if folders else Path("absent")
    if not source.is_file():
        return "(not installed)"
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Command":
            for keyword in node.keywords:
                if keyword.arg == "help":
                    return str(ast.literal_eval(keyword.value))
    return ""


def _command_help(command: Command, overrides: Sequence[str], base: Mapping[str, Any] | None) -> str:
    subject = f"{command.subject.upper()} " if command.subject else ""
    lines = [f"usage: vla {command.name} {subject}[key=value ...]", "", command.help, ""]
    data = configuration.compose_data(command.schema, command.config_name, overrides, base=base)
    if command.config_name:
        folder = configuration.config_folder()
        groups = configuration.available_groups(folder, command.schema)
        groups["experiment"] = configuration.experiments(folder, command.schema)
        lines.append("groups (group=file):")
        lines += [f"  {group}: {', '.join(files)}" for group, files in sorted(groups.items()) if files]
        lines.append("")
    lines.append("options (key: type = default):")
    for option in options.listing(command.schema, data):
        default = "required" if option.default == options.REQUIRED else f"= {_plain(option.default)}"
        lines.append(f"  {option.key}: {option.type} {default}")
        lines += textwrap.wrap(option.doc, 110, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def _plain(value: Any) -> str:
    """A value as it is typed on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)
