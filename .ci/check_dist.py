"""Inspect the built distributions in a directory: hook files and stubs are at the root, recorded, nothing else is."""

import sys
import tarfile
import zipfile
from pathlib import Path

PACKAGES = {"flash_attn_mps", "flash_attn_shim"}
HOOKS = {"mtlflashattn.pth", "mtlflashattn.start"}
STUBS = {"flash_attn-stubs", "flash_attn_interface-stubs"}


def main(directory: Path) -> None:
    (wheel,) = directory.glob("*.whl")
    (sdist,) = directory.glob("*.tar.gz")
    assert wheel.name.endswith("-py3-none-any.whl"), wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        info = next(name.split("/")[0] for name in names if name.endswith(".dist-info/RECORD"))
        recorded = {line.rsplit(",", 2)[0] for line in archive.read(f"{info}/RECORD").decode().splitlines()}
    assert {name.split("/")[0] for name in names} == PACKAGES | HOOKS | STUBS | {info}, sorted(names)
    assert recorded == names, sorted(recorded ^ names)
    needed = {
        "flash_attn_mps/py.typed",
        "flash_attn_mps/tiers/metal/kernels/forward.metal",
        "flash_attn_shim/presents/flash_attn/__init__.py",
        "flash_attn_shim/presents/flash_attn_interface.py",
        "flash_attn-stubs/__init__.pyi",
        "flash_attn_interface-stubs/__init__.pyi",
        f"{info}/licenses/LICENSE",
    }
    assert needed <= names, sorted(needed - names)
    with tarfile.open(sdist) as archive:
        held = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    tracked = {"README.md", "CONTRIBUTING.md", "LICENSE", "CHANGELOG.md", "constraints.txt", "pyproject.toml", *HOOKS}
    tracked |= {"metal_host/README.md", "constraints-transformers4.txt"}
    tracked |= {
        ".ci/run",
        ".github/workflows/test.yml",
        ".gitignore",
        ".pre-commit-config.yaml",
    }  # tests read such files
    assert tracked <= held, sorted(tracked - held)
    print(f"{wheel.name}: {len(names)} files; {sdist.name}: {len(held)} files")


main(Path(sys.argv[1]))
