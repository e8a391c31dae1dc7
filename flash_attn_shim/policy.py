"""May a presented name be visible here? Pure functions of an `Environment`, so that tests on Linux can act as a Mac."""

from __future__ import annotations

TYPE_CHECKING = False  # typing itself is not imported here
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

#: The release of flash-attn whose interface is presented: `flash_attn.__version__` and the announced metadata.
FLASH_ATTN_VERSION = "2.8.3"

OFF = ("off", "0", "false", "no")

SWITCH = "MTLFLASHATTN_SHIM"
MODULES = "MTLFLASHATTN_SHIM_MODULES"
TRANSFORMERS = "MTLFLASHATTN_TRANSFORMERS"
FLAGS = "MTLFLASHATTN_FLAGS"
HIDE = "MTLFLASHATTN_HIDE"


class Environment:
    """What the decision depends on.

    `environ`: a mapping. `platform`: as `sys.platform`. `machine`: as `os.uname().machine` (an x86_64 Python under
    Rosetta says "x86_64"). `is_installed(name)`: is there a real top-level module of that name? It must not import
    it.
    """

    def __init__(
        self, environ: Mapping[str, str], platform: str, machine: str, is_installed: Callable[[str], bool]
    ) -> None:
        self.environ = environ
        self.platform = platform
        self.machine = machine
        self.is_installed = is_installed


def mode(env: Environment) -> str:
    """ "off", "auto" or "on". A value that is none of these counts as "auto": see `unknown_mode`."""
    value = env.environ.get(SWITCH, "").strip().lower()
    if value in OFF:
        return "off"
    return "on" if value == "on" else "auto"


def unknown_mode(env: Environment) -> str | None:
    """The value of the switch if it is none of the known ones, else None."""
    value = env.environ.get(SWITCH, "")
    return None if value.strip().lower() in ("", "auto", "on", *OFF) else value


def refusal_here(env: Environment) -> str | None:
    """Why nothing at all is presented in this environment, in words; None if something may be."""
    current = mode(env)
    if current == "off":
        return f"{SWITCH}={env.environ[SWITCH]} switches it off"
    if current == "auto":
        if (env.platform, env.machine) != ("darwin", "arm64"):
            return f"this is {env.platform} on {env.machine}, not macOS on arm64; {SWITCH}=on presents it anywhere"
        if not env.is_installed("torch"):
            return "torch is not installed"
    return None


def refusal(name: str, env: Environment) -> str | None:
    """Why the top-level name is not presented, in words; None if it is, as long as no real installation has it."""
    selected = env.environ.get(MODULES, "")
    if selected.strip() and name not in (item.strip() for item in selected.split(",")):
        return f"{MODULES}={selected} does not list it"
    return refusal_here(env)


def refusal_to_adjust_transformers(env: Environment) -> str | None:
    """Why transformers is left alone and no metadata is announced, in words; None if transformers is adjusted."""
    value = env.environ.get(TRANSFORMERS, "")
    if value.strip().lower() in OFF:
        return f"{TRANSFORMERS}={value} leaves transformers alone"
    return refusal("flash_attn", env)
