"""Expected failures: the `vla` command prints them as plain text, without a traceback."""

from dataclasses import dataclass


class SimrealError(Exception):
    """Something that a user can put right. Every expected error of the project derives from it.

    message: what is wrong, with what was expected and what was found.
    code: a stable name such as `OUTPUT_EXISTS`, for programs that read the error.
    remedy: what to do next.
    """

    exit_code = 2

    def __init__(self, message: str, *, code: str = "", remedy: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.remedy = remedy

    def __str__(self) -> str:
        prefix = f"[{self.code}] " if self.code else ""
        suffix = f"\n{self.remedy}" if self.remedy else ""
        return f"{prefix}{self.args[0]}{suffix}"


class ConfigError(SimrealError):
    """A configuration that names an unknown key or option, or gives a value of the wrong type."""


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong; `code` is stable and may be tested for, the rest is for the reader."""

    code: str
    field: str
    expected: str
    found: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.code} at {self.field}: expected {self.expected}, found {self.found}. {self.remedy}"


class CodedError(SimrealError, ValueError):
    """An error that carries one or more faults. Survives pickling, so it may cross processes."""

    def __init__(self, *faults: Fault) -> None:
        first = faults[0]
        super().__init__("\n".join(str(fault) for fault in faults), code=first.code, remedy=first.remedy)
        self.args = faults
        self.faults = faults

    @property
    def codes(self) -> tuple[str, ...]:
        return tuple(fault.code for fault in self.faults)

    def __str__(self) -> str:
        return "\n".join(str(fault) for fault in self.faults)
