"""Takes from an interpreter what only POSIX systems have: from this project's code, and from most libraries.

These keep it, since they choose by `sys.platform` or `os.name`, which say Linux here: on Windows they go other ways.

- multiprocessing and subprocess start their children by fork_exec, await them by os.waitpid and end them by SIGKILL
- torch names SIGKILL and SIGCHLD where its elastic timers and its DataLoader are defined, and shares tensors between
  processes by file descriptors
- shutil looks up the free space of a disk by statvfs
- asyncio and concurrent, which torch imports, wait by what selectors and signals there are
"""

import multiprocessing
import os
import signal
import socket
import sys

NAMES = {
    os: """fork forkpty preadv pread pwritev pwrite posix_fadvise posix_fallocate posix_spawn posix_spawnp memfd_create
        setsid getsid setpgid setpgrp getpgid getpgrp killpg sched_getaffinity sched_setaffinity sched_yield nice
        getuid geteuid getgid getegid getgroups setuid setgid getpriority setpriority wait wait3 wait4 waitid
        mkfifo mknod sendfile statvfs fstatvfs chroot getloadavg openpty pidfd_open WNOHANG fchmod chown""",
    signal: """SIGKILL SIGCHLD SIGALRM SIGHUP SIGUSR1 SIGUSR2 SIGQUIT SIGPIPE SIGSTOP SIGCONT setitimer getitimer alarm
        pause pthread_sigmask pthread_kill sigwait sigpending ITIMER_REAL siginterrupt set_wakeup_fd""",
    socket: "send_fds recv_fds AF_UNIX SCM_RIGHTS CMSG_LEN",
}
MODULES = ("resource", "fcntl", "pwd", "grp", "termios", "tty", "pty", "syslog")
LIBRARIES = ("multiprocessing", "subprocess", "shutil", "torch", "asyncio", "concurrent")


def take_away() -> None:
    """Take the names away, and make `spawn` the way in which processes start, as it is where there is no fork."""
    multiprocessing.set_start_method("spawn", force=True)
    for module, names in NAMES.items():
        taken = {name: module.__dict__.pop(name) for name in names.split() if hasattr(module, name)}
        module.__getattr__ = _for_libraries(module, taken)
    for name in MODULES:
        sys.modules[name] = None  # importing it is an ImportError


def _for_libraries(module, taken):
    def missing(name):
        caller = sys._getframe(1).f_globals.get("__name__", "").split(".")[0]
        if name in taken and caller in LIBRARIES:
            return taken[name]
        raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}", name=name, obj=module)

    return missing
