"""The part of the sandbox that runs in the program's own process, before it: `python -I -c <this text> <length of the request>`.

Standard input holds a request (JSON), then what the program is to read. Uses the standard library only.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import struct
import sys
from collections.abc import Callable
from typing import Any

# Allowing what a program needs would break with every new C library; forbidding what it must not have is stable.
# x86-64, arm64; None where arm64 has no such call
FORBIDDEN: dict[str, tuple[int, int | None]] = {
    "fork": (57, None),
    "vfork": (58, None),
    "execve": (59, 221),
    "execveat": (322, 281),
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_send_signal": (424, 424),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "socket": (41, 198),
    "io_uring_setup": (425, 425),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "setsid": (112, 157),
    "setpgid": (109, 154),
    "memfd_create": (319, 279),
    "shmget": (29, 194),
    "setrlimit": (160, 164),
    "truncate": (76, 45),
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, None),
    "fchown": (93, 55),
    "lchown": (94, None),
    "fchownat": (260, 54),
    "utime": (132, None),
    "utimes": (235, None),
    "futimesat": (261, None),
    "utimensat": (280, 88),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
}
CLONE, CLONE3, PRLIMIT = (56, 220), (435, 435), (302, 261)
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, AUDIT_ARCH_*


def main() -> None:
    """Close the sandbox, say so on standard error, and run the program."""
    length = int(sys.argv[1])
    request = json.loads(os.pread(0, length, 0))
    os.lseek(0, length, os.SEEK_SET)
    _limit(request)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    libc.prctl(1, 9, 0, 0, 0)  # PR_SET_PDEATHSIG: killed with whoever started it
    layers = []
    if request["landlock"] is not None and _landlock(libc, **request["landlock"]):
        layers.append("landlock")
    if _seccomp(libc):
        layers.append("seccomp")
    os.write(2, f"sandbox ready: {' '.join(layers)}\n".encode())
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    if request["tests"] is None:
        _execute(request["program"], {"__name__": "__main__"})
    else:
        examine(request["program"], request["tests"], null)


def _execute(program: str, namespace: dict[str, Any]) -> dict[str, Any]:
    exec(compile(program, "program.py", "exec"), namespace)
    return namespace


def examine(program: str, tests: list[Any], null: int) -> None:
    """Run the program, then for each test write a line of JSON: [number, whether it went well, values].

    A test is {"values": [expression, ...]}, evaluated and written as plain data, or {"block": statements}, which go well
    unless they raise. The program writes to nowhere, and the request is gone before it starts.
    """
    os.ftruncate(0, 0)
    results = os.dup(1)
    os.dup2(null, 1)
    write, dumps, nonce = os.write, json.dumps, tests[0]
    namespace = _execute(program, {"__name__": "program"})
    for number, test in enumerate(tests[1:]):
        try:
            if "block" in test:
                exec(compile(test["block"], "test", "exec"), namespace)
                line = [number, True, []]
            else:
                line = [number, True, [plain(eval(text, namespace)) for text in test["values"]]]
        except BaseException as error:  # SystemExit too: a program does not end its own examination well
            line = [number, False, [type(error).__name__]]
        write(results, f"{nonce} {dumps(line)}\n".encode())


def plain(value: Any, depth: int = 0) -> list[Any]:
    """A value of Python's own types as JSON with type marks; what only looks like one is made one."""
    if depth > 50:
        raise ValueError("too deep")
    if hasattr(value, "tolist"):  # numpy
        value = value.tolist()
    makers: list[tuple[type, str, Callable[[Any], Any]]] = [
        (bool, "bool", bool),
        (int, "int", lambda v: hex(int(v))),
        (float, "float", lambda v: float(v).hex()),
        (str, "str", str),
        (bytes, "bytes", lambda v: v.hex()),
        (complex, "complex", lambda v: [v.real.hex(), v.imag.hex()]),
        (dict, "dict", lambda v: [[plain(k, depth + 1), plain(w, depth + 1)] for k, w in v.items()]),
    ]
    makers += [(t, t.__name__, lambda v: [plain(w, depth + 1) for w in v]) for t in (list, tuple, set, frozenset)]
    if value is None:
        return ["none", None]
    for kind, mark, make in makers:
        if isinstance(value, kind):
            return [mark, make(value)]
    raise TypeError(f"a {type(value).__name__} is no plain data")


