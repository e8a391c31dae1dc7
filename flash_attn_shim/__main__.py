"""`python -m flash_attn_shim`: the `mtlflashattn` command, for places where console scripts are not installed."""

import sys

from flash_attn_shim.commands import main

sys.exit(main())
