"""Run the self-test on this Mac's GPU, and say whose failures they are.

    python .ci/selftest_on_mps.py REPORT.json

Hosted runners are virtual machines. Their GPU, Apple's Paravirtual device, fails where no Mac does
(genesis-world#3054), and on some of them torch can allocate nothing on it. There failures are a warning on the page of
the run and no error; on a Mac of one's own they fail the job.
"""

import subprocess
import sys
from pathlib import Path

from flash_attn_mps.tiers.metal import gpu
from flash_attn_mps.tools import machine


def verdict(status: int, unusable: str | None, virtual: bool) -> tuple[int, str]:
    """The exit status, and the line for the page of the run. `status`: of the self-test."""
    if unusable:
        return (0, f"::warning::No GPU to test on: {unusable}") if virtual else (1, f"::error::{unusable}")
    if not status:
        return 0, "::notice::Every Metal kernel passed the self-test" + (" on a virtual GPU." if virtual else ".")
    if virtual:
        return 0, "::warning::The self-test failed on a virtual GPU, which fails where no Mac does: see the report."
    return 1, "::error::The self-test failed: see the report."


def main(report: Path) -> int:
    unusable = machine.unusable("mps")
    status = 1
    if not unusable:
        command = [sys.executable, "-m", "flash_attn_shim", "selftest", "--quick", "--device", "mps", "--json", report]
        status = subprocess.run(command, check=False).returncode
    code, line = verdict(status, unusable, gpu.is_virtual())
    print(line)
    return code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
