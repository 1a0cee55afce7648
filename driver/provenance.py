"""Where a force comes from: which version served a call, which labels made it, what the gate said of it. Reads the store and nothing else."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from tumbaga.driver.errors import DriverError
from tumbaga.driver.recording import CONVERSATION, JOURNAL, RAMP
from tumbaga.online.records import Reason
from tumbaga.online.store import Ramp, Store, StoredVersion

_NEAR: Final = 2  # audits before a call, and as many after it, that are told


class TraceError(DriverError):
    """A force cannot be traced, or there was none."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.problem = problem

    def __str__(self) -> str:
        return f"trace: {self.problem}"


@dataclass(frozen=True)
class Conversation:
    """One conversation of a session; see `recording` for the numbers of calls."""

    session: str
    number: int
    first_call: int
    calls: int
    over: bool
    step: int | None
    engine: float | None
    ramp_steps: int


@dataclass(frozen=True)
class Served:
    """What served a call: (1 - weight) of `old` and weight of `new`, by number; one and the same outside ramps.

    `weight` is None where only its range, `low` to 1, is known: the settings have changed since. `ramp` is the one that the call is on.
    """

    old: int
    new: int
    weight: float | None
    low: float
    ramp: Ramp | None


# -- finding the call ----------------------------------------------------------------------------------------------------------------------


def conversations(store: Store) -> list[Conversation]:
    """All conversations of all sessions, in the order in which they began."""
    noted: dict[str, Any] = json.loads(store.get_meta(JOURNAL) or "{}").get("calls", {})
    events = store.events(CONVERSATION)
    found = []
    for place, event in enumerate(events):
        later = next((one for one in events[place + 1 :] if one["session"] == event["session"]), None)
        if later is not None:
            calls, over = later["first_call"] - event["first_call"], bool(later["exact"])
        else:
            calls, over = noted.get(event["session"], (0, False))
        began = (event["session"], event["conversation"], event["first_call"])
        found.append(Conversation(*began, int(calls), bool(over), event["step"], event["engine"], event["ramp_steps"]))
    return found


def find(
    store: Store, step: int | None, *, session: str | None = None, conversation: int | None = None, call: int | None = None
) -> tuple[Conversation, int]:
    """Return a conversation and the number of a call in it, from 0.

    Args:
        store: of the run.
        step: of the engine, where this run started it; of the conversation, counted from 0, where the engine came by itself.
        session: its name; may be left out where there is one.
        conversation: which one of the session, from 1; may be left out where there is one, or where the engine is of this run.
        call: number of the force call of the session, through all its conversations, from 0; instead of a step.

    Raises:
        TraceError: there is no such call, or more than one.
    """
    held = _of_session(conversations(store), session)
    if conversation is not None:
        held = [one for one in held if one.number == conversation]
        if not held:
            raise TraceError(f"there is no conversation {conversation} of that session")
    if call is not None:
        for one in held:
            if one.first_call <= call < one.first_call + one.calls:
                return one, call - one.first_call
        raise TraceError(f"there is no force call {call}; the store knows of {held[0].first_call} to {_last(held)}")
    assert step is not None
    if len(held) > 1 and any(one.engine is None for one in held):
        raise TraceError(
            f"session {held[0].session} has had {len(held)} conversations, and each counts its steps from 0; add --conversation 1 to {len(held)}, "
            "or name the force call with --call"
        )
    # an engine that went on from a checkpoint has done the steps after it twice, and the last time counts; that of the checkpoint it wrote
    # before, and asked for its forces once more to go on from there
    found = [one for one in reversed(held) if one.step is not None and one.step <= step < one.step + one.calls]
    for one in (*(one for one in found if one.step == 0 or one.step != step), *found):
        return one, step - (one.step or 0)
    known = [one for one in held if one.step is not None and one.calls]
    steps = f"{min((one.step or 0) for one in known)} to {max((one.step or 0) + one.calls - 1 for one in known)}" if known else "none"
    raise TraceError(f"there is no step {step}; the steps that the store knows of: {steps}")


def _of_session(held: Sequence[Conversation], session: str | None) -> list[Conversation]:
    names = list(dict.fromkeys(one.session for one in held))
    if not names:
        raise TraceError("the store knows of no force call: learning was off, no engine came, or an older tumbaga wrote it")
    if session is None and len(names) > 1:
        raise TraceError(f"there are {len(names)} sessions; add --session and one of: {', '.join(names)}")
    wanted = names[0] if session is None else session
    if wanted not in names:
        raise TraceError(f"there is no session {wanted!r}; there is {', '.join(names)}")
    return [one for one in held if one.session == wanted]


