"""The documentation, and the files that only GitHub and pre-commit read: links, paths, examples, settings."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import flash_attn_mps
from flash_attn_mps import project
from flash_attn_shim import owners

ROOT = Path(__file__).resolve().parents[2]

PAGES = [
    page
    for pattern in ("*.md", "docs/*.md", "tests/*.md", "metal_host/*.md", "apple_model/*.md")
    for page in sorted(ROOT.glob(pattern))
    if page.name != "CHANGELOG.md"
]
MAPS = ["docs/architecture.md", "tests/README.md"]


def name(path):
    return str(path.relative_to(ROOT))


def anchors(page):
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", MAPS)
def test_paths_in_maps_exist(page):
    """In full, or from any folder on: `dispatch.py`, `metal/launch.py`."""
    spans = re.findall(r"`([\w./-]+(?:\.py|\.metal|/))`", (ROOT / page).read_text())
    files = [f"/{name(path)}" for path in ROOT.rglob("*") if ".git" not in path.parts and ".venv" not in path.parts]
    missing = [span for span in spans if not any(file.endswith(f"/{span.rstrip('/')}") for file in files)]
    assert len(spans) > 20
    assert missing == []


def test_every_test_of_attention_kernels_and_numerics_is_in_the_map():
    """There the features are; the other folders are small enough to look into."""
    text = (ROOT / "tests/README.md").read_text()
    files = [
        file for folder in ("attention", "metal", "numerics") for file in (ROOT / "tests" / folder).glob("test_*.py")
    ]
    assert len(files) > 20
    assert [name(file) for file in files if file.name not in text] == []


def test_every_page_is_in_the_index():
    index = (ROOT / "docs/README.md").read_text()
    assert [page.name for page in (ROOT / "docs").glob("*.md") if page.name not in index] == []


def test_every_variable_is_documented():
    code = [path.read_text() for top in ("flash_attn_mps", "flash_attn_shim") for path in (ROOT / top).rglob("*.py")]
    variables = set(re.findall(r"MTLFLASHATTN_[A-Z]+\b(?:_[A-Z]+)*", "\n".join(code)))
    documented = (ROOT / "docs/configuration.md").read_text() + (ROOT / "docs/sdpa.md").read_text()
    assert variables
    assert {variable for variable in variables if variable not in documented} == set()


def test_readme_has_the_two_commands_that_ci_runs():
    commands = re.findall(r"^python3 -m venv .*$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert [command.rpartition("&&")[2].split()[-1] for command in commands] == ["demo", "pytest"]


def test_the_first_example_of_the_readme_runs():
    code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[0]
    program = code.replace('"mps"', '"cpu"') + "assert out.shape == q.shape and out.isfinite().all()"
    run = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "MTLFLASHATTN_SHIM": "on", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode, run.stderr) == (0, "")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_python_examples_compile(page):
    for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        if not code.startswith(">>>"):
            compile(code, name(page), "exec")


def test_one_version_and_one_name():
    settings = (ROOT / "pyproject.toml").read_text()
    assert f'\nversion = "{flash_attn_mps.__version__}"\n' in settings
    assert f'\nname = "{project.DISTRIBUTION}"\n' in settings
    assert owners.DISTRIBUTION == flash_attn_mps.__distribution__ == project.DISTRIBUTION


def load(path):
    return yaml.safe_load((ROOT / path).read_text())


WORKFLOWS = [name(path) for path in sorted((ROOT / ".github/workflows").glob("*.yml"))]


@pytest.mark.parametrize("path", WORKFLOWS)
def test_workflows_are_well_formed(path):
    workflow = load(path)
    assert workflow["name"] == Path(path).stem
    assert True in workflow, "`on`, which YAML reads as true"
    assert workflow["permissions"] == {"contents": "read"}, "more only for the job that needs it"
    for job in workflow["jobs"].values():
        assert job["runs-on"]
        assert {job["needs"]} <= set(workflow["jobs"]) if "needs" in job else True
        for step in job["steps"]:
            assert len(step.keys() & {"run", "uses"}) == 1, step
            if "run" in step:
                script = re.sub(r"\$\{\{.*?\}\}", "x", step["run"])
                subprocess.run(["bash", "-n"], input=script, text=True, check=True)
                for script in re.findall(r"\.ci/\w+\.py", step["run"]):
                    assert (ROOT / script).exists()


def test_nothing_is_published_to_pypi_while_the_name_is_somebody_elses():
    jobs = load(".github/workflows/release.yml")["jobs"]
    publishing = [
        key for key, job in jobs.items() if any("pypi-publish" in step.get("uses", "") for step in job["steps"])
    ]
    assert publishing == ["publish"]
    assert jobs["publish"]["if"] == "vars.PYPI_NAME != ''"
    assert jobs["publish"]["permissions"] == {"id-token": "write"}


FORMS = [name(path) for path in sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")) if path.name != "config.yml"]


@pytest.mark.parametrize("path", FORMS)
def test_issue_forms_ask_for_the_report_of_the_self_test(path):
    form = load(path)
    assert form["name"]
    assert form["description"]
    asked = [field for field in form["body"] if field["type"] != "markdown"]
    assert len({field["id"] for field in asked}) == len(asked)
    assert {field["type"] for field in form["body"]} <= {"markdown", "textarea", "input", "dropdown", "checkboxes"}
    assert all(field["attributes"]["label"] for field in asked)
    (report,) = (field for field in asked if field["id"] == "selftest")
    assert "mtlflashattn-selftest.json" in report["attributes"]["description"]
    assert report["validations"] == {"required": True}


def test_pre_commit_has_the_versions_of_the_constraints():
    versions = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split("\n") if "==" in line)
    repos = load(".pre-commit-config.yaml")["repos"]
    given = {hook["id"]: repo["rev"] for repo in repos for hook in repo["hooks"]}
    assert given == {
        "ruff-check": f"v{versions['ruff']}",
        "ruff-format": f"v{versions['ruff']}",
        "codespell": f"v{versions['codespell']}",
    }
