"""How a tree ended: the value that the user gets."""

from __future__ import annotations

import enum
import signal as _signal

import attrs

from proctree.records import Cut, Ending, Member, Reason, StageSent, Usage

NOTHING_USED = Usage()


@attrs.frozen
class Outcome:
    """How a tree ended. Published once, after the last byte of its output.

    Attributes:
        returncode: as `subprocess`: the exit status, or minus the signal that ended the main
            process. None when it never ran, or when somebody else took its exit status.
        reason: why the tree ended.
        detail: what `kill(reason=...)` said, or what failed; may be empty.
        stages: the stages of the kill policy that were carried out, with their times.
        leftovers: what was still there when the main process exited (the first 1024).
        survivors: what could not be ended, with state and why.
        usage: CPU and memory of the whole tree.
        duration: seconds from start to the end of the tree.
        containment: the name of the backend that held it.
        tree_id, pid: which tree this was.
        stdout, stderr: what was captured, or None.
        stdout_cut, stderr_cut: what the capture's limit left out, or None.
        callback_errors: how many times an output callback raised.
    """

    returncode: int | None
    reason: Reason
    detail: str = ""
    stages: tuple[StageSent, ...] = ()
    leftovers: tuple[Member, ...] = ()
    survivors: tuple[Member, ...] = ()
    usage: Usage = NOTHING_USED
    duration: float = 0.0
    containment: str = ""
    tree_id: str = ""
    pid: int | None = None
    stdout: bytes | None = attrs.field(default=None, repr=False)
    stderr: bytes | None = attrs.field(default=None, repr=False)
    stdout_cut: Cut | None = None
    stderr_cut: Cut | None = None
    callback_errors: int = 0

    @classmethod
    def of(cls, ending: Ending) -> Outcome:
        """The outcome of what the machine noted."""
        return cls(*ending)

    @property
    def ok(self) -> bool:
        """The main process exited with status 0, by itself, and nothing survived."""
        return self.reason is Reason.EXITED and self.returncode == 0 and not self.survivors

    def describe(self) -> str:
        """One sentence for people."""
        text = f"tree {self.tree_id} (pid {self.pid}): {self.reason}"
        if self.returncode is not None:
            text += f", {_status(self.returncode)}"
        if self.detail:
            text += f" ({self.detail})"
        if self.stages:
            text += ", sent " + ", ".join(stage.signal.name for stage in self.stages)
        if self.survivors:
            alive = "; ".join(f"pid {m.pid} {m.name}: {m.why}" for m in self.survivors)
            text += f"; still there: {alive}"
        return text

    def as_dict(self) -> dict[str, object]:
        """Plain values, for JSON: bytes are decoded as UTF-8 with replacement."""
        return {field.name: _plain(getattr(self, field.name)) for field in attrs.fields(Outcome)}


def _status(returncode: int) -> str:
    if returncode >= 0:
        return f"exit status {returncode}"
    try:
        return f"signal {_signal.Signals(-returncode).name}"
    except ValueError:
        return f"signal {-returncode}"


def _plain(value: object) -> object:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, _signal.Signals):
        return value.name
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, tuple):
        names = getattr(value, "_fields", None)
        plain = [_plain(item) for item in value]
        return plain if names is None else dict(zip(names, plain, strict=True))
    return value
