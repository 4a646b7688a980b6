"""What docs/workers.md says of settings is so."""

import dataclasses
import re
from pathlib import Path

from langchain_aegis.settings import AegisSettings

PAGE = Path(__file__).parent.parent / "docs" / "workers.md"
TEXT = PAGE.read_text()
FIELDS = {f"AEGIS_{f.name.upper()}": f for f in dataclasses.fields(AegisSettings)}


def test_every_setting_that_is_named_exists_and_has_the_default_that_is_said():
    assert set(re.findall(r"AEGIS_[A-Z_]+", TEXT)) <= set(FIELDS)
    rows = dict(re.findall(r"(?m)^\| `(AEGIS_[A-Z_]+)`[^|]*\| ([^|]*?) \|", TEXT))
    assert {"AEGIS_SHARED_SLOTS", "AEGIS_SLOT_LEASE_S"} <= set(rows)
    for name, told in rows.items():
        default = FIELDS[name].default
        assert told.strip("`") == (
            "off" if default is False else f"{default:g}" if isinstance(default, float) else default
        )


def test_links_lead_somewhere():
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)]*))?\)", TEXT):
        path = PAGE.parent / target if target else PAGE
        assert path.exists()
        if anchor:
            heads = re.findall(r"(?m)^#+ (.*)$", path.read_text())
            assert anchor in {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
