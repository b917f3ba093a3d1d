"""Dataclasses as configuration schemas: reading plain data strictly, writing it back, listing the options.

Understood field types: `bool int float str Path`, `Literal[...]`, `X | None` and other unions, `list[X]`,
`tuple[X, ...]`, `tuple[X, Y]`, `dict[str, X]`, `Any` and nested dataclasses, frozen or not. In place of a list or a
`tuple[X, ...]` a text may stand alone: it is the only item. A mapping with a `_target_: package.module.Class` is
read as that dataclass, which must be a subclass of the field's declared type; so a field declared as a base class
takes whichever component its YAML file names.

The description of an option is its `name: text` entry in the docstring of its class. A field whose name would be a word
of Python ends in an underscore, which its option has not: `from_` is the option `from`.
"""

import importlib
import inspect
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from vla.errors import ConfigError

T = TypeVar("T")
TARGET = "_target_"
REQUIRED = "???"  # Hydra's mark for a value that must be given


@dataclass(frozen=True)
class Option:
    """One configurable value.

    key: dotted name, as written on the command line.
    type: readable type.
    default: present value, `REQUIRED` if there is none.
    doc: its text in the docstring of its class.
    """

    key: str
    type: str
    default: Any
    doc: str


def read(schema: type[T], data: Mapping[str, Any]) -> T:
    """`data` as an instance of the dataclass `schema`; every problem is named in one `ConfigError`."""
    problems: list[str] = []
    value = _read_dataclass(schema, data, "", problems)
    if problems:
        raise ConfigError("\n".join(problems), code="CONFIG")
    return value


def write(config: Any) -> dict[str, Any]:
    """The plain data (JSON and YAML) that `read` turns back into the dataclass instance `config`."""
    hints = get_type_hints(type(config))
    names = [field.name for field in _init_fields(config)]
    return {option_name(name): _write_value(getattr(config, name), hints[name]) for name in names}


def fill(schema: type, data: Mapping[str, Any]) -> dict[str, Any]:
    """`data` with the defaults of `schema` added, for interpolations to see; unknown keys stay for `read`."""
    filled: dict[str, Any] = dict(data)
    for name, hint, default in _declared(schema):
        if name not in filled:
            filled[name] = default
        if isinstance(filled[name], Mapping) and (component := component_class(hint, filled[name])):
            filled[name] = fill(component, filled[name])
    return filled


def listing(schema: type, data: Mapping[str, Any], prefix: str = "") -> Iterator[Option]:
    """Every option of `schema`, with the values of `data` (filled) as defaults."""
    docs = option_docs(schema)
    for name, hint, default in _declared(schema):
        value = data.get(name, default)
        nested = component_class(hint, value) if isinstance(value, Mapping) else None
        if nested:
            yield from listing(nested, value, f"{prefix}{name}.")
        else:
            yield Option(prefix + name, type_name(hint), value, docs.get(name, ""))


def option_docs(schema: type) -> dict[str, str]:
    """The `name: text` entries of the class docstring, one per line or separated by `;`; base classes too."""
    docs: dict[str, str] = {}
    for cls in reversed(schema.__mro__):
        names = [option_name(field.name) for field in fields(cls)] if is_dataclass(cls) else []
        if not names:
            continue
        entry = re.compile(rf"(?:^|\n|;)\s*({'|'.join(names)}): ")
        for paragraph in re.split(r"\n\s*\n", cls.__doc__ or ""):
            pieces = entry.split(paragraph)[1:]
            for name, text in zip(pieces[::2], pieces[1::2], strict=True):
                docs[name] = " ".join(text.split())
    return docs


def nearest(name: str, valid: Sequence[str]) -> str:
    """A hint for an unknown name: the nearest valid one, or all of them."""
    leaf = name.rpartition(".")[2]
    leaves = {key.rpartition(".")[2]: key for key in valid}
    if close := get_close_matches(name, valid, n=1):
        return f"did you mean '{close[0]}'?"
    if close := get_close_matches(leaf, list(leaves), n=1):
        return f"did you mean '{leaves[close[0]]}'?"
    return "valid names: " + ", ".join(sorted(valid))


def aliases(schema: type) -> dict[str, str]:
    """Names under which an option may be looked for, its field's metadata `also`, -> the option and its meaning."""
    docs = option_docs(schema)
    return {
        name: f"'{option_name(field.name)}' ({docs.get(option_name(field.name), '').rstrip('.')})"
        for field in _init_fields(schema)
        for name in field.metadata.get("also", ())
    }


def component_class(hint: Any, data: Mapping[str, Any]) -> type | None:
    """The dataclass that `data` is to be read as, or None for a plain dictionary."""
    members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    declared = tuple(member for member in members if isinstance(member, type) and is_dataclass(member))
    if TARGET not in data:
        return declared[0] if declared else None
    found = import_dataclass(str(data[TARGET]))
    if declared and not issubclass(found, declared):
        raise ConfigError(f"{TARGET}: {data[TARGET]} is not a kind of {type_name(hint)}", code="CONFIG")
    return found


def type_name(hint: Any) -> str:
    """A type as written in the help: `int`, `'token' | 'action'`, `str | null`, `list[int]`."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is type(None):
        return "null"
    if origin is Literal:
        return " | ".join(repr(choice) for choice in args)
    if origin in (Union, types.UnionType):
        return " | ".join(type_name(arg) for arg in args)
    if origin is not None:
        return f"{origin.__name__}[{', '.join('...' if arg is ... else type_name(arg) for arg in args)}]"
    if hint is Path:
        return "path"
    return "anything" if hint is Any else getattr(hint, "__name__", str(hint))


def option_name(field: str) -> str:
    """How the option of a dataclass's field is called."""
    return field.removesuffix("_")


