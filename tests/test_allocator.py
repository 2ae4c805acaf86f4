"""Freed memory is used again instead of being taken from the system each time."""

import subprocess
import sys
import textwrap

import pytest

pytest.importorskip("resource")


def faults_of_a_freed_block(setup: str) -> int:
    """Page faults of writing 64 MiB that were written and freed before, in a fresh process."""
    code = f"""
    import resource
    import torch
    from lsgm.system.allocator import keep_freed_memory

    {setup}
    # The heap needs several blocks to find its size.
    for _ in range(24):
        torch.ones(2**24)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a setting of glibc")
def test_freed_memory_is_used_again(monkeypatch):
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    for name in ("MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    pages = 2**26 // 4096
    assert faults_of_a_freed_block("pass") > pages / 2
    assert faults_of_a_freed_block("assert keep_freed_memory()") < pages / 50
