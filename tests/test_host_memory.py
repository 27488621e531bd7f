"""What a process may still take is the least of what the host has and what the limits of its container leave."""

from pathlib import Path

import pytest
import torch

from grpo.system.host_memory import available_bytes
from grpo.system.out_of_memory import free_bytes

MIB = 2**20
UNLIMITED_V1 = 9223372036854771712


def write(root: Path, files: dict[str, str | int]) -> Path:
    for name, content in {"proc/meminfo": meminfo(1000), **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return root


def meminfo(mib: int) -> str:
    return f"MemTotal:       {9999 * 1024} kB\nMemFree:        12 kB\nMemAvailable:   {mib * 1024} kB\nActive(anon):   5 kB"


def v2(group: str, limit: int | str, usage: int, cached: int) -> dict[str, str | int]:
    folder = f"sys/fs/cgroup/{group}".rstrip("/")
    return {
        f"{folder}/memory.max": limit if isinstance(limit, str) else limit * MIB,
        f"{folder}/memory.current": usage * MIB,
        f"{folder}/memory.stat": f"anon 7\nfile 9999999999\ninactive_file {cached * MIB}\nactive_file 3",
    }


def v1(group: str, limit: int, usage: int, cached: int) -> dict[str, str | int]:
    folder = f"sys/fs/cgroup/memory/{group}".rstrip("/")
    return {
        f"{folder}/memory.limit_in_bytes": limit,
        f"{folder}/memory.usage_in_bytes": usage * MIB,
        f"{folder}/memory.stat": f"inactive_file 1\ntotal_inactive_file {cached * MIB}",
    }


def test_the_tightest_limit_above_a_process_counts_with_the_cached_files_it_may_drop(tmp_path: Path):
    groups = v2("pod/app", "max", 100, 0) | v2("pod", 500, 300, 40) | v2("", 900, 300, 0)
    root = write(tmp_path, {"proc/self/cgroup": "0::/pod/app", **groups})
    assert available_bytes(root) == (500 - 300 + 40) * MIB
    write(root, v2("pod/app", 120, 100, 10))
    assert available_bytes(root) == (120 - 100 + 10) * MIB
    write(root, v2("pod/app", 120, 130, 0))  # a limit that was lowered
    assert available_bytes(root) == 0


@pytest.mark.parametrize("path", ["/", "/docker/1234", "/../other"])
def test_a_container_that_sees_its_own_group_as_the_topmost_has_its_limit(tmp_path: Path, path: str):
    root = write(tmp_path, {"proc/self/cgroup": f"0::{path}", **v2("", 600, 200, 50)})
    assert available_bytes(root) == 450 * MIB


def test_control_groups_of_the_first_version_are_read_too(tmp_path: Path):
    lines = "9:name=systemd:/\n4:cpu,memory:/batch/job\n3:cpuset:/\n0::/"
    groups = v1("batch/job", UNLIMITED_V1, 50, 0) | v1("batch", 800 * MIB, 300, 20)
    root = write(tmp_path, {"proc/self/cgroup": lines, **groups})
    assert available_bytes(root) == 520 * MIB
    write(root, v1("batch", UNLIMITED_V1, 300, 20))
    assert available_bytes(root) == 1000 * MIB


def test_without_a_limit_it_is_what_the_host_has_and_a_host_with_less_than_the_limit_leaves_counts(tmp_path: Path):
    root = write(tmp_path, {})
    assert available_bytes(root) == 1000 * MIB
    write(root, {"proc/self/cgroup": "0::/app"})
    assert available_bytes(root) == 1000 * MIB
    write(root, v2("app", "max", 100, 0))
    assert available_bytes(root) == 1000 * MIB
    write(root, v2("app", 5000, 100, 0))
    assert available_bytes(root) == 1000 * MIB


def test_files_that_are_missing_or_cannot_be_read_are_no_error(tmp_path: Path):
    assert available_bytes(tmp_path) == 0
    root = write(tmp_path, {"proc/self/cgroup": "0::/app", **v2("app", 500, 100, 0)})
    (root / "sys/fs/cgroup/app/memory.stat").unlink()
    assert available_bytes(root) == 400 * MIB
    (root / "sys/fs/cgroup/app/memory.current").unlink()
    (root / "sys/fs/cgroup/app/memory.current").mkdir()
    assert available_bytes(root) == 1000 * MIB


def test_what_is_free_for_a_cpu_is_what_is_available():
    assert 0 < free_bytes(torch.device("cpu")) < 2**50
