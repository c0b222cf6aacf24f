"""The tree of errors: its shape, its exit codes, and what a traceback calls them."""

import subprocess
import sys

import pytest
from ringfold.collectives import errors

TREE = {
    errors.RingfoldError: {errors.ConfigError, errors.CommunicationError, errors.CheckpointError, errors.LaunchError},
    errors.ConfigError: {errors.LayoutError, errors.PrecisionError},
    errors.CommunicationError: {
        errors.ConnectError,
        errors.AuthenticationError,
        errors.PeerLost,
        errors.CollectiveTimeout,
        errors.CollectiveMismatch,
    },
    errors.CheckpointError: {errors.Incomplete, errors.Corrupt, errors.Incompatible},
}
ALL = sorted([errors.RingfoldError, *(child for children in TREE.values() for child in children)], key=lambda error: error.__name__)


@pytest.mark.parametrize("parent", TREE, ids=lambda parent: parent.__name__)
def test_tree_has_the_documented_children(parent):
    assert {child for child in ALL if child.__bases__ == (parent,)} == TREE[parent]


@pytest.mark.parametrize("error", ALL, ids=lambda error: error.__name__)
def test_wrong_input_ends_with_2_and_a_failed_run_with_1(error):
    is_input = issubclass(error, errors.ConfigError | errors.CheckpointError | errors.LaunchError)
    assert error.exit_code == (2 if is_input else 1)


@pytest.mark.parametrize("error", ALL, ids=lambda error: error.__name__)
def test_traceback_names_the_error_as_users_import_it(error):
    assert f"{error.__module__}.{error.__qualname__}" == f"ringfold.{error.__name__}"


def test_communication_error_names_no_peer_unless_told():
    error = errors.PeerLost("rank 3 ended")
    assert error.peer == -1
    error.peer = 3
    assert (error.peer, errors.PeerLost.peer) == (3, -1)


@pytest.mark.parametrize(("word", "meant"), [("dpp", "dp"), ("Recompute", "recompute"), ("recompte", "recompute"), ("qqqq", None), ("", None)])
def test_nearest_finds_what_was_meant(word, meant):
    assert errors.nearest(word, ["dp", "tp", "recompute"]) == meant


def test_control_plane_does_not_import_torch():
    modules = ["errors", "environment", "page", "conversation", "acceptor", "authentication", "connect", "store", "handoff", "rendezvous"]
    program = f"import sys, {', '.join(f'ringfold.collectives.{name}' for name in modules)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0
