"""The reader of listings on one made up: a tile loop around two loops over keys, and waits that end behind it all."""

import pytest
from tests.hopper.listing import in_memory, innermost_loops

LISTING = """
        BRX R8 -0x290
tile:   LDL R1, [R4]
        HGMMA.64x128x16.F32.BF16 R24, R8, gdesc[UR4], RZ, !UPT
keys:   @!P1 BRA wait
had:    HGMMA.64x128x16.F32.BF16 R24, R8, gdesc[UR4], R24
        @P2 BRA plain
        FADD R1, R1, R2
plain:  @P1 BRA keys
        STL [R4], R1
more:   HGMMA.64x128x16.F32.BF16 R24, R8, gdesc[UR4], R24
        @!P1 BRA last
held:   BRA.U !UP0, more
        @P3 BRA tile
        EXIT
copies: LDL R1, [R4]
        STSM.16.M88.4 [R5], R8
        @P1 BRA copies
        EXIT
wait:   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [R1], R2
        @!P1 BRA wait
        BRA had
last:   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [R1], R2
        @!P1 BRA last
        BRA held
"""


def printed(listing):
    """`listing` as the disassembler prints it, with addresses for labels."""
    lines = [line.partition(":") if ":" in line else ("", "", line) for line in listing.strip("\n").splitlines()]
    text = "".join(
        f"        /*{16 * i:04x}*/  {x.strip()} ;  /* 0x000000f000ac8947 */\n" for i, (*_, x) in enumerate(lines)
    )
    for i, (label, *_) in enumerate(lines):
        text = text.replace(f" {label} ;", f" {16 * i:#x} ;") if label else text
    return text


def test_innermost_loops():
    first, second = innermost_loops(printed(LISTING), "HGMMA", "QGMMA")
    assert first == ["BRA", "HGMMA", "BRA", "FADD", "BRA", "SYNCS", "BRA", "BRA"]
    assert second == ["HGMMA", "BRA", "BRA", "SYNCS", "BRA", "BRA"]
    assert [in_memory(x) for x in (first, second)] == [0, 0]  # what the tile loop and the copies keep is not theirs
    assert innermost_loops(printed(LISTING), "STSM") == [["LDL", "STSM", "BRA"]]
    assert not innermost_loops(printed(LISTING), "QGMMA")


@pytest.mark.parametrize("place", ["FADD R1, R1, R2", "BRA.U !UP0, more", "BRA had"])
@pytest.mark.parametrize("spill", ["STL.64 [R4+0x8], R2", "@P2 LDL R2, [R4]"])
def test_numbers_kept_in_memory(place, spill):
    """In the middle of a loop, before its branch and in what it calls behind the kernel."""
    changed = LISTING.replace(place, f"{spill}\n        {place}")
    assert sum(in_memory(x) for x in innermost_loops(printed(changed), "HGMMA")) == 1
