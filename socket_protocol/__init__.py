"""The wire: bytes to events and back, the i-PI protocol in both roles, and the bus between tumbaga's own processes."""
