"""Every minor release of transformers from 4.48 on: what it concludes where the shim serves `flash_attn`.

    python tests/transformers/versions.py --environments DIRECTORY [--markdown FILE] [version ...]

Makes one environment for each version in DIRECTORY, with the torch of the Python that runs this (nothing but transformers
and what it wants in another version is installed), and keeps it for the next time. Not part of the default tests: some
minutes, and downloads.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
OLDEST = (4, 48)
PRESENTED = {"MTLFLASHATTN_SHIM": "on"}

#: name -> variables of the interpreter that asks.
SETTINGS = {
    "absent": None,  # without this project's start-up file
    "off": {"MTLFLASHATTN_SHIM": "off"},
    "on": PRESENTED,
    "not adjusted": {**PRESENTED, "MTLFLASHATTN_TRANSFORMERS": "off"},
    "one name": {**PRESENTED, "MTLFLASHATTN_SHIM_MODULES": "flash_attn"},
}


def newest_of_each_minor():
    """The newest release of each minor version on the package index, oldest first."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "index", "versions", "transformers"], capture_output=True, text=True, check=True
    ).stdout
    newest = {}
    for version in re.search(r"Available versions: (.*)", listed)[1].split(", "):
        major, minor, patch = (int(part) for part in f"{version}.0".split(".")[:3])
        if (major, minor) >= OLDEST:
            newest[major, minor] = max(newest.get((major, minor), 0), patch)
    return [f"{major}.{minor}.{patch}" for (major, minor), patch in sorted(newest.items())]


def environment(directory, version):
    """The Python of an environment with that version of transformers, made if it is not there."""
    prefix = directory / version
    python = prefix / "bin" / "python"
    if not (prefix / "complete").exists():
        venv.create(prefix, symlinks=True, clear=True)
        site_packages = next((prefix / "lib").glob("python*")) / "site-packages"
        outer = {str(Path(__import__(name).__file__).parents[1]) for name in ("torch", "numpy", "einops")}
        (site_packages / "outer.pth").write_text("".join(f"{path}\n" for path in sorted(outer)))
        subprocess.run(
            [sys.executable, "-m", "pip", "--python", python, "install", "-q", f"transformers=={version}"], check=True
        )
        (prefix / "complete").touch()
    return python


def ask(python, setting):
    """What `version_probe.py` prints in an interpreter of its own."""
    site_packages = next((python.parents[1] / "lib").glob("python*")) / "site-packages"
    hook = site_packages / "mtlflashattn.pth"
    hook.unlink(missing_ok=True)
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("MTLFLASHATTN", "PYTHON"))}
    if setting is not None:
        hook.write_text(f"{ROOT}\n{(ROOT / 'mtlflashattn.pth').read_text()}")
        variables |= setting
    variables |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [python, "-W", "ignore", HERE / "version_probe.py"], env=variables, capture_output=True, text=True, check=False
    )
    hook.unlink(missing_ok=True)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def verdict(answers):
    """What does not hold of a version, in words; empty if all does."""
    for name, answer in answers.items():
        if "error" in answer:
            yield f"{name}: {answer['error']}"
    if any("error" in answer for answer in answers.values()):
        return
    for name in ("off", "not adjusted"):
        if answers[name]["probes"] != answers["absent"]["probes"]:
            yield f"{name}: other answers than without this project"
        if answers[name]["flash"] != answers["absent"]["flash"]:
            yield f"{name}: {answers[name]['flash']}"
    for name in ("on", "one name"):
        if answers[name]["probes"].get("is_flash_attn_2_available") != "True":
            yield f"{name}: is_flash_attn_2_available() is {answers[name]['probes'].get('is_flash_attn_2_available')}"
        if answers[name]["flash"] != "equal":
            yield f"{name}: {answers[name]['flash']}"
        for later in ("3", "4"):
            if answers[name]["probes"].get(f"is_flash_attn_{later}_available", "False") != "False":
                yield f"{name}: claims FlashAttention {later}"


def table(results):
    lines = [
        "| transformers | `flash_attention_2` | tiny Llama, against eager | switched off | adjustment |",
        "| --- | --- | --- | --- | --- |",
    ]
    for version, answers in results.items():
        on = answers["on"]
        if "error" in on:
            lines.append(f"| {version} | {on['error']} | | | |")
            continue
        wrong = "; ".join(verdict(answers))
        lines.append(
            f"| {version} | {'available' if on['probes']['is_flash_attn_2_available'] == 'True' else 'refused'} "
            f"| {on['flash']}: {', '.join(f'{case} {value:.0e}' for case, value in on['differences'].items())} "
            f"| {wrong or 'as without mtlflashattn'} | {on['adjusted']} |"
        )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="*", help="default: the newest of each minor version since 4.48")
    parser.add_argument("--environments", type=Path, required=True, help="a directory to keep the environments in")
    parser.add_argument("--json", type=Path, help="write the answers")
    parser.add_argument("--markdown", type=Path, help="write the table")
    arguments = parser.parse_args()
    results, failed = {}, 0
    for version in arguments.versions or newest_of_each_minor():
        try:
            python = environment(arguments.environments.resolve(), version)
            results[version] = {name: ask(python, setting) for name, setting in SETTINGS.items()}
        except subprocess.CalledProcessError as error:
            results[version] = {"on": {"error": f"cannot be installed: {error}"}}
        problems = list(verdict(results[version]))
        failed += bool(problems)
        print(version, "; ".join(problems) or "as it should be", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))
    if arguments.markdown:
        arguments.markdown.write_text(table(results) + "\n")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
