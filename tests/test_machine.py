"""What there is to compute with."""

from pathlib import Path

import pytest
import torch

from cwdm.machine import capacity, choose_bf16


@pytest.mark.parametrize(
    ("capabilities", "bf16"),
    [
        ({"amx_bf16": True, "avx512_bf16": True, "cpu_name": "Intel Xeon"}, True),
        ({"avx512_bf16": True, "cpu_name": "AMD EPYC"}, True),
        ({"avx512_bf16": True, "cpu_name": "Intel Xeon"}, False),
        ({"avx512_bf16": False}, False),
        ({}, False),
    ],
)
def test_bfloat16_is_chosen_where_the_processor_multiplies_in_it(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], bf16: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    device = torch.device("cpu")
    assert choose_bf16("auto", device) is bf16
    assert choose_bf16("bf16", device) is True
    assert choose_bf16("fp32", device) is False


@pytest.mark.parametrize(
    ("group", "limits", "expected"),
    [
        ("0::/", {}, None),
        ("0::/", {"memory.max": "max\n"}, None),
        ("0::/", {"memory.max": f"{2**62}\n"}, None),
        ("0::/", {"memory.max": f"{2**28}\n"}, 2**28),
        ("0::/job/step", {"job/memory.max": f"{2**28}\n", "job/step/memory.max": "max\n"}, 2**28),
        ("0::/job/step", {"job/memory.max": "max\n", "job/step/memory.max": f"{2**27}\n"}, 2**27),
        ("0::/of/the/host", {"memory.max": f"{2**28}\n"}, 2**28),
        ("0::/job", {"other/memory.max": f"{2**27}\n"}, None),
        ("1:cpu:/a\n2:memory,x:/b", {"memory/b/memory.limit_in_bytes": f"{2**28}\n"}, 2**28),
        ("1:cpu:/a\n2:memory:/b", {"memory/a/memory.limit_in_bytes": f"{2**27}\n"}, None),
    ],
)
def test_what_a_container_or_a_job_may_take_is_what_there_is(
    tmp_path: Path, group: str, limits: dict[str, str], expected: int | None
) -> None:
    own, groups = tmp_path / "cgroup", tmp_path / "groups"
    own.write_text(group + "\n")
    for name, text in limits.items():
        file = groups / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    everything = capacity(groups, tmp_path / "absent")
    assert everything > 2**28
    assert capacity(groups, own) == (expected or everything)
