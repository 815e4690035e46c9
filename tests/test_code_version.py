"""Which commit a run says that it is of."""

import shutil
import subprocess

import pytest

from isanet_pl.callbacks import results
from isanet_pl.callbacks.results import code_version

GIT = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]


def git(folder, *args):
    done = subprocess.run([*GIT, *args], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A repository with this project's module in it, taken for the place it runs from."""
    path = tmp_path / "clone" / "results.py"
    path.parent.mkdir()
    shutil.copy(results.__file__, path)
    git(path.parent, "init", "--quiet")
    git(path.parent, "add", ".")
    git(path.parent, "commit", "--quiet", "--message", "first")
    monkeypatch.setattr(results, "__file__", str(path))
    return path


def test_code_version_is_the_commit_and_says_when_files_differ_from_it(clone):
    commit = git(clone.parent, "rev-parse", "HEAD")
    git(clone.parent, "tag", "--annotate", "v1", "--message", "a tag is no commit")
    assert code_version() == commit
    (clone.parent / "notes.txt").write_text("a file that git does not know")
    assert code_version() == commit
    clone.write_text("changed")
    assert code_version() == f"{commit}-dirty"


def test_code_version_is_not_that_of_a_repository_around_an_installed_copy(clone, monkeypatch):
    copy = clone.parent / "site-packages" / "results.py"
    copy.parent.mkdir()
    shutil.copy(clone, copy)
    monkeypatch.setattr(results, "__file__", str(copy))
    assert code_version() is None


def test_code_version_is_none_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert code_version() is None
