"""The part of the sandbox that runs in the program's own process, before it.

Standard input holds this file, compiled; a request (as `marshal` writes it); and what the program is to read, or else the tests.
The two arguments are the lengths of the first two. Whatever a program does not need is not imported: `json`,
`typing` or `platform` would make a start half as long again.
"""

from __future__ import annotations

import ctypes
import marshal
import os
import resource
import struct
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# What Python and numpy call once they run. A call that is not here does not exist (ENOSYS), as on an older kernel.
# Name, number on x86-64, number on arm64 (- where it has no such call)
ALLOWED = """
    read 0 63, write 1 64, readv 19 65, writev 20 66, pread64 17 67, pwrite64 18 68, preadv 295 69, pwritev 296 70,
    preadv2 327 286, pwritev2 328 287, open 2 -, openat 257 56, close 3 57, close_range 436 436, dup 32 23,
    dup2 33 -, dup3 292 24, lseek 8 62, stat 4 -, fstat 5 80, lstat 6 -, newfstatat 262 79, statx 332 291,
    statfs 137 43, fstatfs 138 44, access 21 -, faccessat 269 48, faccessat2 439 439, getdents 78 -,
    getdents64 217 61, mmap 9 222, munmap 11 215, mprotect 10 226, mremap 25 216, madvise 28 233, brk 12 214,
    mincore 27 232, msync 26 227, membarrier 324 283, rt_sigaction 13 134, rt_sigprocmask 14 135,
    rt_sigreturn 15 139, rt_sigpending 127 136, rt_sigtimedwait 128 137, rt_sigsuspend 130 133,
    sigaltstack 131 132, pipe 22 -, pipe2 293 59, select 23 -, pselect6 270 72, poll 7 -, ppoll 271 73,
    epoll_create 213 -, epoll_create1 291 20, epoll_ctl 233 21, epoll_wait 232 -, epoll_pwait 281 22,
    eventfd2 290 19, sched_yield 24 124, sched_getaffinity 204 123, sched_getparam 143 121,
    sched_getscheduler 145 120, sched_get_priority_max 146 125, sched_get_priority_min 147 126, nanosleep 35 101,
    clock_nanosleep 230 115, clock_gettime 228 113, clock_getres 229 114, gettimeofday 96 169, time 201 -,
    times 100 153, getrusage 98 165, sysinfo 99 179, uname 63 160, getpid 39 172, getppid 110 173, gettid 186 178,
    getuid 102 174, geteuid 107 175, getgid 104 176, getegid 108 177, getresuid 118 148, getresgid 120 150,
    getgroups 115 158, getpgrp 111 -, getrlimit 97 163, getcpu 309 168, getcwd 79 17, chdir 80 49, fchdir 81 50,
    rename 82 -, renameat 264 38, renameat2 316 276, mkdir 83 -, mkdirat 258 34, rmdir 84 -, unlink 87 -,
    unlinkat 263 35, link 86 -, linkat 265 37, symlink 88 -, symlinkat 266 36, readlink 89 -, readlinkat 267 78,
    ftruncate 77 46, fsync 74 82, fdatasync 75 83, fallocate 285 47, fadvise64 221 223, flock 73 32,
    sendfile 40 71, copy_file_range 326 285, umask 95 166, exit 60 93, exit_group 231 94, futex 202 98,
    futex_waitv 449 449, set_robust_list 273 99, get_robust_list 274 100, set_tid_address 218 96, rseq 334 293,
    arch_prctl 158 -, getrandom 318 278, alarm 37 -, setitimer 38 103, getitimer 36 102, pause 34 -, wait4 61 260,
    waitid 247 95, restart_syscall 219 128, sendto 44 206, recvfrom 45 207, sendmsg 46 211, recvmsg 47 212,
    shutdown 48 210, getsockname 51 204, getpeername 52 205, getsockopt 55 209, creat 85 -
"""
# Calls of which some are allowed, by the value of one argument: numbers, which argument, values
FILTERED: list[tuple[tuple[int, int], int, tuple[int, ...]]] = [
    (
        (72, 25),
        1,
        (0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030, 1031, 1032),
    ),  # fcntl: no F_SETOWN, F_SETSIG, F_NOTIFY, leases
    (
        (16, 29),
        1,
        (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451),
    ),  # ioctl: isatty, window size, FIONREAD, FIONBIO, FIOCLEX
    ((157, 167), 0, (15, 16)),  # prctl: the thread's name
    ((53, 199), 1, (1, 0x801, 0x80001, 0x80801)),  # socketpair: SOCK_STREAM only, which can send to nobody else
]
CLONE, PRLIMIT = (56, 220), (302, 261)
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, AUDIT_ARCH_*

