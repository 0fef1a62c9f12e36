"""Small models of every family that patch sampling knows, a module a library."""
