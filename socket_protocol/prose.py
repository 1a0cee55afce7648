"""The sentences of `docs/protocol.md` that no table can say; `document.py` puts the tables between them."""

from __future__ import annotations

from typing import Final

TITLE: Final = """
# The wire

This is the i-PI socket protocol as tumbaga speaks it, in both roles. Read it to write an engine or a driver that talks to tumbaga.
i-PI 3.3 and ASE 3.29 talk to it as they are. All numbers are in atomic units: Bohr, Hartree, Hartree/Bohr.
"""

ROLES: Final = """
## Roles

| role | does | programs |
|---|---|---|
| **ENGINE** | moves atoms, asks for forces | i-PI, ASE `SocketIOCalculator`, the CP2K server; tumbaga when it asks a program for labels |
| **DRIVER** | supplies forces | tumbaga when it serves; `i-pi-driver-py`, ASE `SocketClient`, CP2K, Quantum ESPRESSO, LAMMPS `fix ipi` |

The engine listens, the driver dials, by unix socket or TCP. One connection is one *session*. The engine asks, the driver answers; a driver
says nothing unasked. A busy driver is silent: there is no word for "busy".
"""

STATES: Final = """
A *request* is STATUS or GETFORCE; POSDATA, INIT and EXIT have no answer. In the tables *stays* means that the state does not change, – that
the message is not allowed there, *held* that it waits until the force is computed. What is received and not allowed ends the session. The
end of the stream and a broken connection count as EXIT. After an error the state is ERROR, for good.
A DRIVER's state is what it does. An ENGINE's state is what it knows about its driver; only STATUS tells it more.
"""

ORDER: Final = """
### Order

Answers leave in the order of their requests, whatever was sent in one write. So a driver that holds `GETFORCE, STATUS` answers FORCEREADY,
then READY; one that holds `STATUS, GETFORCE` answers HAVEDATA, then FORCEREADY. To STATUS it tells the truth about its state.
EXIT and the end of the stream act at once, ahead of all that is held, because nobody is left to answer (an EXIT behind an INIT that is held
acts with the end of the stream that follows it).
An ENGINE sends INIT and POSDATA only while no answer is under way: that answer would be about the time before.
"""

MESSAGES: Final = """
A message is a header, and for some a payload. The header is exactly 12 bytes of upper-case ASCII, padded with blanks (not NUL).
`i4` is int32, `f8` is float64, both in native byte order, little-endian in practice; matrices are row-major; nothing is padded.
STATUS, GETFORCE, EXIT, NEEDINIT, READY and HAVEDATA are the header alone. N is the number of atoms, B that of configurations in a batch,
L the length of a text.

Write each message in **one** write: some peers read a header with a single bare `recv`.
"""

CELLS: Final = """
**Cell columns.** In ASE's terms: `h = cell.T / Bohr`. tumbaga computes its own inverse.

**No cell.** All zeros (ASE) or −1.8897261·I, which is −1 Å (i-PI), within 1e-4: not periodic. The sign of the determinant says nothing.

**Virial.** In ASE's terms: `virial = -volume * stress`. What tumbaga receives with a lower triangle of exact zeros is mirrored (LAMMPS fills
only the upper one), anything else is symmetrised. i-PI reads the upper triangle, ASE averages both: send the full symmetric matrix.

**N.** It stays the same during a session. It may change after another INIT.

**Species, periodicity, masses, velocities** are not on the wire; see *Text of INIT* for species.
"""

DIALECTS: Final = """
| dialect | recognised by | frames in a message |
|---|---|---|
| classic | nothing; a habit of the engine: one message at a time | 1 |
| pipelined | nothing; a habit of the engine: POSDATA, GETFORCE and STATUS in one write | 1 |
| batched | `batch_size:B` with B > 1 in the text of the last INIT | B, always |
| shared memory | bytes 20–27 of the first POSDATA are `ipi_shm_`, the name of a segment, where others have numbers | B of INIT, or 1 |

Classic and pipelined are the same to a driver that answers in order. **A driver must begin in NEEDINIT**: only INIT announces batches. INIT
counts from its place in the stream on, also if it is read ahead while a force is computed. In the conversations below each line is one
write; the driver's are answers to what stands above them.
"""

CONVERSATIONS: Final = {
    "Classic": "ASE, the CP2K server, and i-PI with `consolidate_messages` False. STATUS may come at any time; while the force is computed its answer waits.",
    "Pipelined": "i-PI as it is. The answer to the STATUS in the same write comes after the force; i-PI counts the force as done only then.",
    "Batched": "i-PI from 3.3 on, with `batch_size` 4. Two atoms, four frames a message.",
}