MAKE_CHAR, MAKE_SOCK, MAKE_FIFO, MAKE_BLOCK, IOCTL_DEV = 1 << 6, 1 << 9, 1 << 10, 1 << 11, 1 << 15  # Landlock's rights


def main() -> None:
    """Close the sandbox, say so on standard error, and run the program, or the tests beside it."""
    start, length = map(int, sys.argv[1:])
    request = marshal.loads(os.pread(0, length, start))
    os.lseek(0, start + length, os.SEEK_SET)
    _as_site_would(request["packages"])
    libc = ctypes.CDLL(None, use_errno=True)
    if request["tmpfs"] is not None:
        _mount(libc, **request["tmpfs"])
    _limit(request)
    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    layers = []
    if request["landlock"] is not None and _landlock(libc, **request["landlock"]):
        layers.append("landlock")
    _drop_capabilities(libc)
    if request["harness"] is None:
        _close(libc, layers)
        _execute(request["program"])
    else:
        _run_tests(libc, layers, request)


def _as_site_would(packages: list[str]) -> None:
    """What programs know of `site`, which is not imported: installed packages, `help`, and the names that end a session."""
    import _sitebuiltins
    import builtins

    sys.path += packages
    for name in ("exit", "quit"):
        setattr(builtins, name, _sitebuiltins.Quitter(name, "Ctrl-D"))
    builtins.help = _sitebuiltins._Helper()


def _run_tests(libc: ctypes.CDLL, layers: list[str], request: dict[str, Any]) -> None:
    """The program in one process, the tests in another: this one, which never runs a line of the program's."""
    harness: dict[str, Any] = {"__name__": "sandbox_tests"}
    exec(marshal.loads(request["harness"]), harness)
    (read_reply, write_reply), (read_call, write_call) = os.pipe(), os.pipe()
    parent = os.getpid()
    if os.fork() == 0:
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
        os.close(read_reply)
        os.close(write_call)
        os.read(read_call, 1)  # the tests are gone from the request
        _close(libc, [], parent)
        program = request["program"]
        request.clear()  # the program finds nothing of it
        harness["serve"](program, read_call, write_reply)
        os._exit(0)
    os.close(write_reply)
    os.close(read_call)
    tests = harness["json"].loads(os.read(0, request["num_test_bytes"]))  # which the tests' side imports anyway
    os.ftruncate(0, 0)
    _close(libc, layers)
    results = os.dup(1)
    os.dup2(2, 1)  # to nowhere: what a test prints is no result
    os.write(write_call, b"x")
    harness["judge"](tests, read_reply, write_call, results)
    os._exit(0)


def _close(libc: ctypes.CDLL, layers: list[str], parent: int | None = None) -> None:
    """The last step: what is left runs under the filter. In the child, whose parent judges, nothing is said."""
    libc.prctl(1, 9, 0, 0, 0)  # PR_SET_PDEATHSIG, SIGKILL: killed with whoever started it
    if parent is not None and os.getppid() != parent:
        os._exit(1)
    null = os.open(os.devnull, os.O_WRONLY)
    filtered = _seccomp(libc)
    if parent is None:
        os.write(2, f"sandbox ready: {' '.join([*layers, *(['seccomp'] if filtered else [])])}\n".encode())
    os.dup2(null, 2)


def _execute(program: str) -> None:
    exec(compile(program, "program.py", "exec"), {"__name__": "__main__"})


