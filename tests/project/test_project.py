"""Laws of the repository itself: its pins, its layers, its commands, its folder `platform`."""

import platform
import re
import subprocess
import sys
import sysconfig
import tomllib
from itertools import chain
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PIN = re.compile(r"([a-z0-9][a-z0-9.-]*)==(\S+)")


def _committed_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("this is no git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def _pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    matches = [PIN.fullmatch(line) for line in lines]
    assert all(matches), [line for line, match in zip(lines, matches, strict=True) if not match]
    return {match[1]: match[2] for match in matches if match}


def _direct_dependencies() -> list[str]:
    project = PROJECT["project"]
    declared = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    return [re.split(r"[\[<>=!~ ]", line)[0].lower().replace("_", "-") for line in declared]


def test_constraints_hold_nothing_but_pins() -> None:
    # no address, no index, no path: only name==version
    assert len(_pins()) > 100


@pytest.mark.parametrize("name", _direct_dependencies())
def test_every_direct_dependency_is_pinned(name: str) -> None:
    assert name in _pins()


def test_the_installed_versions_of_what_decides_results_are_the_pinned_ones() -> None:
    from importlib.metadata import version

    names = ("torch", "torchvision", "ray", "mlflow", "optuna", "numpy", "pyarrow")
    assert {name: version(name).split("+")[0] for name in names} == {name: _pins()[name] for name in names}


def test_the_folder_platform_leaves_the_standard_library_alone() -> None:
    assert not (ROOT / "platform" / "__init__.py").exists()
    assert Path(platform.__file__).parent == Path(sysconfig.get_path("stdlib"))
    found = subprocess.run(
        [sys.executable, "-c", "import platform; print(platform.__file__)"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(found.stdout.strip()).parent == Path(sysconfig.get_path("stdlib"))


def test_tests_are_no_packages_and_their_files_have_names_of_their_own() -> None:
    files = list((ROOT / "tests").rglob("*.py"))
    assert not [path for path in files if path.name == "__init__.py"]
    names = [path.name for path in files if path.name != "conftest.py"]
    assert sorted(names) == sorted(set(names))


def test_every_module_has_its_place_in_the_layers() -> None:
    layers = next(
        contract["layers"]
        for contract in PROJECT["tool"]["importlinter"]["contracts"]
        if contract["type"] == "layers"
    )
    placed = {name for layer in layers for name in re.findall(r"\w+", layer)}
    modules = {path.stem for path in (ROOT / "platform" / "segfleet").glob("*.py")} - {"__init__"}
    assert modules - placed == set()


def test_the_import_contracts_are_kept() -> None:
    checked = subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--no-cache"], cwd=ROOT, capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout


def test_the_process_of_a_trial_in_tune_loads_neither_torch_nor_mlflow() -> None:
    """It loads the actors that it asks, too; a search has one such process for each trial at a time."""
    code = (
        "import segfleet.trial, segfleet.groups, sys; sys.exit(bool({'torch', 'mlflow'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_model_imports_without_the_platform() -> None:
    names = sorted(
        f"pspnet.{path.stem}" for path in (ROOT / "pspnet").glob("*.py") if path.stem != "__init__"
    )
    code = (
        "import importlib, sys\n"
        f"for name in {names}: importlib.import_module(name)\n"
        "print(sorted({'ray', 'mlflow', 'optuna', 'segfleet'} & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


@pytest.mark.parametrize("target", ["install", "demo", "demo-stop", "test", "test-slow", "check", "format"])
def test_make_knows_what_the_readme_names(target: str) -> None:
    planned = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True)
    assert planned.returncode == 0, planned.stderr


def test_every_job_and_target_that_the_readme_names_exists() -> None:
    text = (ROOT / "README.md").read_text()
    jobs = set(re.findall(r"jobs/\w+\.(?:py|yaml)", text))
    assert len(jobs) >= 9
    assert not [name for name in jobs if not (ROOT / name).is_file()]
    makefile = (ROOT / "Makefile").read_text()
    assert not [name for name in re.findall(r"`make ([a-z-]+)`", text) if f"\n{name}:" not in makefile]


def test_every_job_is_named_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text()
    assert not [path.name for path in (ROOT / "jobs").glob("*.py") if path.name not in text]


def test_every_picture_of_the_readme_is_there() -> None:
    pictures = re.findall(r"!\[[^]]*]\(([^)]+)\)", (ROOT / "README.md").read_text())
    assert pictures
    assert not [name for name in pictures if not (ROOT / name).is_file()]


def test_every_module_of_the_model_and_the_platform_is_in_the_readmes_tree() -> None:
    text = (ROOT / "README.md").read_text()
    modules = [path for folder in ("pspnet", "platform/segfleet") for path in (ROOT / folder).glob("*.py")]
    assert not [path.name for path in modules if path.name != "__init__.py" and path.name not in text]


def test_a_submitted_job_takes_the_code_along_and_nothing_that_installs_or_weighs() -> None:
    from ray.runtime_env import RuntimeEnv

    environment = yaml.safe_load((ROOT / "jobs" / "runtime_env.yaml").read_text())
    assert environment["working_dir"] == "."
    assert environment["py_modules"] == ["platform/segfleet"]
    assert not {"pip", "uv", "conda", "image_uri", "container"} & set(environment)
    assert {".git/", ".venv/", "/demo/", "/runs/", "/stores/"} <= set(environment["excludes"])
    # Ray itself accepts what is not uploaded
    RuntimeEnv(env_vars=environment["env_vars"], excludes=environment["excludes"])


def test_no_committed_file_is_too_large_to_upload_with_every_job() -> None:
    sizes = {path.relative_to(ROOT).as_posix(): path.stat().st_size for path in _committed_files()}
    assert not {name: size for name, size in sizes.items() if size > 3_000_000}
    assert sum(sizes.values()) < 30_000_000


def test_no_committed_text_names_a_place_of_one_machine() -> None:
    here = re.compile(r"(?<![\w.$}])/(?:work|root|home)/\w")
    found = []
    for path in _committed_files():
        if path.suffix in {".py", ".md", ".toml", ".yaml", ".yml", ".txt", ".csv", ".json", ""}:
            text = path.read_text(errors="replace")
            found += [f"{path.relative_to(ROOT)}: {match[0]}" for match in here.finditer(text)]
    assert not found
