"""Run a command in a terminal of 100 x 40 and print what it painted: python terminal.py COMMAND..."""

import os
import pty
import sys
import termios

pid, terminal = pty.fork()
if pid == 0:
    os.environ.update(TERM="xterm", CI="", NO_COLOR="")
    termios.tcsetwinsize(sys.stdout.fileno(), (40, 100))
    os.execvp(sys.argv[1], sys.argv[1:])
while True:
    try:
        painted = os.read(terminal, 65536)
    except OSError:  # how Linux says that nobody holds the other end any more
        break
    if not painted:
        break
    sys.stdout.buffer.write(painted)
    sys.stdout.flush()
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
