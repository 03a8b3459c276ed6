"""Which system calls a generated program may not make, as a seccomp filter (classic BPF).

A list of what is refused, not of what is allowed: Python needs several hundred, and Landlock, the uid and
limits stand behind it.
"""

from __future__ import annotations

import errno
import struct

ALLOW, KILL, ERROR = 0x7FFF0000, 0x80000000, 0x00050000
LOAD, EQUAL, AT_LEAST, MASK, RETURN = 0x20, 0x15, 0x35, 0x54, 0x06
WHOLE = 0xFFFFFFFF
NAMESPACES = 0x7E020000  # CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
X32 = 0x40000000  # the second table of numbers that x86-64 has
NUMBERS = {"x86_64": 0, "aarch64": 1}
# Refused outright; one number stands for both architectures.
REFUSED: dict[str, int | tuple[int, int | None]] = {
    # the network, and rings that make sockets behind the filter's back
    "socket": (41, 198),
    "connect": (42, 203),  # a pair of sockets could be connected anew, or sent elsewhere
    "bind": (49, 200),
    "sendmsg": (46, 211),
    "sendmmsg": (307, 269),
    "io_uring_setup": 425,
    "io_uring_enter": 426,
    "io_uring_register": 427,
    # other processes: signals, memory, priorities
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_send_signal": 424,
    "pidfd_open": 434,
    "pidfd_getfd": 438,
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": 440,
    "process_mrelease": 448,
    "kcmp": (312, 272),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    "setpriority": (141, 140),
    "ioprio_set": (251, 30),
    "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119),
    "sched_setaffinity": (203, 122),
    "sched_setattr": (314, 274),
    # leaving the group that is killed together
    "setsid": (112, 157),
    "setpgid": (109, 154),
    # namespaces and mounts
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": 428,
    "move_mount": 429,
    "fsopen": 430,
    "fsconfig": 431,
    "fsmount": 432,
    "fspick": 433,
    "mount_setattr": 442,
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    # what Landlock lets through: metadata of files outside, and watching them
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": 452,
    "chown": (92, None),
    "lchown": (94, None),
    "fchown": (93, 55),
    "fchownat": (260, 54),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "setxattrat": 463,
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
    "removexattrat": 466,
    "utime": (132, None),
    "utimes": (235, None),
    "futimesat": (261, None),
    "utimensat": (280, 88),
    "truncate": (76, 45),
    "fallocate": (285, 47),  # takes gigabytes between two looks at the disk
    "inotify_init": (253, None),
    "inotify_init1": (294, 26),
    # memory and messages that outlive or escape a process's limits
    "memfd_create": (319, 279),
    "memfd_secret": 447,
    "shmget": (29, 194),
    "shmat": (30, 196),
    "shmctl": (31, 195),
    "semget": (64, 190),
    "semop": (65, 193),
    "semctl": (66, 191),
    "semtimedop": (220, 192),
    "msgget": (68, 186),
    "msgsnd": (69, 189),
    "msgrcv": (70, 188),
    "msgctl": (71, 187),
    "mq_open": (240, 180),
    "mq_unlink": (241, 181),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    # the kernel
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "fanotify_init": (300, 262),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "syslog": (103, 116),
    "acct": (163, 89),
    "quotactl": (179, 60),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "adjtimex": (159, 171),
    "clock_adjtime": (305, 266),
    "vhangup": (153, 58),
}
CLONE3 = 435
FIRST, SECOND = 16, 24  # where the low half of an argument stands in struct seccomp_data
# Refused by an argument: (call, which argument, the bits of it that count, values, whether those pass).
RESERVE = (0x40305828, 0x4030582A, 0x40305839)  # FS_IOC_RESVSP and its kin, as fallocate
SOMETIMES: tuple[tuple[tuple[int, int], int, int, tuple[int, ...], bool], ...] = (
    ((56, 220), FIRST, NAMESPACES, (0,), True),  # clone, into namespaces
    ((302, 261), FIRST, WHOLE, (0,), True),  # prlimit64, of others
    ((53, 199), FIRST, WHOLE, (1,), True),  # socketpair, but of AF_UNIX
    ((53, 199), SECOND, 0xF, (1,), True),  # and of streams, which cannot be sent elsewhere
    ((72, 25), SECOND, WHOLE, (8, 10, 15, 1026), False),  # fcntl, to be sent signals
    ((16, 29), SECOND, WHOLE, (0x8901, 0x8902, *RESERVE), False),  # ioctl, likewise, or disk
    ((157, 167), FIRST, WHOLE, (4,), False),  # prctl, to hide its files from the caller
)


def filter_program(machine: str) -> bytes:
    """The seccomp filter, as instructions of classic BPF (struct sock_filter)."""

    def number(entry: int | tuple[int, int | None]) -> int | None:
        return entry if isinstance(entry, int) else entry[NUMBERS[machine]]

    no = ERROR | errno.EPERM
    steps: list[tuple[int, int, int, int]] = [
        (LOAD, 0, 0, 4),  # the architecture
        (EQUAL, 1, 0, ARCHITECTURES[machine]),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, 0),  # the number
    ]
    if machine == "x86_64":
        steps += [(AT_LEAST, 0, 1, X32), (RETURN, 0, 0, no)]
    for entry in REFUSED.values():
        if (one := number(entry)) is not None:  # arm64 has no older forms
            steps += [(EQUAL, 0, 1, one), (RETURN, 0, 0, no)]
    # The C library falls back to clone, whose flags can be seen.
    steps += [(EQUAL, 0, 1, CLONE3), (RETURN, 0, 0, ERROR | errno.ENOSYS)]
    for entry, place, bits, values, pass_ in SOMETIMES:
        tests = [(EQUAL, len(values) - n, 0, value) for n, value in enumerate(values)]
        ends = [(RETURN, 0, 0, no), (LOAD, 0, 0, 0)]  # the number again, for the next
        jump = len(tests) + len(ends) + 2
        if pass_:  # equal: past the refusal; else into it
            inner = [*tests, *ends]
        else:  # equal: into the refusal; else past it
            tests = [(EQUAL, len(values) - 1 - n, 0, value) for n, value in enumerate(values[:-1])]
            inner = [*tests, (EQUAL, 0, 1, values[-1]), *ends]
        steps += [(EQUAL, 0, jump, number(entry) or 0), (LOAD, 0, 0, place), (MASK, 0, 0, bits)]
        steps += inner
    steps.append((RETURN, 0, 0, ALLOW))
    return b"".join(struct.pack("=HBBI", *step) for step in steps)
