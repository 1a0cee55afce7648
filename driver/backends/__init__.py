"""Back ends: one file each adapts a potential to the ports of ``tumbaga.online.ports``; foreign imports happen inside the loaders."""