def _last(held: Sequence[Conversation]) -> int:
    return max(one.first_call + one.calls for one in held) - 1


def served(store: Store, conversation: Conversation, call: int) -> Served:
    """What served a call of a conversation, given by its number in it."""
    number = conversation.first_call + call
    weights = {event["ramp"]: float(event["weight"]) for event in store.events(RAMP)}
    row = [ramp for ramp in store.ramps(conversation.session) if ramp.first_step <= number][-1]
    if row.from_version == row.to_version or (row.last_step is not None and number > row.last_step):
        return Served(row.to_version, row.to_version, 1.0, 1.0, None)
    first = weights.get(row.id, 0.0)
    if number == row.last_step:
        return Served(row.to_version, row.to_version, 1.0, 1.0, row)
    return Served(row.from_version, row.to_version, _weight(row, first, number, conversation.ramp_steps), first, row)


def _weight(row: Ramp, first: float, number: int, steps: int) -> float | None:
    """Weight of the new version at a call of a ramp: the cosine of `online.ramp`, from the weight that the ramp began with."""
    began = round(steps * math.acos(1.0 - 2.0 * min(max(first, 0.0), 1.0)) / math.pi)
    place = began + number - row.first_step
    if place >= steps or (row.last_step is not None and began + row.last_step - row.first_step != steps):
        return None
    return 0.5 * (1.0 - math.cos(math.pi * place / steps))


# -- what is told of it --------------------------------------------------------------------------------------------------------------------


def told_as(version: StoredVersion) -> str:
    """A version as it stands in the extras of an answer."""
    return f"{version.number}-{version.hash[:8] if version.number else 'base'}"


def lineage(versions: Sequence[StoredVersion], *numbers: int) -> list[StoredVersion]:
    """Some versions and all that they came from, the newest first."""
    known, found, wanted = {v.number: v for v in versions}, set(), list(numbers)
    while wanted:
        number = wanted.pop()
        if number in known and number not in found:
            found.add(number)
            parent = known[number].parent
            wanted += [] if parent is None else [parent]
    return [known[number] for number in sorted(found, reverse=True)]


def described(store: Store, version: StoredVersion) -> dict[str, Any]:
    """A version with its labels and what the gate said of it, JSON-compatible."""
    taught = store.taught(version.number)
    old = set(store.version_labels(version.parent)) if version.parent is not None else set()
    return {
        "number": version.number,
        "version": told_as(version),
        "hash": version.hash,
        "file": version.file,
        "kind": version.kind,
        "state": version.state,
        "parent": version.parent,
        "created": _when(version.created),
        "labels": [{**one._asdict(), "created": _when(one.created), "new": one.label not in old} for one in taught],
        "gates": [
            {"check": gate.check, "passed": gate.passed, "reason": gate.reason, "numbers": dict(gate.numbers)}
            for gate in store.gates(version.number)
        ],
        "metrics": version.metrics,
    }


def trace(store: Store, conversation: Conversation, call: int) -> dict[str, Any]:
    """Everything that the store knows of the force of one call, JSON-compatible.

    Args:
        store: of the run.
        conversation: which one.
        call: number of the call in it.
    """
    found, number = served(store, conversation, call), conversation.first_call + call
    versions = {v.number: v for v in store.versions()}
    ramp = found.ramp
    return {
        "session": conversation.session,
        "conversation": conversation.number,
        "call": number,
        "step": None if conversation.step is None else conversation.step + call,
        "version": told_as(versions[found.new]) if found.new in versions else str(found.new),
        "from": told_as(versions[found.old]) if found.old in versions else str(found.old),
        "weight": found.weight,
        "weight_range": [found.low if found.weight is None else found.weight, 1.0 if found.weight is None else found.weight],
        "ramp": None if ramp is None else {"first_call": ramp.first_step, "last_call": ramp.last_step, "work_ev": ramp.work_ev},
        "lineage": [described(store, version) for version in lineage(list(versions.values()), found.new, found.old)],
        "flags": [
            {"frame": flag.frame, "reason": flag.reason.value, "score": flag.score, "version": flag.version}
            for flag in store.flags_between(conversation.session, number, number)
        ],
        "audits": _audits(store, conversation, number),
    }


