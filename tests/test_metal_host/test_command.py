"""python -m metal_host FILE.metal"""

import pytest

from metal_host import survey
from metal_host.__main__ import main

from .test_cooperative_tensors import APPLE10, HEADER

SOURCE = """#include <metal_stdlib>
using namespace metal;
constant float bias [[function_constant(0)]];
kernel void scale(device float* x, constant int& by, threadgroup float* s [[threadgroup(0)]],
                  uint i [[thread_position_in_grid]]) {
  s[i % 8] = x[i] * by + bias;
  x[i] = s[i % 8];
}
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "scale.metal"
    path.write_text(SOURCE)
    return str(path)


RUN = ["--run", "scale", "--constant", "bias=0.5", "--arg", "3:int", "--threadgroup", "0=32", "--group", "8"]


def test_lists_the_kernels(file, capsys):
    assert main([file]) == 0
    listed = capsys.readouterr().out.split("\n")
    assert listed[0] == "scale" and "    device float * x [[buffer(0)]]" in listed
    assert "    threadgroup float * s [[threadgroup(0)]]" in listed


def test_runs_one(file, capsys):
    arguments = [*RUN[:4], "--arg", "arange:float:8", *RUN[4:]]
    assert main([file, *arguments, "--threads", "8"]) == 0
    out = capsys.readouterr().out
    assert "3.5000,  6.5000" in out and "device_bytes_read" in out


def test_tells_faults_and_errors(file, capsys, tmp_path):
    arguments = [*RUN[:4], "--arg", "arange:float:8", *RUN[4:]]
    assert main([file, *arguments, "--threads", "16"]) == 1
    assert "out of bounds" in capsys.readouterr().err
    assert main([file, "--run", "scale"]) == 2
    assert "function constants that have no value: bias" in capsys.readouterr().err
    (tmp_path / "wrong.metal").write_text("kernel void k(device float* o) { o[0] = missing; }")
    assert main([str(tmp_path / "wrong.metal")]) == 1
    assert "undeclared identifier 'missing'" in capsys.readouterr().err


def test_survey(tmp_path, capsys, monkeypatch):
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "shared.h").write_text("inline float one() { return 1; }\n")
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "good.metal").write_text(
        """#include "shared.h"
        template <typename T> [[kernel]] void f(device T* o) { o[0] = one(); }
        template [[host_name("f_float")]] [[kernel]] void f<float>(device float* o);
        template [[host_name("f_int")]] [[kernel]] void f<int>(device int* o);
        kernel void g(device float* o) { o[0] = one(); }"""
    )
    (tmp_path / "kernels" / "bad.metal").write_text(
        """kernel void works(device float* o) { o[0] = 1; }
        template <typename T> kernel void fails(device T* o) { o[0] = T::missing; }
        template [[host_name("fails")]] kernel void fails<float>(device float* o);"""
    )
    (tmp_path / "kernels" / "absent.metal").write_text('#include "absent.h"\nkernel void h(device float* o) {}')
    (tmp_path / "kernels" / "strings.py").write_text(
        'SOURCE = """\n#include <metal_stdlib>\nkernel void s(device float* o) { o[0] = 1; }"""\nPART = "kernel void"'
    )
    page = tmp_path / "page.md"
    page.write_text("# Page\n<!-- survey -->\nold\n<!-- end -->\nafter\n")
    arguments = [f"ours={tmp_path}", "--files", "--all", "--workers", "1", "--into", str(page)]
    monkeypatch.setattr("sys.argv", ["survey", *arguments])
    survey.main()
    out = capsys.readouterr().out
    assert "| ours | 4 | 6 | 5 | 6 | 4 (66 %) |" in out
    assert "| kernels/good.metal | | 3 | 3 | 2 | 2 | |" in out
    assert "| kernels/strings.py:1 | | 1 | 1 | 1 | 1 | |" in out
    assert "'absent.h' file not found" in out
    assert page.read_text() == f"# Page\n<!-- survey -->\n\n{out}\n<!-- end -->\nafter\n"


def test_layouts_of_cooperative_tensors(tmp_path, capsys):
    path = tmp_path / "places.metal"
    path.write_text(HEADER + APPLE10.replace("TB", "false"))
    arguments = ["--version", "4.0", "--run", "places", "--arg", "zeros:int:3072", "--threads", "32", "--group", "32"]
    printed = []
    for layout in ("apple10", "3"):
        assert main([str(path), *arguments, "--layout", layout]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] != printed[1]
    assert main([str(path), *arguments, "--layout", "apple9"]) == 2
