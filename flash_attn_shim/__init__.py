"""Makes `import flash_attn` work on Apple-silicon Macs, served by `flash_attn_mps`.

An installed `mtlflashattn` does this by itself (`mtlflashattn.pth`). Where site-packages' .pth files do not run
(`python -S`, zipapps, `pip install --target`, frozen programs), call `install()` before the first import of
`flash_attn` or transformers.
"""

# This module is imported in every interpreter of the environment: it imports nothing at its top.

TYPE_CHECKING = False  # typing itself is not imported here
if TYPE_CHECKING:
    from flash_attn_shim.report import Status

__all__ = ["install", "status", "uninstall"]


def install() -> None:
    """Set the import hook, and adjust libraries that were imported before it was set. Idempotent.

    Whether `flash_attn` is then visible is decided at each lookup, from `MTLFLASHATTN_SHIM` and the platform: see
    `status()`. Where no start-up file has set the hook, processes that multiprocessing spawns set it too.

    Raises ImportError if files of the project are missing, as in a frozen program that was made without them.
    """
    from flash_attn_shim import adjust, autoload, files

    files.check()
    if autoload.install():
        adjust.children()
    adjust.catch_up()


def uninstall() -> None:
    """Remove the hook, undo the adjustments and drop the presented modules. Real installations are not touched.

    Functions that a program has already taken keep working.
    """
    from flash_attn_shim import adjust, autoload, finder

    autoload.uninstall()
    adjust.undo()
    finder.forget()


def status() -> "Status":
    """Return what looking up each presented name gives right now, and why, as a `flash_attn_shim.report.Status`.

    Imports neither torch nor any presented module.
    """
    from flash_attn_shim import report

    return report.status()
