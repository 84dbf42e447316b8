"""What kernel files declare, and the choice of an architecture."""

import pytest

from cutp.array.kernel_source import choose_arch, kernel_sources, parse_declarations, read_source
from cutp.errors import ConfigError, DeviceError
from tests.array.samples import write_scale


def test_lines_multiply_out_and_add_up():
    declared = parse_declarations("""\
        // archs: sm_80 sm_90a
        // variants: DTYPE=BF16,F16 HEAD_DIM=64,128
        // variants: DTYPE=F32 HEAD_DIM=64 WINDOW
        // variants[sm_90a]: TMA
        int variants;  // variants: are declared above only
    """, "k.cu")
    common = (
        ("DTYPE=BF16", "HEAD_DIM=64"), ("DTYPE=BF16", "HEAD_DIM=128"),
        ("DTYPE=F16", "HEAD_DIM=64"), ("DTYPE=F16", "HEAD_DIM=128"),
        ("DTYPE=F32", "HEAD_DIM=64", "WINDOW"),
    )
    assert declared == {"sm_80": common, "sm_90a": (*common, ("TMA",))}


def test_without_variants_there_is_one():
    assert parse_declarations("//archs:sm_80\n", "k.cu") == {"sm_80": ((),)}


@pytest.mark.parametrize(("text", "message"), [
    ("", "k.cu: no line '// archs:"),
    ("// variants: A=1", "k.cu: no line '// archs:"),
    ("// archs: sm_80\n\n// variants:", "k.cu:3: '// variants:' lists nothing"),
    ("// archs: sm_80 sm_8", "k.cu:1: GPU architecture 'sm_8' is not like"),
    ("// archs: sm_80 sm_80", "k.cu: an architecture is listed twice"),
    ("// archs[sm_80]: sm_80", "k.cu:1: '// archs' takes no brackets"),
    ("// archs: sm_80\n// variants: A=1,,2", "k.cu:2: kernel definition 'A='"),
    ("// archs: sm_80\n// variants: A=1 A=2", "k.cu:2: kernel definition A is given twice"),
    ("// archs: sm_80\n// variants[sm_90]: A=1", r"k.cu:2: variants\[sm_90\]: the file's archs are sm_80"),
    ("// archs: sm_80\n// variants: A=1,2\n// variants: A=2", "k.cu:3: A=2 for sm_80 is declared at k.cu:2 already"),
    ("// archs: sm_80 sm_90\n// variants[sm_90]: A=1", "k.cu: no variant is declared for sm_80"),
])
def test_malformed_declarations(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_declarations(text, "k.cu")


@pytest.mark.parametrize(("capability", "chosen"), [
    ((8, 0), "sm_80"), ((8, 6), "sm_80"), ((8, 9), "sm_80"), ((9, 0), "sm_90a"), ((10, 0), "sm_100"),
    ((10, 3), "sm_100"), ((7, 5), None), ((12, 0), None),
])
def test_the_architecture_for_a_gpu(capability, chosen):
    assert choose_arch(capability, ("sm_80", "sm_90a", "sm_100")) == chosen


def test_the_most_special_architecture_that_runs_is_chosen():
    archs = ("sm_90", "sm_90a", "sm_100", "sm_100f", "sm_100a", "sm_103")
    assert choose_arch((9, 0), archs) == "sm_90a"
    assert choose_arch((10, 0), archs) == "sm_100a"
    assert choose_arch((10, 3), archs) == "sm_103"
    assert choose_arch((10, 3), archs[:-1]) == "sm_100f"


def test_a_source_knows_its_headers_and_variants(tmp_path):
    (tmp_path / "inner.cuh").write_text("int inner;")
    source = read_source(write_scale(tmp_path, helper='#include "inner.cuh"\n#include "elsewhere.h"\n'))
    assert source.name == "scale.cu" and source.archs == ("sm_80", "sm_90a", "sm_100")
    assert list(source.headers) == ["helper.cuh", "inner.cuh"] and source.headers["inner.cuh"] == "int inner;"
    assert list(source.builds()) == [(a, (f"FACTOR={f}",)) for a in source.archs for f in (2, 3)]
    source.check_variant("sm_80", ("FACTOR=3",))
    with pytest.raises(ConfigError, match="scale.cu declares no variant with FACTOR=4 for sm_80"):
        source.check_variant("sm_80", ("FACTOR=4",))
    with pytest.raises(ConfigError, match="scale.cu declares no variant with no definitions for sm_90"):
        source.check_variant("sm_90", ())
    assert source.arch_for((8, 6)) == "sm_80"
    with pytest.raises(DeviceError, match=r"scale.cu has no code for a GPU of compute capability 12.0.*sm_80, sm_90a"):
        source.arch_for((12, 0))


def test_a_missing_file_and_the_list_of_files(tmp_path):
    with pytest.raises(ConfigError, match="kernel file .*no_such.cu cannot be read"):
        read_source("no_such.cu")
    write_scale(tmp_path)
    assert [s.name for s in kernel_sources(tmp_path)] == ["scale.cu"]