def _mount(libc: ctypes.CDLL, path: str, num_bytes: int, num_files: int) -> None:
    """The scratch folder, in memory: it is gone with the last process that sees it."""
    options = f"size={num_bytes},nr_inodes={num_files},mode=700".encode()
    if libc.mount(b"tmpfs", path.encode(), b"tmpfs", 2 | 4, options) != 0:  # MS_NOSUID, MS_NODEV
        raise OSError(ctypes.get_errno(), "the scratch folder cannot be mounted")
    os.chdir(path)


def _limit(request: dict[str, Any]) -> None:
    limits = {
        resource.RLIMIT_AS: request["memory"],
        resource.RLIMIT_CPU: int(request["seconds"]) + 1,
        resource.RLIMIT_FSIZE: request["file_bytes"],
        resource.RLIMIT_NOFILE: request["files"],
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    for kind, most in limits.items():
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))


def _drop_capabilities(libc: ctypes.CDLL) -> None:
    """Drop them all, from the bounding set too where that is allowed; root without them is a user like others."""
    for capability in range(64):
        libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP
    libc.prctl(47, 4, 0, 0, 0)  # PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL
    if libc.capset(struct.pack("Ii", 0x20080522, 0), bytes(24)) != 0:
        raise OSError(ctypes.get_errno(), "the capabilities cannot be dropped")


def _landlock(libc: ctypes.CDLL, readable: list[str], devices: list[str], scratch: str) -> bool:
    """Close all files but these, ports, and, where the kernel can, others' signals and sockets; False if it cannot.

    See man 7 landlock: the rights known to each version, and the fields of struct landlock_ruleset_attr.
    """
    create, add, restrict = 444, 445, 446
    version = libc.syscall(create, None, 0, 1)
    if version < 1:
        return False
    rights = (1 << (13 if version < 2 else 14 if version < 3 else 15 if version < 5 else 16)) - 1
    net, scoped = (3 if version >= 4 else 0), (3 if version >= 6 else 0)
    size = 8 if version < 4 else 16 if version < 6 else 24
    ruleset = libc.syscall(create, struct.pack("QQQ", rights, net, scoped)[:size], size, 0)
    if ruleset < 0:
        return False
    execute, write, read, list_folder = 1, 2, 4, 8
    own = rights & ~(execute | MAKE_CHAR | MAKE_SOCK | MAKE_FIFO | MAKE_BLOCK | IOCTL_DEV)
    allowed = [(path, execute | read | (list_folder if os.path.isdir(path) else 0)) for path in readable]
    for path, access in [*allowed, *((path, read | write) for path in devices), (scratch, own)]:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = ctypes.create_string_buffer(struct.pack("=Qi", access & rights, descriptor), 12)
        if libc.syscall(add, ruleset, 1, rule, 0) != 0:
            return False
        os.close(descriptor)
    return libc.syscall(restrict, ruleset, 0) == 0


def _seccomp(libc: ctypes.CDLL) -> bool:
    """Allow the calls above, threads, and asking for limits; False if the kernel or the machine cannot.

    A filter is a list of instructions of classic BPF on (number, architecture, ..., six arguments).
    """
    machine = os.uname().machine
    if machine not in MACHINES:
        return False
    column, architecture = MACHINES[machine]
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
    for numbers, which, values in FILTERED:
        filter_ += [(equal, 0, 2 * len(values) + 2, numbers[column]), (load, 0, 0, argument[which])]
        for value in values:
            filter_ += [(equal, 0, 1, value), (ret, 0, 0, allow)]
        filter_.append((ret, 0, 0, refuse))
    for entry in ALLOWED.split(","):
        if (number := entry.split()[1 + column]) != "-":
            filter_ += [(equal, 0, 1, int(number)), (ret, 0, 0, allow)]
    filter_.append((ret, 0, 0, absent))
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in filter_))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(filter_), ctypes.addressof(code)))
    return libc.prctl(22, 2, ctypes.byref(program), 0, 0) == 0  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


if __name__ == "__main__":
    main()