def _init_fields(schema: Any) -> list[Any]:
    return [field for field in fields(schema) if field.init]


def _declared(schema: type) -> Iterator[tuple[str, Any, Any]]:
    """Option's name, type and plain default (`REQUIRED` if none) of each field that the constructor takes."""
    hints = get_type_hints(schema)
    for field in _init_fields(schema):
        default: Any = REQUIRED
        if field.default is not MISSING:
            default = field.default
        elif field.default_factory is not MISSING:
            default = field.default_factory()
        yield option_name(field.name), hints[field.name], _write_value(default, hints[field.name])


def _write_value(value: Any, hint: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        implied = component_class(hint, {})
        name = f"{type(value).__module__}.{type(value).__qualname__}"
        return ({} if type(value) is implied else {TARGET: name}) | write(value)
    if isinstance(value, Mapping):
        inner = get_args(hint)[1] if get_origin(hint) is dict else Any
        return {str(key): _write_value(item, inner) for key, item in value.items()}
    if isinstance(value, list | tuple):
        inner = get_args(hint)[0] if get_origin(hint) in (list, tuple) else Any
        return [_write_value(item, inner) for item in value]
    return str(value) if isinstance(value, Path) else value


def import_dataclass(target: str) -> type:
    """The dataclass that `package.module.Class` names."""
    module, _, name = target.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        remedy = "Correct the name, install its package, or put its folder on PYTHONPATH."
        raise ConfigError(f"{target} can't be imported ({error})", code="CONFIG", remedy=remedy) from error
    if not (isinstance(found, type) and is_dataclass(found)):
        raise ConfigError(f"{target} is not a dataclass", code="CONFIG")
    return found


def _read_dataclass(schema: type, data: Mapping[str, Any], path: str, problems: list[str]) -> Any:
    if inspect.isabstract(schema):
        problems.append(f"'{path}{TARGET}' is required: name the {schema.__name__} as {TARGET}: package.module.Class")
        return None
    values: dict[str, Any] = {}
    declared = {name: (hint, default) for name, hint, default in _declared(schema)}
    docs = option_docs(schema)
    before = len(problems)
    for key in data:
        if key not in declared and key != TARGET:
            hint = nearest(f"{path}{key}", [path + name for name in declared])
            problems.append(f"unknown key '{path}{key}': {hint}")
    for name, (hint, default) in declared.items():
        value = data.get(name, default)
        if isinstance(value, str) and value == REQUIRED:
            about = f" ({docs[name]})" if name in docs else ""
            problems.append(f"'{path}{name}' is required{about}: give {path}{name}=VALUE")
        else:
            values[name] = _read_value(hint, value, f"{path}{name}", problems)
    if len(problems) > before:
        return None
    try:
        return schema(**{field.name: values[option_name(field.name)] for field in _init_fields(schema)})
    except ValueError as error:  # raised by __post_init__
        problems.append(f"{path.rstrip('.') or schema.__name__}: {error}")
        return None


def _read_value(hint: Any, value: Any, path: str, problems: list[str]) -> Any:
    """`value` as the type `hint`; where that would lose or invent anything, a problem is appended."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _read_union(hint, value, path, problems)
    if isinstance(value, Mapping) and (component := component_class(hint, value)):
        return _read_dataclass(component, value, f"{path}.", problems)
    if hint is Any or (hint is type(None) and value is None):
        return value
    if origin is Literal:
        if any(value == choice and type(value) is type(choice) for choice in args):
            return value
        suggestion = nearest(str(value), [str(choice) for choice in args])
        problems.append(f"'{path}': expected {type_name(hint)}, found {value!r}; {suggestion}")
        return None
    if isinstance(value, str) and (origin is list or (origin is tuple and args[-1] is ...)):
        value = [value]  # images=A.png stands for images=[A.png]
    if origin in (list, tuple) and isinstance(value, list | tuple):
        items = [args[0]] * len(value) if origin is list or args[-1] is ... else list(args)
        if len(items) == len(value):
            pairs = enumerate(zip(items, value, strict=True))
            return origin([_read_value(item, part, f"{path}[{i}]", problems) for i, (item, part) in pairs])
    elif origin is dict and isinstance(value, Mapping):
        return {key: _read_value(args[1], item, f"{path}.{key}", problems) for key, item in value.items()}
    elif isinstance(hint, type) and (scalar := _read_scalar(hint, value)) is not None:
        return scalar
    problems.append(f"'{path}': expected {type_name(hint)}, found {value!r}")
    return None


def _read_union(hint: Any, value: Any, path: str, problems: list[str]) -> Any:
    """The first member of the union that takes `value`, members of its very type first."""
    refusals: list[str] = []
    for member in sorted(get_args(hint), key=lambda member: member is not type(value)):
        attempt: list[str] = []
        result = _read_value(member, value, path, attempt)
        if not attempt:
            return result
        if component_class(member, {}) and isinstance(value, Mapping):
            refusals += attempt
    problems.extend(refusals or [f"'{path}': expected {type_name(hint)}, found {value!r}"])
    return None


def _read_scalar(hint: type, value: Any) -> Any:
    """`value` as bool, int, float, str or Path where that is exact, else None."""
    if isinstance(value, bool) or hint is bool:
        return value if hint is bool and isinstance(value, bool) else None
    if hint is int and isinstance(value, float) and value.is_integer():  # 1e6
        return int(value)
    if hint is float and isinstance(value, int):
        return float(value)
    if hint in (str, Path) and isinstance(value, int):  # a folder may be called 7
        return hint(str(value))
    if hint is Path and isinstance(value, str):
        return Path(value)
    return value if isinstance(value, hint) else None
