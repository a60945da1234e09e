"""scripts/demo and scripts/test: they make their .venv once, and a second run installs nothing.

Python and pip are stand-ins here that write down how they are called: the real ones would fetch gigabytes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="shell scripts")

# Stands for python: "-m venv DIR" makes DIR with this very file in it, "-m pip install" a fa-stereo that says its name.
PYTHON = r"""#!/bin/sh
echo "$*" >> "$CALLS"
case "$*" in
    "-m venv .venv")
        mkdir -p .venv/bin && cp "$0" .venv/bin/python
        [ -z "${HALF_MADE:-}" ] || exit 1
        touch .venv/pip ;;
    "-m pip --version") [ -e .venv/pip ] ;;
    "-m pip install"*)
        [ -z "${NO_SPACE:-}" ] || { echo "ERROR: No space left on device" >&2; exit 1; }
        for program in fa-stereo ruff mypy; do
            printf '#!/bin/sh\necho "%s $*"\n' $program > .venv/bin/$program
            chmod +x .venv/bin/$program
        done ;;
    "-m pytest"*) echo "pytest $*" ;;
esac
"""


@pytest.fixture
def clone(tmp_path: Path, repository: Path) -> Path:
    """A folder with the scripts and what they read, and the stand-in for python."""
    shutil.copytree(repository / "scripts", tmp_path / "scripts")
    shutil.copy(repository / "pyproject.toml", tmp_path)
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    return tmp_path


def run(clone: Path, script: str, *arguments: str, **more: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Run a script; return what it did and the installations it asked for."""
    calls = clone / "calls"
    calls.unlink(missing_ok=True)
    environment = os.environ | {"PYTHON": str(clone / "python"), "CALLS": str(calls)} | more
    done = subprocess.run(
        [clone / "scripts" / script, *arguments], cwd="/", env=environment, capture_output=True, text=True, check=False
    )
    return done, [line for line in calls.read_text().splitlines() if "pip install" in line]


def test_a_second_run_installs_nothing(clone: Path) -> None:
    done, installed = run(clone, "demo", "-o", "out")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "fa-stereo demo -o out\n"
    assert len(installed) == 1
    assert installed[0].endswith("--editable .")
    done, installed = run(clone, "demo")
    assert (done.stdout, done.stderr, installed) == ("fa-stereo demo\n", "", [])

    done, installed = run(clone, "test")
    assert len(installed) == 1
    assert installed[0].endswith("--editable .[dev]")
    assert done.stdout.splitlines()[0] == "ruff check ."
    for script in ("test", "demo"):  # what has the extras serves without them too
        assert run(clone, script)[1] == []


def test_the_demos_files_are_where_it_is_called(clone: Path) -> None:
    run(clone, "demo")
    (clone / ".venv/bin/fa-stereo").write_text("#!/bin/sh\npwd\n")
    assert run(clone, "demo")[0].stdout == "/\n"


def test_other_requirements_are_installed(clone: Path) -> None:
    run(clone, "demo")
    with (clone / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    assert len(run(clone, "demo")[1]) == 1


def test_a_half_made_environment_is_made_again(clone: Path) -> None:
    """As where Debian's python3-venv is not installed: python is there then, and pip is not."""
    done, installed = run(clone, "demo", HALF_MADE="1")
    assert (done.returncode, installed) == (2, [])
    assert "install its venv module (Debian, Ubuntu: python3-venv)" in done.stderr
    done, installed = run(clone, "demo")
    assert done.returncode == 0, done.stderr
    assert len(installed) == 1


def test_an_installation_that_fails_says_what_it_needs(clone: Path) -> None:
    done, _ = run(clone, "demo", NO_SPACE="1", TMPDIR=str(clone))
    assert done.returncode == 2
    reason, remedy = done.stderr.splitlines()[-2:]
    assert reason == "ERROR: No space left on device"
    assert f"6 GB in {clone} (" in remedy
    assert f"3 GB for a while in {clone} (" in remedy
    assert remedy.endswith("demo again.")
    done, installed = run(clone, "demo")  # what was not installed is installed then
    assert (done.returncode, len(installed)) == (0, 1), done.stderr


def test_somebody_elses_environment_is_left_alone(clone: Path) -> None:
    """Other programs make environments without pip; what is in them is not ours to remove."""
    package = clone / ".venv/lib/python3.12/site-packages/theirs.py"
    package.parent.mkdir(parents=True)
    package.touch()
    (clone / "calls").touch()
    done = subprocess.run(
        [clone / "scripts/demo"], env=os.environ | {"PYTHON": str(clone / "python"), "CALLS": str(clone / "calls")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert ".venv has packages but no pip" in done.stderr
    assert package.exists()


def test_an_old_python_is_told(clone: Path) -> None:
    (clone / "python").write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.2" && exit 0\nexit 1\n')
    done = subprocess.run(
        [clone / "scripts/demo"], env=os.environ | {"PYTHON": str(clone / "python")}, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr == "Python 3.10 or later is needed (found: Python 3.9.2); set PYTHON to one.\n"
