"""Memory of this process, as the kernel counts it. Imported first, so that `AT_START` is from before any library."""

from pathlib import Path

__all__ = ["AT_START", "status_bytes"]


def status_bytes(field: str) -> int:
    """Bytes of a field of /proc/self/status, such as VmRSS (now) or VmHWM (at most); 0 where there is none."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), 0)


AT_START = status_bytes("VmRSS")
