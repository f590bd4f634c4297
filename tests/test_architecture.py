"""The layout's rules, read off the syntax trees."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import keras_xfer

PACKAGE = Path(keras_xfer.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# What a module may import of the package: what stands on the same or a lower floor.
FLOORS = {
    1: {
        "_version", "applications", "blocks", "bundle", "extras", "files", "flops", "freezing", "handles",
        "lifeline", "live_config", "losses", "monitor", "running_fit", "retarget", "stages",
        "saved_model", "structure", "tables", "variable_group",
    },
    2: {"layers", "callbacks"},
    3: {"features", "diagnostics", "reports", "images"},
    4: {"tuner", "demo", "commands"},
    5: {"cli", "__main__"},
}  # fmt: skip
FLOOR = {name: floor for floor, names in FLOORS.items() for name in names}

# Modules that may use what Keras does not publish.
PRIVATE = {"retarget", "freezing", "hub_module"}
# Modules that may use what KerasTuner does not publish.
KERAS_TUNER_PRIVATE = {"tuner/durable.py", "tuner/funnel.py"}

# The core is Keras, NumPy and the standard library; these are imported where they are used.
OPTIONAL = {
    "jinja2", "keras_tuner", "matplotlib", "pandas", "scipy", "sklearn", "tensorflow",
    "tensorflow_hub", "jax", "torch",
}  # fmt: skip
# But what is itself imported where it is used may be built on one of them.
BUILT_ON = {"tuner": {"keras_tuner"}}


def part(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(node):
    """(module, is at the top level) of every import of the package or of others."""
    top = set(map(id, node.body))
    for each in ast.walk(node):
        if isinstance(each, ast.Import):
            for alias in each.names:
                yield alias.name, id(each) in top
        elif isinstance(each, ast.ImportFrom):
            assert not each.level, "relative import"
            yield each.module, id(each) in top
            if each.module == "keras_xfer":
                for alias in each.names:
                    yield f"keras_xfer.{alias.name}", id(each) in top


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_from_its_floor_or_below(path):
    if path == PACKAGE / "__init__.py":
        return
    own = part(path)
    for module, _ in imports(ast.parse(path.read_text("utf-8"))):
        if module.startswith("keras_xfer."):
            other = module.split(".")[1]
            assert FLOOR[other] <= FLOOR[own], f"{own} imports {other}"
            assert {own, other} != {"layers", "callbacks"}, "layers and callbacks never meet"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_what_keras_does_not_publish_stays_in_its_files(path):
    if part(path) in PRIVATE or path.stem in PRIVATE:
        return
    tree = ast.parse(path.read_text("utf-8"))
    assert not [module for module, _ in imports(tree) if module.startswith("keras.src")]
    defined = {
        name
        for each in ast.walk(tree)
        for name in (
            [each.name] if isinstance(each, ast.FunctionDef | ast.ClassDef)
            else [each.attr] if isinstance(each, ast.Attribute) and isinstance(each.ctx, ast.Store)
            else [each.target.id] if isinstance(each, ast.AnnAssign)
            and isinstance(each.target, ast.Name)
            else [each.id] if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store)
            else []
        )
    }  # fmt: skip
    used = {
        each.attr
        for each in ast.walk(tree)
        if isinstance(each, ast.Attribute)
        and each.attr.startswith("_")
        and not each.attr.startswith("__")
    }
    if path.relative_to(PACKAGE).as_posix() in KERAS_TUNER_PRIVATE:
        return
    documented = {"_exit"}  # os._exit
    assert used <= defined | documented, (
        "underscored attributes that the file does not define itself"
    )


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_heavy_libraries_are_imported_where_they_are_used(path):
    tree = ast.parse(path.read_text("utf-8"))
    at_the_top = {module.split(".")[0] for module, top in imports(tree) if top}
    assert not at_the_top & (OPTIONAL - BUILT_ON.get(part(path), set()))


def test_the_core_imports_no_more_than_keras_does():
    code = (
        "import sys, keras; before = {name.split('.')[0] for name in sys.modules}; "
        "import keras_xfer; after = {name.split('.')[0] for name in sys.modules}; "
        "print(sorted((after - before) - sys.stdlib_module_names))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['keras_xfer']"


def test_the_core_runs_without_tensorflow_on_another_backend():
    pytest.importorskip("torch")
    code = (
        "import os, sys; os.environ['KERAS_BACKEND'] = 'torch'; sys.modules['tensorflow'] = None; "
        "import keras_xfer; print(keras_xfer.Backbone.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "Backbone", done.stderr
