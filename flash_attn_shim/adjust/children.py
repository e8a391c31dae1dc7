"""multiprocessing: spawned processes set the hook where no start-up file does.

A spawned process imports nothing of its parent's but the main module, and an `install()` under `if __name__ ==
"__main__"` does not run there. It then cannot unpickle a function of flash_attn that it is sent, dies, and a Pool
starts the next one, for ever. So the command that such a process is started with calls `install()` first. Frozen
programs start themselves: there `install()` belongs before `multiprocessing.freeze_support()`.
"""

from __future__ import annotations

import functools
import os
from multiprocessing import spawn
from typing import Any

from flash_attn_shim.adjust.changes import Undo

_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

# The child gets its parent's sys.path a moment later; what was appended is gone then.
_FIRST = f"import sys; sys.path.append({_ROOT!r}); import flash_attn_shim; flash_attn_shim.install(); "
_BEGINS = "from multiprocessing.spawn import spawn_main"


def adjust(undo: Undo) -> None:
    original = spawn.get_command_line

    @functools.wraps(original)
    def get_command_line(**arguments: Any) -> list[Any]:
        command = original(**arguments)
        return [_FIRST + part if str(part).startswith(_BEGINS) else part for part in command]

    undo.set(spawn, "get_command_line", get_command_line)
