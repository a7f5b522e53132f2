"""Exits with 0 if the Python that runs this file can run the project, else says what it lacks. Uses no package."""

import ctypes
import importlib.util
import os
import platform
import sys
import sysconfig


def lacks() -> str:
    """What is missing, or an empty text."""
    version = "%d.%d" % sys.version_info[:2]  # noqa: UP031 - must be readable to the Pythons it refuses
    if version not in ("3.11", "3.12"):
        return "it is Python " + version + ", not 3.11 or 3.12"
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return "this machine is " + platform.system() + " " + platform.machine() + ", not Linux x86_64"
    if importlib.util.find_spec("ensurepip") is None:
        return "it has no venv module (Debian, Ubuntu: apt install python" + version + "-venv)"
    # Triton's Python backend embeds Python.
    name = sysconfig.get_config_var("INSTSONAME") or ""
    for library in (os.path.join(sysconfig.get_config_var("LIBDIR") or "", name), name):  # noqa: PTH118
        try:
            ctypes.CDLL(library)
        except OSError:
            continue
        return ""
    return "its shared library is missing (Debian, Ubuntu: apt install libpython" + version + ")"


if __name__ == "__main__":
    reason = lacks()
    sys.exit(sys.executable + ": " + reason if reason else 0)
