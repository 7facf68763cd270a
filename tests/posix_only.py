"""Takes from an interpreter what only POSIX systems have, as far as Python's own libraries live without it.

Left where it is, since something else needs it where `os.name` is "posix":

- os.waitpid, os.WNOHANG, os.register_at_fork, _posixsubprocess: how multiprocessing and subprocess start and await
  their children here
- socket.AF_UNIX, socket.sendmsg: multiprocessing's pipes, and the file descriptors of torch's shared memory
- signal.SIGCHLD: torch's DataLoader watches its workers by it
- os.kill, os.umask, os.get_terminal_size: Windows has them too
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
        mkfifo mknod sendfile statvfs fstatvfs chroot getloadavg openpty pidfd_open""",
    signal: """SIGKILL SIGALRM SIGHUP SIGUSR1 SIGUSR2 SIGQUIT SIGPIPE SIGSTOP SIGCONT setitimer getitimer alarm pause
        pthread_sigmask pthread_kill sigwait sigpending ITIMER_REAL""",
    socket: "send_fds recv_fds socketpair_fds fromshare_fds",
}
MODULES = ("resource", "fcntl", "pwd", "grp", "termios", "tty", "pty", "syslog")


def take_away() -> None:
    """Take the names away, and make `spawn` the way in which processes start, as it is where there is no fork."""
    multiprocessing.set_start_method("spawn", force=True)
    for module, names in NAMES.items():
        for name in names.split():
            if hasattr(module, name):
                delattr(module, name)
    for name in MODULES:
        sys.modules[name] = None  # importing it is an ImportError
