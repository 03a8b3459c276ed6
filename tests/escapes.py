"""Programs that try to get out of the code sandbox, or to bring down the machine around it.

Each prints ESCAPED when it got what it wanted. ``HOST`` is a folder of the host with a file
``secret`` that anybody may read and write, ``PORT`` a TCP port and ``ABSTRACT`` a socket name on
which the host listens, ``PARENT`` the process that runs the sandbox.
"""

import shutil

import pytest

from pipeline.evals.jail import landlock_version
from pipeline.evals.sandbox import LEAST_LANDLOCK

needs_a_sandbox = pytest.mark.skipif(
    landlock_version() < LEAST_LANDLOCK and not shutil.which("bwrap"),
    reason="neither bubblewrap nor a kernel with Landlock",
)

START = """
import ctypes, errno, os, resource, signal, socket, subprocess, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
def got(attempt):
    try:
        result = attempt()
    except (OSError, MemoryError, RuntimeError, ValueError) as error:
        print("held:", error)
        return None
    print("ESCAPED", result)
    return result
def number(x86, arm):
    return {'x86_64': x86, 'aarch64': arm}[os.uname().machine]
def refused(result):
    if result:
        raise OSError(ctypes.get_errno(), "refused")
def call(number, *arguments):
    result = libc.syscall(ctypes.c_long(number), *(ctypes.c_long(a) for a in arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), "refused")
    return result
"""

# Those that try to reach something: a run of each must not say ESCAPED.
REACHING = {
    "read a secret": "got(lambda: open(f'{HOST}/secret').read())",
    "read a secret through a link": "os.symlink(f'{HOST}/secret', 'l'); got(lambda: open('l').read())",
    "read a secret by another program": (
        "out = subprocess.run(['/bin/cat', f'{HOST}/secret'], capture_output=True).stdout\n"
        "print('ESCAPED' if out else 'held')"
    ),
    "read a secret as a hard link": "got(lambda: os.link(f'{HOST}/secret', 'l') or open('l').read())",
    "read who has accounts": "got(lambda: open('/etc/passwd').read())",
    "list the temporary folder": "got(lambda: [n for n in os.listdir('/tmp')][:3])",
    "read the caller's variables": "got(lambda: open(f'/proc/{PARENT}/environ').read())",
    "read the caller's memory": "got(lambda: open(f'/proc/{PARENT}/mem', 'rb').read(1))",
    "write outside": "got(lambda: open(f'{HOST}/written', 'w').write('x'))",
    "overwrite a file of the host": "got(lambda: open(f'{HOST}/secret', 'w').write('x'))",
    "change a file's mode": "got(lambda: os.chmod(f'{HOST}/secret', 0o777))",
    "delete a file of the host": "got(lambda: os.unlink(f'{HOST}/secret'))",
    "write into the interpreter": "got(lambda: open(os.__file__, 'a').write('#'))",
    "write to shared memory": "got(lambda: open('/dev/shm/untaxed-escape', 'w').write('x'))",
    "connect over TCP": "got(lambda: socket.create_connection(('127.0.0.1', PORT), 2))",
    "send over UDP": (
        "udp = lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        "got(lambda: udp().sendto(b'x', ('127.0.0.1', 9)))"
    ),
    "connect to an abstract socket": (
        "s = got(lambda: socket.socket(socket.AF_UNIX)); s and s.connect('\\0' + ABSTRACT)"
    ),
    "open a raw socket": "got(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW))",
    "make an io_uring": "got(lambda: call(425, 4, ctypes.addressof(ctypes.create_string_buffer(120))))",
    "kill the caller": "got(lambda: os.kill(PARENT, signal.SIGKILL))",
    "kill everybody": "got(lambda: os.kill(-1, signal.SIGKILL))",
    "be sent a signal by a pipe": (
        "import fcntl\nr, w = os.pipe()\ngot(lambda: fcntl.fcntl(r, 8, PARENT))"
    ),
    "cut a file short": "got(lambda: os.truncate(f'{HOST}/secret', 0))",
    "connect a pair anew": "a, b = socket.socketpair(); got(lambda: a.connect('/dev/log'))",
    "make a pair of datagrams": "got(lambda: socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM))",
    "reserve the disk at once": "got(lambda: os.posix_fallocate(os.open('f', 66), 0, 2**20))",
    "reserve the disk by another call": (
        "import fcntl, struct\nsize = struct.pack('hhqqiI16x', 0, 0, 0, 2**20, 0, 0)\n"
        "f = os.open('f', 66)\ngot(lambda: fcntl.ioctl(f, 0x40305828, size))"
    ),
    "hide its files": "got(lambda: refused(libc.prctl(4, 0, 0, 0, 0)))",
    "kill its own group": "got(lambda: os.killpg(0, signal.SIGTERM))",
    "open the caller's process": "got(lambda: os.pidfd_open(PARENT))",
    "trace the caller": "got(lambda: call(number(101, 117), 16, PARENT, 0, 0))",
    "slow the caller down": "got(lambda: os.setpriority(os.PRIO_PROCESS, PARENT, 19))",
    "limit the caller": "got(lambda: resource.prlimit(PARENT, resource.RLIMIT_NOFILE, (8, 8)))",
    "raise its own limits": "got(lambda: resource.setrlimit(resource.RLIMIT_NPROC, (10**5, 10**5)))",
    "become root": "got(lambda: os.setuid(0)); print('ESCAPED' if os.getuid() == 0 else 'held')",
    "leave the session": "os.wait() if os.fork() else got(os.setsid)",
    "leave the group": "got(lambda: os.setpgid(0, 0))",
    "make a namespace": "got(lambda: refused(libc.unshare(0x10000000)))",
    "clone into a namespace": ("got(lambda: call(number(56, 220), 0x10000011, 0, 0, 0, 0))"),
    "mount": "got(lambda: refused(libc.mount(b'none', b'.', b'tmpfs', 0, None)))",
    "change the root": "got(lambda: os.chroot('.'))",
    "keep memory outside of limits": "got(lambda: os.memfd_create('x'))",
    "share memory that outlives it": "got(lambda: call(number(29, 194), 0, 4096, 0o1666))",
    "open a file by its handle": ("got(lambda: call(number(304, 265), 3, 0, 0))"),
    "call by the second table": "got(lambda: call(number(0x40000000 + 41, 198), 2, 1, 0))",
    "load a program into the kernel": "got(lambda: call(number(321, 280), 0, 0, 0))",
}

