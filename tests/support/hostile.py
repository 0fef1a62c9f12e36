"""Objects that call a function when they are unpickled: what it is called -> from a marker file to the object."""

import os
import shutil


class Hostile:
    """Calls a function when it is unpickled."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


CALLS = {
    "posix.system": lambda marker: Hostile(os.system, f"touch {marker}"),
    "eval": lambda marker: Hostile(eval, f"open({str(marker)!r}, 'w').close()"),
    "exec": lambda marker: Hostile(exec, f"open({str(marker)!r}, 'w').close()"),
    "getattr": lambda marker: Hostile(getattr, str(marker), "join"),
    "shutil.copy": lambda marker: Hostile(shutil.copy, __file__, str(marker)),
}
