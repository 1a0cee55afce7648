"""The program: it composes the wire and the learning into processes, commands and back ends."""
