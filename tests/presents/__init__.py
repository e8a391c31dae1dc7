"""Tests of the tree that an importer of `flash_attn` sees; importing this package makes that tree importable."""

import os
from unittest import mock

import flash_attn_shim

# Only the top-level names pass the switch: submodules are found on a package's __path__.
with mock.patch.dict(os.environ, MTLFLASHATTN_SHIM="on"):
    flash_attn_shim.install()
    import flash_attn  # noqa: F401
    import flash_attn_interface  # noqa: F401
