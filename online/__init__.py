"""Learning: records, uncertainty, flagging, labels, updates. No sockets and no concrete back end."""
