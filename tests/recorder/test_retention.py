"""Retention: what may go is chosen by a pure rule that never takes the newest or the unfinished, and deletion stays inside."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arbl2.errors import ConfigError, TapeError
from arbl2.tape import LOG, MANIFEST, SEGMENTS, TapeReader, load_manifest, save_manifest, sessions
from arbl2_recorder.retention import ASIDE, DAY_NS, Held, Retention, prune, survey
from arbl2_recorder.ship import session_lock, ship_session
from markets import START_NS, Market
from properties.effort import examples

HELD = st.lists(
    st.builds(
        Held,
        name=st.uuids().map(str),
        ended_ns=st.integers(0, 100 * DAY_NS),
        bytes=st.integers(0, 1_000),
        ended=st.booleans(),
        shipped=st.booleans(),
    ),
    max_size=12,
    unique_by=lambda session: session.name,
)
RULES = st.builds(
    Retention,
    keep_days=st.none() | st.floats(0.01, 100),
    keep_bytes=st.none() | st.integers(1, 6_000),
    only_shipped=st.booleans(),
)


def newest(held):
    return max(held, key=lambda session: (session.ended_ns, session.name))


def may_go(session, rule, held):
    return session.ended and session is not newest(held) and (session.shipped or not rule.only_shipped)


@examples(100)
@given(HELD, RULES, st.integers(0, 200 * DAY_NS))
def test_what_must_stay_stays(held, rule, now_ns):
    going = rule.chosen(held, now_ns)
    assert all(may_go(session, rule, held) for session in going)
    assert going == sorted(going, key=lambda session: (session.ended_ns, session.name))
    assert rule.chosen(held[::-1], now_ns) == going


@examples(100)
@given(HELD, RULES, st.integers(0, 200 * DAY_NS))
def test_afterwards_the_limits_hold_or_nothing_is_left_to_delete(held, rule, now_ns):
    going = rule.chosen(held, now_ns)
    left = [session for session in held if session not in going]
    free = [session for session in left if may_go(session, rule, held)]
    if rule.keep_days is not None:
        assert all(now_ns - session.ended_ns <= rule.keep_days * DAY_NS for session in free)
    if rule.keep_bytes is not None:
        assert sum(session.bytes for session in left) <= rule.keep_bytes or not free


@examples(100)
@given(HELD, RULES, st.integers(0, 200 * DAY_NS))
def test_nothing_goes_without_need(held, rule, now_ns):
    """Each one that goes is too old, or there is too much with it and everything younger that stays or goes after it."""
    going = rule.chosen(held, now_ns)
    left = sum(session.bytes for session in held)
    for session in going:
        old = rule.keep_days is not None and now_ns - session.ended_ns > rule.keep_days * DAY_NS
        assert old or (rule.keep_bytes is not None and left > rule.keep_bytes)
        left -= session.bytes
    if rule.keep_days is None and rule.keep_bytes is None:
        assert going == []


@pytest.mark.parametrize("limits", [{"keep_days": 0.0}, {"keep_bytes": 0}, {"keep_days": -1.0}, {"keep_days": float("nan")}])
def test_a_limit_that_keeps_nothing_is_refused(limits):
    with pytest.raises(ConfigError, match="must be above 0"):
        Retention(**limits)


# ------------------------------------------------------------------------------------------------------------------- on a disk


def a_session(root, name, days):
    """A session whose only frame came that many days after the start of the market."""
    market = Market()
    market.upbit(0, [(1, 1)], [(2, 1)])
    market.frames[0] = replace(market.frames[0], recv_ns=START_NS + days * DAY_NS)
    return market.write(root / name, name)


@pytest.fixture
def root(tmp_path):
    for days, name in enumerate(("a", "b", "c", "d")):
        a_session(tmp_path / "tapes", name, days)
    return tmp_path / "tapes"


def names(root):
    return sorted(path.name for path in root.iterdir())


NOW_NS = START_NS + 10 * DAY_NS


def test_old_sessions_go_and_the_newest_stays(root):
    days = Retention(keep_days=8.5)
    assert [item.session for item in prune(root, days, now_ns=NOW_NS, dry_run=True)] == ["a", "b"]
    assert names(root) == ["a", "b", "c", "d"]
    done = prune(root, days, now_ns=NOW_NS)
    assert [(item.session, item.problem) for item in done] == [("a", ""), ("b", "")]
    assert names(root) == ["c", "d"]
    prune(root, Retention(keep_days=0.001), now_ns=NOW_NS)
    assert names(root) == ["d"]
    TapeReader(root / "d").verify_hashes()


def test_the_oldest_go_until_there_is_little_enough(root):
    one = survey(root)[0].bytes
    assert one == sum(path.stat().st_size for path in (root / "a").rglob("*") if path.is_file())
    prune(root, Retention(keep_bytes=3 * one), now_ns=NOW_NS)
    assert names(root) == ["b", "c", "d"]
    prune(root, Retention(keep_bytes=1), now_ns=NOW_NS)
    assert names(root) == ["d"]


def test_the_unfinished_the_unreadable_and_the_foreign_stay(root, tmp_path):
    for name, state in (("a", "recording"), ("b", "sealed")):
        manifest = load_manifest(root / name)
        save_manifest(
            root / name,
            type(manifest)(**{field: getattr(manifest, field) for field in manifest.__struct_fields__} | {"state": state}),
        )
    (root / "b" / LOG).mkdir()
    (root / "b" / LOG / "000002.log").write_bytes(b"not sealed yet")
    (root / "c" / MANIFEST).write_text("{")
    (root / "notes").mkdir()
    (root / "notes" / "mine.txt").write_text("mine")
    outside = a_session(tmp_path / "outside", "x", 0)
    (root / "x").symlink_to(outside)
    assert prune(root, Retention(keep_days=1, keep_bytes=1), now_ns=NOW_NS) == []
    assert names(root) == ["a", "b", "c", "d", "notes", "x"]
    TapeReader(outside).verify_hashes()


def test_links_inside_are_removed_and_not_followed(root, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    (root / "a" / "link").symlink_to(tmp_path / "mine")
    prune(root, Retention(keep_days=9.5), now_ns=NOW_NS)
    assert names(root) == ["b", "c", "d"]
    assert (tmp_path / "mine" / "file").read_text() == "mine"


def test_a_session_put_aside_is_none_and_goes_with_the_next_call(root):
    (root / "a").rename(root / f"{ASIDE}a")
    assert [path.name for path in sessions(root)] == ["b", "c", "d"]
    assert prune(root, Retention(), now_ns=NOW_NS) == []
    assert names(root) == ["b", "c", "d"]


def test_a_folder_that_is_not_there_is_said(tmp_path):
    with pytest.raises(TapeError, match="there is no folder"):
        prune(tmp_path / "none", Retention(keep_days=1), now_ns=NOW_NS)


def test_a_session_being_shipped_is_left_alone(root):
    with session_lock(root / "a"):
        [pruned] = prune(root, Retention(keep_days=9.5), now_ns=NOW_NS)
    assert "another process" in pruned.problem
    TapeReader(root / "a").verify_hashes()


def test_only_what_has_a_whole_copy_goes(root, tmp_path):
    rule = Retention(keep_days=1, only_shipped=True)
    assert prune(root, rule, now_ns=NOW_NS) == []
    for name in ("a", "b", "c"):
        ship_session(root / name, str(tmp_path / "far"))
    (tmp_path / "far" / "a" / SEGMENTS / "000001.parquet").write_bytes(b"changed")
    shutil.rmtree(tmp_path / "far" / "b")
    done = {item.session: item.problem for item in prune(root, rule, now_ns=NOW_NS)}
    assert "is not what was shipped" in done["a"]
    assert "cannot be used" in done["b"]
    assert done["c"] == ""
    assert names(root) == ["a", "b", "d"]
    for name in ("a", "b"):
        TapeReader(root / name).verify_hashes()
