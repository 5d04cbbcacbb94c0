"""Row G4: whoever writes code into a registered model, no command of ours loads that model, or runs the code."""

import importlib.util
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pspnet.errors import InputError
from segfleet import registry, tracking_server
from segfleet.cli import run_job
from segfleet.config import TrackingConfig
from segfleet.package import package_model
from segfleet.registry import fetch, register
from tests.faults.test_hostile import Canary

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning"),  # MLflow's with SQLAlchemy 2.1
    pytest.mark.fault("G4", "a registered model with code, a loader, a pickle or a script of somebody's own"),
]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


@pytest.fixture
def registered(
    local: TrackingConfig,
    write_checkpoint: Callable[..., Path],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> tuple[str, Path]:
    """A version of ours under a name of the test's own, and the folder of what MLflow keeps of it."""
    name = f"model-{abs(hash(request.node.name))}"
    package = package_model(write_checkpoint(tmp_path / "epoch_0001"), tmp_path / "package")
    register(local.tracking_uri, name, package)
    client = tracking_server.client(local.tracking_uri)
    model = client.get_logged_model(client.get_model_version(name, "1").tags[registry.MODEL_ID_TAG])
    fetch(f"models:/{name}/1", tracking_uri=local.tracking_uri)
    return name, Path(model.artifact_location.removeprefix("file://"))


def code_folder(folder: Path, canary: Path) -> None:
    (folder / "code").mkdir()
    (folder / "code" / "hostile.py").write_text(f"open({str(canary)!r}, 'w')\n")


def loader(folder: Path, canary: Path) -> None:
    code_folder(folder, canary)
    rewrite(folder, "loader_module: segfleet.registry", "loader_module: hostile\n    code: code")


def loader_without_code(folder: Path, canary: Path) -> None:
    rewrite(folder, "loader_module: segfleet.registry", "loader_module: tests.faults.hostile")


def code_in_another_spelling(folder: Path, canary: Path) -> None:
    (folder / "data" / "code").mkdir()
    (folder / "data" / "code" / "segfleet.py").write_text(f"open({str(canary)!r}, 'w')\n")
    rewrite(folder, "    loader_module:", '    "\\x63ode": data/code\n    loader_module:')


def pickled(folder: Path, canary: Path) -> None:
    (folder / "python_model.pkl").write_bytes(pickle.dumps(Canary(canary)))
    rewrite(
        folder,
        "loader_module: segfleet.registry",
        "loader_module: mlflow.pyfunc.model\n    python_model: python_model.pkl",
    )


def from_code(folder: Path, canary: Path) -> None:
    """What MLflow writes for a script, which it runs once itself."""
    script = folder.parent / "script.py"
    script.write_text(
        f"import mlflow\nopen({str(canary)!r}, 'w')\n"
        "class Hostile(mlflow.pyfunc.PythonModel):\n"
        "    def predict(self, context, model_input):\n        return model_input\n"
        "mlflow.models.set_model(Hostile())\n"
    )
    package = folder.parent / "kept"
    shutil.move(folder / "data", package)
    shutil.rmtree(folder)
    with registry._quiet():  # it warns of the script's types
        import mlflow.pyfunc

        mlflow.pyfunc.save_model(str(folder), python_model=str(script), pip_requirements=[])
    shutil.move(package, folder / "data")
    canary.unlink()


def other_flavor(folder: Path, canary: Path) -> None:
    rewrite(folder, "flavors:\n", "flavors:\n  sklearn:\n    pickled_model: model.pkl\n")


def bomb(folder: Path, canary: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    (folder / "MLmodel").write_text("\n".join(lines))


def no_yaml(folder: Path, canary: Path) -> None:
    (folder / "MLmodel").write_text("!!python/object/apply:os.mkdir [" + str(canary) + "]")


def rewrite(folder: Path, old: str, new: str) -> None:
    text = (folder / "MLmodel").read_text()
    assert old in text
    (folder / "MLmodel").write_text(text.replace(old, new, 1))


KINDS = [
    code_folder,
    loader,
    loader_without_code,
    code_in_another_spelling,
    pickled,
    from_code,
    other_flavor,
    bomb,
    no_yaml,
]


@pytest.mark.parametrize("make_hostile", KINDS, ids=lambda kind: kind.__name__)
def test_a_model_with_code_is_refused_and_the_code_not_run(
    local: TrackingConfig,
    registered: tuple[str, Path],
    canary: Path,
    make_hostile: Callable[[Path, Path], None],
) -> None:
    name, folder = registered
    make_hostile(folder, canary)
    with pytest.raises(InputError, match="must be data alone"):
        fetch(f"models:/{name}/1", tracking_uri=local.tracking_uri)
    assert not canary.exists()


@pytest.mark.parametrize("job", ["predict", "evaluate", "promote", "export_model"])
def test_the_jobs_refuse_it(
    local: TrackingConfig,
    registered: tuple[str, Path],
    store: Any,
    canary: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    job: str,
) -> None:
    name, folder = registered
    client = tracking_server.client(local.tracking_uri)
    client.delete_registered_model_alias(name, "champion")
    loader(folder, canary)
    model, output = ["--model", f"models:/{name}/1"], ["--output", str(tmp_path / "out")]
    arguments = {
        "predict": [*model, *output, "--input", str(tmp_path)],
        "evaluate": [*model, *output, "--store", store.location.text],
        "promote": ["--name", name, "--store", store.location.text],
        "export_model": [*model, *output],
    }[job]
    monkeypatch.setattr(sys, "argv", [job, *arguments, "--tracking-uri", local.tracking_uri])
    spec = importlib.util.spec_from_file_location(f"job_{job}", ROOT / "jobs" / f"{job}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
        with pytest.raises(SystemExit) as ended:
            run_job(module.main)
    finally:
        del sys.modules[spec.name]
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "must be data alone" in said
    assert "Traceback" not in said
    assert not canary.exists()
    assert "champion" not in client.get_registered_model(name).aliases


def test_a_model_of_others_is_refused_by_its_missing_mark(
    local: TrackingConfig, canary: Path, tmp_path: Path
) -> None:
    client = tracking_server.client(local.tracking_uri)
    (tmp_path / "model").mkdir()
    client.create_registered_model("others")
    client.create_model_version("others", source=(tmp_path / "model").as_uri())
    with pytest.raises(InputError, match="must be registered by segfleet"):
        fetch("models:/others/1", tracking_uri=local.tracking_uri)
