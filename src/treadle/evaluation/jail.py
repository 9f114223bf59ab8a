"""A script, run as `python -I -S jail.py SETTINGS`: shuts itself into empty namespaces and becomes the program there.

`treadle.evaluation.execution` starts it and says what it guarantees. It reads the program from standard input, knows
the standard library only, and is not imported by anybody. Three processes: this one makes the namespaces; its child,
process 1 of them, builds the file system and reaps; that one's child gives up its rights and becomes the program, so
that the end of process 1 is the end of everything the program has started.
"""

import ctypes
import json
import os
import resource
import sys
from pathlib import Path

# <linux/sched.h>, <linux/mount.h>, <linux/prctl.h>; the numbers of mount_setattr and pivot_root by machine.
CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = (1 << bit for bit in (17, 27, 28, 29, 30))
MS_BIND, MS_REC, MS_PRIVATE, MNT_DETACH = 4096, 16384, 1 << 18, 2
AT_FDCWD, AT_RECURSIVE, PR_SET_NO_NEW_PRIVS = -100, 0x8000, 38
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV = 1, 2, 4
SYS_MOUNT_SETATTR = 442
SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
NOBODY = 65534
LIBC = ctypes.CDLL(None, use_errno=True)


def call(name: str, result: int) -> None:
    """Raise what libc has to say if `result` is a failure."""
    if result != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")


def enter_namespaces() -> None:
    """Leave the network, mounts, processes and users behind; a user keeps its number, and no rights outside."""
    user, group = os.geteuid(), os.getegid()
    flags = CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET | (CLONE_NEWUSER if user else 0)
    call("unshare", LIBC.unshare(flags))
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")


def mount(source: str, target: Path, kind: str | None, flags: int, options: str = "") -> None:
    """Attach a file system, or the folder `source`, at `target`."""
    kind_bytes = kind.encode() if kind else None
    call(f"mount {target}", LIBC.mount(source.encode(), bytes(target), kind_bytes, flags, options.encode()))


class MountAttributes(ctypes.Structure):
    """struct mount_attr of <linux/mount.h>."""

    _fields_ = [(name, ctypes.c_uint64) for name in ("attr_set", "attr_clr", "propagation", "userns_fd")]


def build_root(root: Path, shown: list[str], size: int) -> None:
    """Make `root` the whole file system: in memory, with an empty /work, and `shown` in it, read-only."""
    mount("none", Path("/"), None, MS_REC | MS_PRIVATE)
    mount("tmpfs", root, "tmpfs", 0, f"size={size},mode=755")
    jail = root / "jail"
    read_only = MountAttributes(attr_set=MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV)
    for name in shown:
        outside, inside = Path(name), jail / name.lstrip("/")
        if inside.exists() or not outside.exists():
            continue
        inside.parent.mkdir(parents=True, exist_ok=True)
        if outside.is_symlink():
            inside.symlink_to(os.readlink(outside))
            continue
        inside.mkdir() if outside.is_dir() else inside.touch()
        mount(name, inside, None, MS_BIND | MS_REC)
        arguments = (ctypes.byref(read_only), ctypes.sizeof(read_only))
        call(f"lock {name}", LIBC.syscall(SYS_MOUNT_SETATTR, AT_FDCWD, bytes(inside), AT_RECURSIVE, *arguments))
    (jail / "work").mkdir()
    os.chdir(root)
    call("pivot_root", LIBC.syscall(SYS_PIVOT_ROOT[os.uname().machine], b".", b"."))
    call("umount", LIBC.umount2(b".", MNT_DETACH))
    # The root is gone already; a chroot on top denies new user namespaces, and with them new rights.
    os.chroot("/jail")
    os.chdir("/work")


def give_up_rights(limits: dict[str, int]) -> None:
    """Become nobody if this is root, take the limits, and never gain a right again."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, name), (value, value))
    call("prctl", LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))


def wait_for(child: int) -> int:
    """The exit code of the child, 128 + its signal if one ended it; reaps whatever else ends meanwhile."""
    while True:
        process, status = os.wait()
        if process == child:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


def main() -> int:
    """The program's exit code."""
    settings = json.loads(sys.argv[1])
    source = sys.stdin.buffer.read()
    enter_namespaces()
    if first := os.fork():
        return wait_for(first)
    build_root(Path(settings["root"]), settings["shown"], settings["disk"])
    Path("program.py").write_bytes(source)
    os.chown(".", NOBODY if os.geteuid() == 0 else -1, -1)
    if program := os.fork():
        os._exit(wait_for(program))
    give_up_rights(settings["limits"])
    environment = {"HOME": "/work", "TMPDIR": "/work", "PATH": "", "LC_ALL": "C.UTF-8", "OPENBLAS_NUM_THREADS": "1"}
    os.execve(settings["command"][0], settings["command"], environment)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except OSError as problem:
        print(problem, file=sys.stderr)  # noqa: T201 - its parent reads it
        os._exit(1)
