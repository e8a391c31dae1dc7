"""Hooks for PyInstaller, which finds them by the entry point "pyinstaller40"."""

import os


def get_hook_dirs() -> list[str]:
    return [os.path.dirname(__file__)]
