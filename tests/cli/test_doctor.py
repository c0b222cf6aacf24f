"""`ringfold doctor` finds what is there, says what to do about what is not, and never fails itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from ringfold.launch import cli, doctor, machine


def found(findings: list[doctor.Finding]) -> dict[str, doctor.Finding]:
    return {finding.name: finding for finding in findings}


def test_doctor_sees_what_this_machine_has_and_exits_with_0() -> None:
    result = CliRunner().invoke(cli.ringfold, ["doctor"], catch_exceptions=False)
    assert result.exit_code == 0
    for name in ("Python", "torch", "C++ core", "shared memory", "tcp", "cores", "/dev/shm", "NCCL", "MPI", "ssh", "Slurm"):
        assert name in result.output
    findings = found(doctor.examine())
    for name in ("Python", "torch", "C++ core", "shared memory", "unix sockets", "tcp"):
        assert findings[name].status == "works"


def test_whatever_is_broken_has_an_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> int:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(doctor, "_version", lambda _: None)
    monkeypatch.setattr(doctor.os, "memfd_create", forbidden)
    monkeypatch.setattr(doctor.shutil, "which", lambda _: None)
    monkeypatch.setattr(machine, "cpu_quota", lambda: 0.5)
    findings = found(doctor.examine())
    assert findings["torch"].advice == "pip install torch"
    assert "--transport tcp" in findings["shared memory"].advice
    assert findings["cores"].seen.startswith("1 usable")
    assert not [finding for finding in findings.values() if finding.status in ("broken", "slow") and not finding.advice]


def test_a_check_that_fails_is_a_finding_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def explode() -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(doctor, "_CHECKS", (explode, doctor._machine))
    findings = doctor.examine()
    assert (findings[0].status, findings[0].seen) == ("broken", "RuntimeError: no such kernel")
    assert "cores" in found(findings)


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.cfs_quota_us": "50000\n", "cpu.cfs_period_us": "100000\n"}, 0.5),
        ({"cpu.cfs_quota_us": "-1\n", "cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_quotas_of_both_versions_of_cgroups_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], quota: float | None
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(machine, "_cgroup_folders", lambda _: [tmp_path])
    assert machine.cpu_quota() == quota
    assert machine.cores() >= 1
