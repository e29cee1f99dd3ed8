import re

from tools import sass

CODE = """
arch = sm_80
        Function : _ZN5moert4cuda14permute_kernelINS0_5ChunkEEEv
        /*0010*/  LDG.E.128 R4, [R2.64] ;
        Function : _ZN5moert4cuda13gating_kernelIfLi8ELb1EEEv
        /*0010*/  LDG.E R4, [R2.64] ;
        /*0020*/  STL.64 [R1], R4 ;
        Function : _ZN5moert4cuda13gating_kernelIdLi8ELb1EEEv
        /*0010*/  LDL.64 R4, [R1] ;
"""


def test_reads_code_by_kernel_and_architecture():
    found = sass.code(CODE)
    assert {arch for _, arch in found} == {"sm_80"} and len(found) == 3
    assert "LDG.E.128" in found["_ZN5moert4cuda14permute_kernelINS0_5ChunkEEEv", "sm_80"]


def test_says_what_is_wrong():
    said = "\n".join(sass.complaints(sass.code(CODE)))
    assert "sm_80 _ZN5moert4cuda13gating_kernelIfLi8ELb1EEEv: 1 loads and stores of local memory" in said
    assert "gating_kernelIdLi8ELb1EEEv: 1 loads" not in said  # float64 may spill
    assert "gating_kernelIfLi8ELb1EEEv: no \\bLDG" in said and "logits are read 16 bytes at a time" in said
    assert "permute_kernelINS0_5ChunkEEEv: no \\bSTG" in said and "permute_kernelINS0_5ChunkEEEv: no \\bLDG" not in said
    for arch in sass.WANTED_ARCHS:
        assert re.search(rf"no kernel matches unpermute_kernel\S* on {arch}\n", said), arch
    assert "no kernel matches GemmUniversal on sm_90a" in said and "GemmUniversal on sm_80" not in said


def test_an_architecture_that_is_missing_is_said():
    assert "sm_90a: no kernel" in sass.complaints(sass.code(CODE))


def test_what_a_kernel_has_too_often_is_said():
    code = "arch = sm_90a\n Function : _Z30grouped_gemm_persistent_kernelE\n UCGABAR_ARV ;\n" + "MEMBAR.ALL.GPU ;\n" * 3
    said = "\n".join(sass.complaints(sass.code(code)))
    assert "grouped_gemm_persistent_kernelE: 3 \\bMEMBAR\\.ALL\\.GPU\\b, at most 2: no warp waits" in said
    assert "at most" not in "\n".join(sass.complaints(sass.code(code.replace("MEMBAR", "OTHER", 1))))