def _audits(store: Store, conversation: Conversation, number: int) -> list[dict[str, Any]]:
    """The audits of a conversation next to a call."""
    found = []
    for audit in store.audits():
        for flag in store.flags(audit.frame):
            if flag.reason is Reason.AUDIT and flag.session == conversation.session:
                found.append((flag.step, audit))
                break
    inside = [one for one in found if conversation.first_call <= one[0] < conversation.first_call + conversation.calls]
    before = sorted((one for one in inside if one[0] <= number), key=lambda one: one[0])[-_NEAR:]
    after = sorted((one for one in inside if one[0] > number), key=lambda one: one[0])[:_NEAR]
    return [
        {
            "call": call,
            "frame": audit.frame,
            "label": audit.label,
            "version": audit.version,
            "force_rmse": audit.force_rmse,
            "force_max": audit.force_max,
            "promised": audit.promised,
        }
        for call, audit in before + after
    ]


def _when(created: float) -> str:
    return datetime.fromtimestamp(created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


# -- for people ----------------------------------------------------------------------------------------------------------------------------


def text(told: dict[str, Any]) -> str:
    """A trace for people."""
    place = f"force call {told['call']} of {told['session']}"
    step = "" if told["step"] is None else f"step {told['step']}, "
    lines = [f"{step}{place} (conversation {told['conversation']})"]
    lines.append(f"  served by version {told['version']}")
    if told["from"] != told["version"]:
        share = f"{100 * told['weight']:.1f} %" if told["weight"] is not None else f"{100 * told['weight_range'][0]:.1f} to 100 %"
        lines[-1] += f" ({share}) and version {told['from']} (the rest)"
    if told["ramp"] is not None:
        last, work = told["ramp"]["last_call"], told["ramp"]["work_ev"]
        lines.append(f"  on a ramp from call {told['ramp']['first_call']} to {'?' if last is None else last}")
        lines[-1] += "" if work is None else f", which did {1000 * work:.3f} meV of work"
    for flag in told["flags"]:
        lines.append(f"  frame {flag['frame']} was flagged: {flag['reason']}, uncertainty {flag['score']:.3f} eV/Å")
    for audit in told["audits"]:
        error = f"largest force error {audit['force_max']:.3f} eV/Å, {audit['promised']:.3f} promised"
        lines.append(f"  audit of call {audit['call']} (frame {audit['frame']}, version {audit['version']}): {error}")
    lines.append("  lineage")
    for version in told["lineage"]:
        lines += _version_lines(version)
    return "\n".join(lines)


def _version_lines(version: dict[str, Any]) -> list[str]:
    origin = "" if version["parent"] is None else f" from version {version['parent']}"
    lines = [f"    version {version['version']}: {version['kind']}{origin}, {version['state']}, made {version['created']}"]
    new = [one for one in version["labels"] if one["new"]]
    if version["labels"]:
        lines[-1] += f", {len(version['labels'])} label{'s' * (len(version['labels']) > 1)}, {len(new)} of them new"
    lines += [f"      label {one['label']} of frame {one['frame']}, {one['method']}, {one['created']}" for one in new]
    for gate in version["gates"]:
        said = f" ({gate['reason']})" if gate["reason"] else ""
        lines.append(f"      {gate['check']}: {'passed' if gate['passed'] else 'NOT PASSED'}{said}")
    if not version["gates"] and version["metrics"].get("verdict"):
        lines.append(f"      held-out check: {version['metrics']['verdict']}")
    return lines


def brief(version: dict[str, Any]) -> str:
    """What the gate said of a version, in a few words."""
    failed = [gate["check"] for gate in version["gates"] if not gate["passed"]]
    if failed:
        return f"not passed: {', '.join(failed)}"
    if version["gates"]:
        return f"{len(version['gates'])} passed"
    return str(version["metrics"].get("verdict", "")).partition(":")[0]


def table(versions: Sequence[dict[str, Any]]) -> str:
    """Versions as a table for people; errors are force RMSE on held-out labels, of version 0 and of the version."""
    head = ("version", "kind", "parent", "labels", "state", "held-out error", "gate", "made")
    rows = [head]
    for version in versions:
        before, after = (version["metrics"].get(key) for key in ("holdout_rmse_base", "holdout_rmse"))
        error = f"{1000 * before:.0f} → {1000 * after:.0f} meV/Å" if before is not None and after is not None else ""
        parent = "" if version["parent"] is None else str(version["parent"])
        labels = str(len(version["labels"]))
        rows.append((version["version"], version["kind"], parent, labels, version["state"], error, brief(version), version["created"]))
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
