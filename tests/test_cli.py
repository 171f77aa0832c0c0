"""The command line: exit codes, streams, and that bad input leaves nothing behind."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import tomli_w
from typer.testing import CliRunner

import fedmi.cli.running
from fedmi.cli.app import app
from fedmi.cli.catalogue import print_list
from fedmi.runs import execute
from fedmi.runs.directory import RunError
from tests.scenarios import base

runner = CliRunner()


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A valid scenario in an otherwise empty working directory."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "small.toml"
    path.write_text(tomli_w.dumps(base()))
    return path


def results(**changes: Any) -> SimpleNamespace:
    frame = pd.DataFrame(
        {"attack": ["a"], "value": [0.1 + 0.2], "epsilon": [float("nan")], "psnr": [float("inf")]}
    )
    told = {"directory": Path("runs/x"), "leakage": frame, "scores": frame, "metrics": ()}
    told |= {"failures": (), "refused": (), "interrupted": False}
    return SimpleNamespace(**{**told, **changes})


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """`execute.run` replaced: what it was called with, and what it gives back."""
    seen: dict[str, Any] = {"gives": results()}

    def run(scenario: Any, **options: Any) -> Any:
        seen.update(options, scenario=scenario)
        if isinstance(seen["gives"], BaseException):
            raise seen["gives"]
        return seen["gives"]

    monkeypatch.setattr(execute, "run", run)
    monkeypatch.setattr(fedmi.cli.running, "_print_table", lambda found: None)
    return seen


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"training": {"learnin_rate": 1}}, 'did you mean "learning_rate"?'),
        ({"model": {"kind": "sofmax"}}, 'did you mean "softmax"?'),
        ({"attack": [base()["attack"][0] | {"position": "eavesdropper"}]}, "does not see"),
    ],
)
@pytest.mark.parametrize("command", ["run", "check"])
def test_bad_input_exits_2_with_a_message_and_writes_nothing(
    file: Path, command: str, changes: dict[str, Any], said: str
) -> None:
    file.write_text(tomli_w.dumps(base(**changes)))
    done = runner.invoke(app, [command, str(file)])
    assert done.exit_code == 2
    assert said in done.stderr
    assert str(file) in done.stderr
    assert "Traceback" not in done.output
    assert done.stdout == ""
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--seeds", "1,a"], "not a list of whole numbers"),
        (["--seeds", "1,1"], "twice"),
        (["--set", "training.batch_size"], "not a setting"),
        (["--set", "training.batch_size=0"], "batch_size = 0"),
        (["--set", "deployment.f.rounds=2"], 'did you mean "fl"?'),
        (["--jobs", "-1"], "--jobs"),
    ],
)
def test_bad_options_exit_2(file: Path, options: list[str], said: str) -> None:
    done = runner.invoke(app, ["run", str(file), *options])
    assert done.exit_code == 2
    assert said in done.stderr
    assert list(file.parent.iterdir()) == [file]


def test_a_missing_file_exits_2(tmp_path: Path) -> None:
    done = runner.invoke(app, ["check", str(tmp_path / "no.toml")])
    assert done.exit_code == 2
    assert "cannot be read" in done.stderr


def test_check_prints_the_plan_and_writes_nothing(file: Path) -> None:
    done = runner.invoke(app, ["check", str(file)])
    assert done.exit_code == 0, done.output
    for word in ("710 private records", "10 trainings", "curious_server", "client_update"):
        assert word in done.stdout
    assert list(file.parent.iterdir()) == [file]


def test_check_as_json_is_one_document(file: Path) -> None:
    done = runner.invoke(app, ["check", str(file), "--json", "--seeds", "3"])
    document = json.loads(done.stdout)
    assert document["counts"] == {"train": 5, "serve": 0, "evaluator": 1, "attack": 3}
    assert {cell["seed"] for cell in document["cells"]} == {3}
    assert document["trainings"][0]["estimate"]["parameters"] == document["parameters"]


def test_run_hands_over_what_was_asked_and_prints_json_alone(
    file: Path, ran: dict[str, Any]
) -> None:
    options = ["--jobs", "0", "--out", "here", "--seeds", "5,6", "--json"]
    done = runner.invoke(app, ["run", str(file), *options, "--set", "training.batch_size=4"])
    assert done.exit_code == 0, done.output
    assert (ran["jobs"], ran["out"], ran["quiet"]) == (0, Path("here"), False)
    assert ran["scenario"].seeds == (5, 6)
    assert ran["scenario"].training.batch_size == 4
    document = json.loads(done.stdout)
    assert document["leakage"] == [
        {"attack": "a", "value": 0.1 + 0.2, "epsilon": None, "psnr": "Infinity"}
    ]
    assert "reading" in done.stderr


def test_quiet_says_nothing_on_stderr(file: Path, ran: dict[str, Any]) -> None:
    assert runner.invoke(app, ["run", str(file), "--quiet"]).stderr == ""
    assert ran["quiet"] is True


@pytest.mark.parametrize(
    ("gives", "code", "said"),
    [
        (results(failures=("mi_face on fl, seed 1: broken",)), 1, "mi_face on fl, seed 1: broken"),
        (results(interrupted=True, failures=("x",)), 130, "run the same command again"),
        (RunError("runs/x is in use by process 7"), 1, "in use by process 7"),
        (KeyboardInterrupt(), 130, "run the same command again"),
    ],
)
def test_how_a_run_ends_is_its_exit_code(
    file: Path, ran: dict[str, Any], gives: object, code: int, said: str
) -> None:
    ran["gives"] = gives
    done = runner.invoke(app, ["run", str(file)])
    assert done.exit_code == code
    assert said in done.stderr


def test_a_fault_of_fedmi_itself_is_not_hidden(file: Path, ran: dict[str, Any]) -> None:
    ran["gives"] = ZeroDivisionError("a bug")
    assert isinstance(runner.invoke(app, ["run", str(file)]).exception, ZeroDivisionError)


def test_report_of_something_else_than_a_run_is_refused(tmp_path: Path) -> None:
    assert runner.invoke(app, ["report", str(tmp_path / "no")]).exit_code == 2
    done = runner.invoke(app, ["report", str(tmp_path)])
    assert done.exit_code == 1
    assert "not a run directory" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_list_names_every_kind_and_refuses_others() -> None:
    done = runner.invoke(app, ["list"])
    for word in ("mi_face", "digits", "federated", "psnr", "softmax", "dirichlet", "fedavg"):
        assert word in done.stdout
    attacks = runner.invoke(app, ["list", "attacks"]).stdout
    assert "mi_face" in attacks
    assert "digits" not in attacks
    wrong = runner.invoke(app, ["list", "atacks"])
    assert wrong.exit_code == 2
    assert 'did you mean "attacks"?' in wrong.stderr


def test_show_tells_options_and_paper() -> None:
    done = runner.invoke(app, ["show", "attack", "mi_face"])
    for word in ("Fredrikson", "learning_rate", "> 0, <= 10000", "required", "architecture"):
        assert word in done.stdout
    wrong = runner.invoke(app, ["show", "strategy", "fedavgg"])
    assert wrong.exit_code == 2
    assert 'no strategy "fedavgg"; did you mean "fedavg"?' in wrong.stderr


@pytest.mark.parametrize("group", ["datasets", "deployments", "metrics", "models", "strategies"])
def test_everything_listed_can_be_shown(group: str) -> None:
    from fedmi.exposure.component import components

    for name in components(f"fedmi.{group}"):
        done = runner.invoke(app, ["show", group, name])
        assert done.exit_code == 0, done.output


def test_doctor_finds_this_environment() -> None:
    done = runner.invoke(app, ["doctor"])
    assert done.exit_code == 0, done.output
    for word in ("torch", "flwr", "cores", "memory", "att_faces"):
        assert word in done.stdout


def test_doctor_fails_where_something_essential_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedmi.cli.doctor.requires", lambda name: ["not-there>=1.0"])
    done = runner.invoke(app, ["doctor"])
    assert done.exit_code == 1
    assert "not-there" in done.stderr


def test_help_and_version_load_nothing_heavy() -> None:
    program = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from fedmi.cli import app\n"
        "for words in (['--help'], ['run', '--help'], ['--version']):\n"
        "    assert CliRunner().invoke(app, words).exit_code == 0\n"
        "import fedmi.cli.running, fedmi.cli.checking, fedmi.cli.doctor\n"
        "print([name for name in ('torch', 'ray', 'flwr', 'pandas') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_python_m_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fedmi.cli", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("fedmi 0.")


def test_flags_are_listed_with_what_they_say(capsys: pytest.CaptureFixture[str]) -> None:
    print_list("flags")
    shown = capsys.readouterr().out
    assert "architecture_refused" in shown
    assert "pin the architecture" in " ".join(shown.split())
