"""The page of a federation: every client, what crossed, why somebody is missing; nothing fetched."""

import re
from dataclasses import replace

from treadle.recipes.federate import Watched
from treadle.reports.federations import federation_page
from treadle.train.federated.standing import ClientRow, RoundReport

ACCEPTED = ClientRow("north", "accepted", "", 1200, 3400, 0.5, 1.25, 1e-6)
MISSING = ClientRow("south <b>", "rejected", "'B' holds NaN & more", 1200, 77)
REPORT = RoundReport(1, (ACCEPTED, MISSING), 1, 2.0, 9876, 0.5, ((1.0,),), None, 0.0)


def test_the_page_names_everybody_and_escapes_it() -> None:
    later = replace(REPORT, server_round=2, noise_to_signal=3.0)
    page = federation_page(Watched("triage", "ffa", 5, (REPORT, later), finished=False))
    assert "round 2 of 5" in page
    assert "south &lt;b&gt;" in page
    assert "holds NaN &amp; more" in page
    assert "6,800" in page  # bytes up of two rounds
    assert "9,876" in page
    assert "ε 1.25" in page
    assert "<b>south" not in page
    assert "<script" not in page
    assert re.findall(r'(?:src|href)="[^"#]', page) == []


def test_a_page_before_the_first_round_is_a_page() -> None:
    assert "round 0 of 5" in federation_page(Watched("triage", "ffa", 5, (), finished=False))
