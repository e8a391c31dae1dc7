"""What `flash_attn_shim.status()` returns."""

import sys
from dataclasses import dataclass

from flash_attn_shim import adjust, finder, metadata, policy
from flash_attn_shim.adjust import programs, transformers
from flash_attn_shim.adjust.changes import journal
from flash_attn_shim.autoload import ADJUSTED, PRESENTED, gate
from flash_attn_shim.guests import journal as guests


@dataclass(frozen=True)
class Name:
    """A top-level name: does `import name` give the shim's module (`visible`), from which file (None: nothing), and
    why."""

    name: str
    visible: bool
    origin: str | None
    why: str


@dataclass(frozen=True)
class ProgramFlag:
    """A flag that is set in modules whose name ends in `module`, after they are executed (`MTLFLASHATTN_FLAGS`)."""

    module: str
    name: str
    value: object


@dataclass(frozen=True)
class Decision:
    """What a program gets because of what its code shows: `who` (a module, or file and line of a call) and `what`."""

    who: str
    what: str


@dataclass(frozen=True)
class Status:
    """The shim in this process, right now.

    `installed`: the import hook is set. `mode`: "off", "auto" or "on", as `MTLFLASHATTN_SHIM` is read;
    `unknown_mode`: its value if it is none of the known ones. `names`: one `Name` for each presented name.
    `metadata`: why `importlib.metadata` does not see "flash-attn", None if it does. `transformers`: why
    transformers is left alone, None if it is adjusted (or will be, when it is imported). `adjustments`: (module,
    "adjusted", what was set in it, or why it was left alone) of each imported module that is adjusted. `programs`: why
    programs are left alone, None if they are not; `flags`: one `ProgramFlag` for each that the user lists; `decisions`:
    one `Decision` for each module that does not see a name of ours, and for each call that got an older result.
    """

    installed: bool
    mode: str
    unknown_mode: str | None
    names: tuple[Name, ...]
    metadata: str | None
    transformers: str | None
    adjustments: tuple[tuple[str, str], ...]
    programs: str | None
    flags: tuple[ProgramFlag, ...]
    decisions: tuple[Decision, ...]


def status() -> Status:
    env = finder.environment()
    return Status(
        installed=gate in sys.meta_path,
        mode=policy.mode(env),
        unknown_mode=policy.unknown_mode(env),
        names=tuple(Name(name, *finder.locate(name)) for name in PRESENTED),
        metadata=metadata.refusal(),
        transformers=transformers.refusal() or adjust.transformers_left_alone(),
        adjustments=tuple(_adjustments()),
        programs=programs.refusal(),
        flags=tuple(ProgramFlag(flag.module, flag.name, flag.value) for flag in programs.flags()),
        decisions=tuple(_decisions()),
    )


def _decisions():
    for module, reasons in guests.hidden.items():
        for name, why in reasons.items():
            yield Decision(module, f"does not see {name}: {why}")
    for (where, function), what in guests.calls.items():
        yield Decision(where, f"{function} {what}")
    for who, error in guests.failures.items():
        yield Decision(who, f"its source could not be read: {error}")


def _adjustments():
    for name in (*ADJUSTED, *(name for name in journal if name not in ADJUSTED)):
        if name in sys.modules:
            yield name, journal.get(name, "not adjusted")
