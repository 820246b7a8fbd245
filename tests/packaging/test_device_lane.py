"""Every test that takes a device runs on each there is, and none of them names one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SUITES = [f"tests/{room}/test_devices.py" for room in ("tuning", "choosing", "deltas", "memory", "integrations")]
NAMES_ONE = re.compile(r"""device\s*=\s*["']|torch\.device\(["']|\.cuda\(|\.to\(["']cuda""")


@pytest.mark.parametrize("devices", [["cpu"], ["cpu", "cuda"], ["cuda"]], ids=",".join)
def test_each_test_is_collected_for_each_device(devices):
    collected = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *SUITES],
        cwd=ROOT,
        env={**os.environ, "FPS_TEST_DEVICES": ",".join(devices)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    names = [line for line in collected.splitlines() if "::" in line]
    found = [tuple(re.findall(r"(?<=[\[-])(?:cpu|cuda)(?=[\]-])", name)) for name in names]
    assert {len(one) for one in found} == {1}, "a test in these files does not take a device"
    counts = {device: found.count((device,)) for device in devices}
    assert len(set(counts.values())) == 1
    assert sum(counts.values()) == len(names)
    assert all(any(name.startswith(suite) for name in names) for suite in SUITES)


@pytest.mark.parametrize("suite", SUITES)
def test_no_test_that_takes_a_device_names_one(suite):
    text = (ROOT / suite).read_text()
    assert not NAMES_ONE.findall(text)
    taking = re.findall(r"^def test_\w+\((.*?)\)", text, re.MULTILINE | re.DOTALL)
    assert taking
    assert all("device" in re.split(r",\s*", arguments) for arguments in taking)