# Those that use up what the machine has: each with the ways in which it may end.
HUNGRY = {
    "fork without end": (
        "while True:\n    os.fork()",
        {"failed", "time", "memory", "processes"},
    ),
    "threads without end": (
        "while True:\n    threading.Thread(target=time.sleep, args=(60,)).start()",
        {"failed", "time", "memory", "processes"},
    ),
    "take all memory": ("held = [bytearray(2**27) for _ in range(64)]", {"failed", "memory"}),
    "take memory in many processes": (
        "for _ in range(6):\n    if os.fork() == 0:\n        break\n"
        "held = bytearray(b'x') * 2**27\ntime.sleep(60)",
        {"memory", "failed"},
    ),
    "print without end": ("while True:\n    print('x' * 1000)", {"output"}),
    "print a little now and then": (
        "while True:\n    print(1, flush=True)\n    time.sleep(0.01)",
        {"time"},
    ),
    "compute without end": ("while True:\n    pass", {"time"}),
    "ignore every signal": (
        "for n in range(1, 32):\n    n in (9, 19) or signal.signal(n, signal.SIG_IGN)\n"
        "while True:\n    pass",
        {"time"},
    ),
    "sleep without end": ("time.sleep(3600)", {"time"}),
    "close its output and go on": ("os.close(1); os.close(2)\ntime.sleep(3600)", {"time"}),
    "write one large file": (
        "with open('f', 'wb') as f:\n    while True:\n        f.write(b'x' * 2**20)",
        {"failed", "disk"},
    ),
    "write many large files": (
        "for n in range(10**6):\n    open(f'f{n}', 'wb').write(b'x' * 2**20)",
        {"failed", "disk"},
    ),
    "write many small files": (
        "for n in range(10**6):\n    open(f'f{n}', 'w').close()",
        {"failed", "disk", "time"},
    ),
    "fill deleted files": (
        "held = []\nwhile True:\n    held.append(open('f', 'wb', 0)); os.unlink('f')\n"
        "    held[-1].write(b'x' * 2**22)",
        {"failed", "disk"},
    ),
    "fill mapped deleted files": (
        "import mmap\nheld = []\nwhile True:\n    f = open('f', 'wb+', 0); os.unlink('f')\n"
        "    f.write(b'x' * 2**22); held.append(mmap.mmap(f.fileno(), 4096)); f.close()",
        {"failed", "disk"},
    ),
    "write behind a file that comes and goes": (
        "if os.fork() == 0:\n    while True:\n        os.mkdir('x'); os.rmdir('x')\n"
        "for n in range(10**6):\n    open(f'f{n}', 'wb').write(b'x' * 2**20)",
        {"disk"},
    ),
    "share memory that looks unused": (
        "import mmap\nfor _ in range(8):\n    if os.fork() == 0:\n        break\n"
        "held = mmap.mmap(-1, 2**28)\nfor _ in range(2**8):\n    held.write(b'x' * 2**20)\n"
        "held.madvise(mmap.MADV_DONTNEED)\ntime.sleep(60)",
        {"memory"},
    ),
    "dig without end": (
        "while True:\n    os.mkdir('d'); os.chdir('d')",
        {"failed", "disk", "time"},
    ),
    "recurse without end": (
        "sys.setrecursionlimit(10**9)\ndef f(n):\n    return f(n + 1) + 1\nf(0)",
        {"failed", "time", "memory"},
    ),
    "leave early with 0": ("sys.exit(0)", {"failed"}),
    "leave at once with 0": ("os._exit(0)", {"failed"}),
    "leave a child behind": (
        "if os.fork() == 0:\n    if os.fork() == 0:\n        time.sleep(3600)\n    os._exit(0)\nos.wait()",
        {"passed"},
    ),
}