BATCHED: Final = """
There are always B frames. An engine with fewer repeats the last one and drops those results: compute equal neighbours at the end once.
The layout of POSDATA and FORCEREADY changes, nothing else. N comes first in POSDATA.
"""

SHARED: Final = """
### Shared memory

i-PI from 3.3 on, `mode="shm"`. Both programs must be on one machine, so it is never accepted over TCP. The conversation is that of the
batched dialect; only the numbers lie elsewhere. The engine makes six segments of POSIX shared memory (files in
`/dev/shm`), sized for the first frame, and tells their names in the first POSDATA. A name has at most 200 of the characters
`A–Z a–z 0–9 _ . -`, begins with `ipi_shm_` and has no slash. The engine writes pos and h **before** POSDATA, the driver pot, force and vir
**before** FORCEREADY. The engine removes the segments. During the session N stays and B may not grow.
"""

INIT_TEXT: Final = """
## Text of INIT

The engine sends INIT when the driver said NEEDINIT, and never unasked. What the text says:

| key | meaning |
|---|---|
| `batch_size` | B, frames in one message; 1 without it |
| `numbers` | atomic numbers in the order of the positions (JSON only) |
| `species` | a chemical formula read in the order of the atoms: `Cu3Au(H2O)2` is Cu Cu Cu Au H H O H H O |
| `pbc` | periodicity: true, false, or in JSON a list of three |

Two forms are read, after blanks and NULs around them are gone: a JSON object, `{"numbers": [29, 29, 79], "pbc": [true, true, false]}`, and
i-PI's pairs, `species : Cu3Au(H2O)2 , batch_size : 4`. In i-PI's input the latter is `<parameters>{species: Cu3Au(H2O)2}</parameters>`.
All other keys, and text that is neither, are ignored. A text of length 0 is accepted; never send one: drivers written in C take it for a lost
connection. Keep it ASCII: i-PI counts characters, not bytes.

**Species.** i-PI sends none. tumbaga takes them from a template file, or from INIT.
"""

EXTRAS: Final = """
## Extras

Text at the end of FORCEREADY. From tumbaga it is empty, or one JSON object in UTF-8, checked before it leaves:

- never a JSON value that is no object, never a key `raw`, no NaN or Infinity: the first two end i-PI's polling thread, and its run hangs;
- the same keys in every answer of a session: with several beads i-PI trips over a key that is new, and loses one that is missing.

Keys that tumbaga sends as a server: `tumbaga` (an object with version, force_std, policy and more), and the flat numbers
`tumbaga_force_std` (eV/Å), `tumbaga_energy_std` (eV), `tumbaga_version`, `tumbaga_swap_work` (eV) for the columns of i-PI's `extra_type`; on
request `committee_pot`, `committee_force`, `committee_virial` in atomic units for i-PI's `ffcommittee`. Extras that tumbaga receives may be
anything within the limit: nothing, one NUL, text, JSON.
"""

LIMITS: Final = """
Checked as soon as the number is read and before anything is allocated for it. What goes beyond ends the session.
"""

ENDS: Final = """
**In peace**: EXIT or the end of the stream. ASE only closes, i-PI says EXIT first. A result that is still computed is dropped.

**Reading ahead**: tumbaga reads on while it computes. It stops reading, without an error, when a second unanswered frame or more messages
than any engine sends are waiting, and reads on when the first is answered.

**Out of step**: the session ends with one sentence in the log. No answer is sent to a bad request; what has arrived is read away before the
connection is closed, so that the peer sees its end and not a reset. As ENGINE tumbaga still sends EXIT, because some drivers spin for ever
without it. These are the reasons:
"""

TRAPS: Final = """
## Traps

For who writes a driver:

- Keep reading while you compute. i-PI takes a socket that died with unread bytes for a broken one and hangs for ever.
- Answer STATUS at once, or not before the force is there; READY after POSDATA says that the frame was ignored.
- Send nothing of FORCEREADY until all of it exists, then one write: i-PI drops a driver that pauses for 2 s within it.
- A wrong N, odd extras or a NaN do not make i-PI complain: it hangs, or goes on with NaN. tumbaga refuses to send them.
- Dial again when nobody listens yet. A unix connect that would block gives EAGAIN. Open no connection that you cannot answer on at once.

For who writes an engine:

- Send INIT whenever the driver says NEEDINIT, once for each time, with at least one byte of text.
- The first time, ask with STATUS for HAVEDATA before GETFORCE; later POSDATA, GETFORCE and STATUS may go in one write.
- A driver may be silent for hours while it computes. Limit the wait yourself.
- Set TCP_NODELAY, and re-arm TCP_QUICKACK after each read (Linux), or peers without it cost 40 ms a message.
- Say EXIT before you close. Judge a driver by its last answer, not by its exit code: some end with an error after EXIT.
"""
