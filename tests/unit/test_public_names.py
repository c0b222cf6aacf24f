"""The front door: which names there are, that they are lazy, and that they say where users find them."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import ringfold
from ringfold.collectives import errors

NAMES = [
    "AuthenticationError",
    "CheckpointError",
    "CollectiveMismatch",
    "CollectiveTimeout",
    "CommunicationError",
    "Communicator",
    "ConfigError",
    "ConnectError",
    "Corrupt",
    "DataParallel",
    "DeviceMesh",
    "Engine",
    "Fp8",
    "Incompatible",
    "Incomplete",
    "LaunchError",
    "Layout",
    "LayoutError",
    "OutOfMemory",
    "PeerLost",
    "Placement",
    "PrecisionError",
    "RingfoldError",
    "Work",
    "ZeRO",
    "__version__",
    "all_reduce",
    "global_mean",
    "init",
    "shard",
    "shutdown",
    "verify",
]


def test_the_public_names_are_these_and_sorted() -> None:
    assert ringfold.__all__ == NAMES == sorted(NAMES)
    assert dir(ringfold) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(ringfold, name) is not None


def test_every_error_class_is_public_and_calls_itself_ringfold() -> None:
    classes = {name: value for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, errors.RingfoldError)}
    assert set(classes) <= set(ringfold.__all__)
    assert {value.__module__ for value in classes.values()} == {"ringfold"}


def test_type_checkers_and_interpreters_see_the_same_names() -> None:
    tree = ast.parse(Path(ringfold.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    imported = {alias.asname for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert imported | {"__version__"} == set(ringfold.__all__)
    for node in block.body:
        if isinstance(node, ast.ImportFrom):
            home = ringfold._HOMES.get(node.names[0].name, "collectives.errors")
            assert node.module == f"ringfold.{home}"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'ringfold' has no attribute 'nonsense'"):
        ringfold.nonsense  # noqa: B018


def test_importing_ringfold_imports_no_torch_and_a_layout_needs_none() -> None:
    code = "import sys, ringfold; str(ringfold.Layout.parse('dp2')); ringfold.ConfigError; assert 'torch' not in sys.modules, 'torch'"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)
