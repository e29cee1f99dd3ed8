import re

from tools import sass

USAGE = """
Fatbin elf code:
================
arch = sm_80
 Function _ZN5moert4cuda14permute_kernelINS0_5ChunkEEEv:
  REG:48 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:408 TEXTURE:0 SURFACE:0 SAMPLER:0
arch = sm_90a
 Function _ZN5moert4cuda13gating_kernelIfLi8ELb1EEEv:
  REG:77 STACK:16 SHARED:0 LOCAL:0 CONSTANT[0]:472 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _ZN5moert4cuda13gating_kernelIdLi8ELb1EEEv:
  REG:77 STACK:16 SHARED:0 LOCAL:0 CONSTANT[0]:472 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
CODE = """
arch = sm_80
        Function : _ZN5moert4cuda14permute_kernelINS0_5ChunkEEEv
        /*0010*/  LDG.E.128 R4, [R2.64] ;
        Function : _ZN5moert4cuda13gating_kernelIfLi8ELb1EEEv
        /*0010*/  LDG.E R4, [R2.64] ;
"""


def test_reads_registers_and_local_memory():
    first, second, third = sass.kernels(USAGE)
    assert (first.arch, first.registers, first.local) == ("sm_80", 48, 0)
    assert (second.arch, second.local) == ("sm_90a", 16) and third.name.endswith("IdLi8ELb1EEEv")


def test_reads_code_by_kernel_and_architecture():
    found = sass.code(CODE)
    assert {arch for _, arch in found} == {"sm_80"} and len(found) == 2
    assert "LDG.E.128" in found["_ZN5moert4cuda14permute_kernelINS0_5ChunkEEEv", "sm_80"]


def test_says_what_is_wrong():
    said = "\n".join(sass.complaints(sass.kernels(USAGE), sass.code(CODE)))
    assert "sm_90a _ZN5moert4cuda13gating_kernelIfLi8ELb1EEEv: 16 bytes of local memory" in said
    assert "gating_kernelIdLi8ELb1EEEv: 16 bytes" not in said  # float64 may spill
    assert "gating_kernelIfLi8ELb1EEEv: no \\bLDG" in said and "logits are read 16 bytes at a time" in said
    assert "permute_kernelINS0_5ChunkEEEv: no \\bSTG" in said and "permute_kernelINS0_5ChunkEEEv: no \\bLDG" not in said
    for arch in sass.WANTED_ARCHS:
        assert re.search(rf"no kernel matches unpermute_kernel\S* on {arch}\n", said), arch
    assert "no kernel matches GemmUniversal on sm_90a" in said and "GemmUniversal on sm_80" not in said


def test_an_architecture_that_is_missing_is_said():
    assert "sm_90a: no kernel" in sass.complaints(sass.kernels(USAGE)[:1], {})