def _limit(request: dict[str, Any]) -> None:
    limits = {
        resource.RLIMIT_AS: request["memory"],
        resource.RLIMIT_CPU: int(request["seconds"]) + 1,
        resource.RLIMIT_FSIZE: request["file_bytes"],
        resource.RLIMIT_NOFILE: request["files"],
        resource.RLIMIT_CORE: 0,
    }
    for kind, most in limits.items():
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))


def _landlock(libc: ctypes.CDLL, readable: list[str], devices: list[str], scratch: str) -> bool:
    """Close all files but these; False if the kernel cannot."""
    create, add, restrict = 444, 445, 446
    version = libc.syscall(create, None, 0, 1)
    if version < 1:
        return False
    rights = (1 << (13 if version < 2 else 14 if version < 3 else 15 if version < 5 else 16)) - 1
    ruleset = libc.syscall(create, ctypes.create_string_buffer(struct.pack("Q", rights), 8), 8, 0)
    if ruleset < 0:
        return False
    execute, write, read, list_folder = 1, 2, 4, 8
    allowed = [(path, execute | read | (list_folder if os.path.isdir(path) else 0)) for path in readable]
    for path, access in [*allowed, *((path, read | write) for path in devices), (scratch, rights)]:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = ctypes.create_string_buffer(struct.pack("=Qi", access & rights, descriptor), 12)
        if libc.syscall(add, ruleset, 1, rule, 0) != 0:
            return False
        os.close(descriptor)
    return libc.syscall(restrict, ruleset, 0) == 0


def _seccomp(libc: ctypes.CDLL) -> bool:
    """Forbid the calls above, processes, and raising limits; False if the kernel or the machine cannot.

    A filter is a list of instructions of classic BPF on (number, architecture, ..., six arguments).
    """
    if platform.machine() not in MACHINES:
        return False
    column, architecture = MACHINES[platform.machine()]
    load, equal, at_least, any_bit, ret = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, refuse, absent, kill = 0x7FFF0000, 0x00050000 | 1, 0x00050000 | 38, 0x80000000  # errno EPERM and ENOSYS
    argument = [16 + 8 * i for i in range(6)]
    filter_: list[tuple[int, int, int, int]] = [  # code, jump if true, jump if false, value
        (load, 0, 0, 4),
        (equal, 1, 0, architecture),
        (ret, 0, 0, kill),
        (load, 0, 0, 0),
        (at_least, 0, 1, 0x40000000),  # x86-64's other numbering
        (ret, 0, 0, refuse),
        (equal, 0, 1, CLONE3[column]),
        (ret, 0, 0, absent),  # the C library then uses clone, whose flags can be seen
        (equal, 0, 4, CLONE[column]),
        (load, 0, 0, argument[0]),
        (any_bit, 0, 1, 0x00010000),  # CLONE_THREAD
        (ret, 0, 0, allow),
        (ret, 0, 0, refuse),
        (equal, 0, 6, PRLIMIT[column]),
        (load, 0, 0, argument[2]),
        (equal, 0, 3, 0),  # asking is allowed, setting is not
        (load, 0, 0, argument[2] + 4),
        (equal, 0, 1, 0),
        (ret, 0, 0, allow),
        (ret, 0, 0, refuse),
    ]
    for numbers in FORBIDDEN.values():
        if (number := numbers[column]) is not None:
            filter_ += [(equal, 0, 1, number), (ret, 0, 0, refuse)]
    filter_.append((ret, 0, 0, allow))
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in filter_))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(filter_), ctypes.addressof(code)))
    return libc.prctl(22, 2, ctypes.byref(program), 0, 0) == 0  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


if __name__ == "__main__":
    main()
