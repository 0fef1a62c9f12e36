"""The table of finished runs."""

import pytest

from pss_composer.evaluation.measuring import flop_shares, format_table
from pss_composer.evaluation.runs import load_runs


def test_runs_of_one_architecture_share_the_flop_column(runs):
    rows = [line.split() for line in format_table(load_runs([runs / "digits", runs / "digits_pss"])).splitlines()]
    assert rows[0] == ["keep", "rate", "FLOP", "share", "digits", "digits_pss"]
    assert [row[0] for row in rows[2:7]] == ["1.0", "0.8", "0.6", "0.4", "0.2"]
    # in two batches an epoch, half of them at 0.2 and half at 1: the share is between
    assert rows[-1][:3] == ["training,", "FLOP", "share"]
    assert float(rows[-1][3]) == 1.0 and 0.55 < float(rows[-1][4]) < 0.65
    assert rows[-2][:2] == ["training,", "s"] and all(0 < float(cell) < 100 for cell in rows[-2][2:])


def test_runs_of_two_architectures_have_flop_columns_of_their_own(runs):
    narrow, wide = load_runs([runs / "digits_pss", runs / "wide"])
    lines = format_table([narrow, wide], [1.0, 0.5]).splitlines()
    titles = " ".join(lines[0].split())
    assert titles == "keep rate FLOP share of digits_pss FLOP share of wide digits_pss wide"
    shares = [float(cell) for cell in lines[3].split()[1:3]]
    assert shares[0] != shares[1]  # the share of the patch embedding, which sees all patches, depends on the width
    assert shares == pytest.approx([flop_shares(run, [0.5])[0.5] for run in (narrow, wide)], abs=6e-4)
    assert len({len(line) for line in lines}) == 1
