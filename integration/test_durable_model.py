"""Any order of claims, crashes, damages and readings: the directory says what a list would."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from proctree.durable.directory import FileClaim, FileStore
from proctree.durable.errors import StillRunning, UnknownKey
from proctree.durable.recording import Cause, Exit, Request
from proctree.records import Usage

KEYS = ("k", "a/b", "x" * 300)
EXITS = st.builds(
    Exit,
    status=st.none() | st.integers(0, 255),
    cause=st.sampled_from(Cause),
    note=st.text(max_size=100),
    **{name: st.just(0) for name in ("error", "step", "pid")},
    duration=st.sampled_from([0.0, 1.5]),
    usage=st.just(Usage()),
)


@attrs.define
class Expected:
    """An attempt, as it should be read."""

    request: Request | None
    handle: str | None = None
    exit: Exit | None = None
    aside: bool = False
    damaged: set[str] = attrs.field(factory=set)

    @property
    def trouble(self) -> bool:
        return bool(self.damaged)


@attrs.define
class Key:
    attempts: dict[int, Expected] = attrs.field(factory=dict)
    claim: FileClaim | None = None


class Directory(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="proctree-durable-"))
        self.store = FileStore(self.folder / "store")
        self.keys = {key: Key() for key in KEYS}
        self.requests = 0

    def teardown(self) -> None:
        for key in self.keys.values():
            if key.claim is not None:
                key.claim.release()
        shutil.rmtree(self.folder)

    def place(self, key: str, number: int) -> Path:
        """Where it really is."""
        return Path(next(a.place for a in self.store.attempts(key) if a.number == number))

    @rule(key=st.sampled_from(KEYS))
    def claim(self, key: str) -> None:
        known = self.keys[key]
        claim = self.store.claim(key)
        assert (claim is None) == (known.claim is not None)
        if claim is not None:
            known.claim = claim
            # What a death left that came before the attempt had its name.
            assert not [n for n in os.listdir(self.store.at(key).attempts) if n.startswith(".")]

    def claimed(self, data: st.DataObject) -> tuple[str, Key, FileClaim]:
        name = data.draw(st.sampled_from([k for k, v in self.keys.items() if v.claim is not None]))
        known = self.keys[name]
        assert known.claim is not None
        return name, known, known.claim

    def one_of(self, data: st.DataObject, known: Key) -> int | None:
        open_ones = [n for n, a in known.attempts.items() if not a.aside]
        return data.draw(st.sampled_from(open_ones)) if open_ones else None

    @precondition(lambda self: any(key.claim for key in self.keys.values()))
    @rule(data=st.data(), tree=st.booleans())
    def begin(self, data: st.DataObject, tree: bool) -> None:
        name, known, claim = self.claimed(data)
        self.requests += 1
        request = Request(
            *(name, "target", "f", "0" * 16, "tree", "boot", 1, "host", 1, self.requests)
        )
        if tree:
            prepared = claim.prepare(request)
            prepared.close()
            attempt = prepared.attempt
        else:
            attempt = claim.begin(request)
        assert attempt.number == max(known.attempts, default=0) + 1
        known.attempts[attempt.number] = Expected(request)

    @precondition(lambda self: any(key.claim for key in self.keys.values()))
    @rule(data=st.data(), how=EXITS)
    def finish(self, data: st.DataObject, how: Exit) -> None:
        name, known, claim = self.claimed(data)
        number = self.one_of(data, known)
        if number is not None and not known.attempts[number].trouble:
            claim.finish(self.store.attempts(name)[number - 1], how)
            known.attempts[number].exit = how

    @precondition(lambda self: any(key.claim for key in self.keys.values()))
    @rule(data=st.data(), handle=st.text(max_size=20))
    def submitted(self, data: st.DataObject, handle: str) -> None:
        name, known, claim = self.claimed(data)
        number = self.one_of(data, known)
        if number is not None:
            claim.submitted(self.store.attempts(name)[number - 1], handle)
            known.attempts[number].handle = handle

    @precondition(lambda self: any(key.claim for key in self.keys.values()))
    @rule(data=st.data())
    def look(self, data: st.DataObject) -> None:
        """What is unreadable is put aside by that, and reads the same from then on."""
        name, known, claim = self.claimed(data)
        found = claim.attempts()
        for attempt in found:
            expected = known.attempts[attempt.number]
            expected.aside = expected.trouble
            assert ("/unreadable/" in attempt.place) == expected.aside
        assert self.store.attempts(name) == found

    @precondition(lambda self: any(key.claim for key in self.keys.values()))
    @rule(data=st.data(), debris=st.sampled_from(["", "beginning", "unnamed", "torn", "handle"]))
    def crash(self, data: st.DataObject, debris: str) -> None:
        """The holder dies, in the middle of something."""
        name, known, claim = self.claimed(data)
        number = self.one_of(data, known)
        if debris == "beginning":
            new = Path(self.store.at(name).attempts, f".{max(known.attempts, default=0) + 1}.new")
            new.mkdir(0o700)
            (new / "request").write_bytes(b"proctree request 1\nkey k\n")
        elif number is not None:
            expected, place = known.attempts[number], self.place(name, number)
            whole = Exit(0).encode()
            if debris == "unnamed" and expected.exit is None and not expected.trouble:
                (place / "exit~").write_bytes(whole + bytes(4096 - len(whole)))
                expected.exit = Exit(0)
            elif debris == "torn" and not (place / "exit~").exists():
                (place / "exit~").write_bytes(whole[:-5])
            elif debris == "handle":
                (place / "handle~").write_bytes(b"proctree handle 1\n")
        claim.release()
        known.claim = None

    @rule(data=st.data(), key=st.sampled_from(KEYS), name=st.sampled_from(["request", "exit"]))
    def damage(self, data: st.DataObject, key: str, name: str) -> None:
        """One byte, anywhere."""
        known = self.keys[key]
        number = self.one_of(data, known)
        if number is None:
            return
        path = self.place(key, number) / name
        if not path.exists():
            return
        expected = known.attempts[number]
        if name in expected.damaged:
            return  # it might become what it was
        content = bytearray(path.read_bytes())
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
        path.write_bytes(content)
        expected.damaged.add(name)
        if name == "request":
            expected.request = None
        else:
            expected.exit = None

    @rule(key=st.sampled_from(KEYS))
    def forget(self, key: str) -> None:
        known = self.keys[key]
        if known.claim is not None:
            if known.attempts:
                with pytest.raises(StillRunning):
                    self.store.forget(key)
        elif known.attempts:
            self.store.forget(key)
            known.attempts.clear()
        else:
            with pytest.raises(UnknownKey):
                self.store.forget(key)

    @invariant()
    def everything_is_as_expected(self) -> None:
        for key, known in self.keys.items():
            seen: list[Any] = [
                (a.number, a.request, a.handle, a.exit, bool(a.trouble))
                for a in self.store.attempts(key)
            ]
            assert seen == [
                (number, e.request, e.handle, e.exit, e.trouble)
                for number, e in known.attempts.items()
            ]
            assert self.store.claimed(key) == (known.claim is not None)
        assert self.store.keys() == sorted(k for k, v in self.keys.items() if v.attempts)


Directory.TestCase.settings = settings(
    max_examples=30,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestDirectory = Directory.TestCase
