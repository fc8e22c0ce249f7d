from __future__ import annotations

import ast
import importlib
import inspect
import pydoc
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import tidings
import tidings.celery

CALLS = {
    "project_created": "(project_id, project_data)",
    "project_updated": "(project_id, project_data)",
    "project_deleted": "(project_id, project_data=None)",
    "file_uploaded": "(project_id, file_info)",
    "file_deleted": "(project_id, file_path)",
    "file_changed": "(project_id, file_path, change_type)",
    "workspace_changed": "(workspace_id, change_summary, project_id=None)",
    "task_started": "(task_id, task_name, project_id, metadata=None)",
    "task_progress": "(task_id, project_id, current, total, message=None, metadata=None)",
    "task_completed": "(task_id, project_id, result=None)",
    "task_failed": "(task_id, project_id, error, traceback=None)",
    "process_started": "(project_id, process_id, message=None)",
    "process_progress": "(project_id, process_id, progress, message=None)",
    "process_completed": "(project_id, process_id, message=None, outcome=None, error=None)",
    "publish": "(event)",
}

PUBLIC_MODULES = {
    "celery": ["Progress", "ProgressRecorder", "ProgressTask", "install", "progress", "uninstall"],
    "fastapi": [
        "Events",
        "Session",
        "Sessions",
        "broadcaster",
        "lifespan",
        "register_task",
        "register_task_sync",
    ],
    "testing": ["Published", "capture"],
}


@pytest.mark.parametrize("broadcaster", [tidings.EventBroadcaster, tidings.SyncEventBroadcaster])
def test_both_broadcasters_have_the_same_calls(broadcaster):
    public = {name for name in vars(broadcaster) if not name.startswith("_")}
    assert public == set(CALLS)
    for name, expected in CALLS.items():
        for call in (getattr(broadcaster, name), getattr(broadcaster(), name)):
            signature = inspect.signature(call)
            bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
            assert str(inspect.Signature(bare)) == expected
            assert inspect.getdoc(call)
            assert inspect.iscoroutinefunction(call) == (broadcaster is tidings.EventBroadcaster)
    assert "task.started" in pydoc.render_doc(broadcaster)


def test_nothing_but_the_public_names_leaks():
    expected = [
        "EventBroadcaster",
        "ProgressTask",
        "PublishError",
        "SyncEventBroadcaster",
        "__version__",
        "configure",
        "lost_events",
    ]
    assert sorted(tidings.__all__) == expected
    assert dir(tidings) == expected
    # Names with "@" are of pytest, which rewrites the package of a plugin.
    leaked = {name for name in vars(tidings) if not name.startswith(("_", "@"))}
    assert leaked <= {*expected, "annotations", "TYPE_CHECKING", "Any", *PUBLIC_MODULES}
    modules = {path.stem for path in Path(tidings.__file__).parent.glob("*.py")}
    assert {name for name in modules if not name.startswith("_")} == set(PUBLIC_MODULES)
    assert version("tidings") == tidings.__version__


@pytest.mark.parametrize("name", PUBLIC_MODULES)
def test_a_public_module_lists_what_is_public_and_documents_it(name):
    module = importlib.import_module(f"tidings.{name}")
    assert module.__all__ == PUBLIC_MODULES[name]
    assert dir(module) == module.__all__
    for public in module.__all__:
        assert inspect.getdoc(getattr(module, public))


def test_public_things_are_documented():
    for name in tidings.__all__:
        if name != "__version__":
            assert getattr(tidings, name).__doc__


def test_celery_is_imported_only_for_a_task():
    code = (
        "import sys, tidings; assert 'celery' not in sys.modules;"
        "from tidings import ProgressTask; assert 'celery' in sys.modules;"
        "assert ProgressTask is tidings.celery.ProgressTask; print('ok')"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"ok\n"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="nothing"):
        _ = tidings.nothing


def test_without_celery_a_task_base_says_what_is_missing():
    code = "import sys; sys.modules['celery'] = None; from tidings import ProgressTask"
    failed = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, text=True)
    assert "pip install 'tidings[celery]'" in failed.stderr


def test_without_fastapi_its_module_says_what_is_missing():
    code = "import sys; sys.modules['fastapi'] = None; import tidings.fastapi"
    failed = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, text=True)
    assert "pip install 'tidings[fastapi]'" in failed.stderr


def test_the_readme_example_is_python():
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    blocks = [block.partition("```")[0] for block in readme.split("```python\n")[1:]]
    assert blocks
    for block in blocks:
        compile(block, "README.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
