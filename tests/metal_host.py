"""The runner under the name that it had before it got a folder of its own, for scripts that know it by that."""

from metal_host import *  # noqa: F403
from metal_host import compile_shader, observe  # noqa: F401
