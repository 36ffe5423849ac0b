#!/usr/bin/python3
"""Answers each datagram with its process id and what it was sent. It knows nothing of grm: any server that takes its sockets
by socket activation, as sd_listen_fds(3) says, restarts without losing a packet."""

import os
import selectors
import socket

sockets = []
if os.environ.get("LISTEN_PID") == str(os.getpid()):
    for fd in range(3, 3 + int(os.environ.get("LISTEN_FDS", "0"))):
        sockets.append(socket.socket(fileno=fd))
else:
    sockets.append(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    sockets[0].bind(("0.0.0.0", 5202))

selector = selectors.DefaultSelector()
for s in sockets:
    s.setblocking(False)
    selector.register(s, selectors.EVENT_READ)

notify = os.environ.get("NOTIFY_SOCKET")
if notify:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as n:
        n.sendto(b"READY=1", notify.replace("@", "\0", 1) if notify.startswith("@") else notify)

while True:
    for key, _ in selector.select():
        try:
            data, address = key.fileobj.recvfrom(65535)
            key.fileobj.sendto(b"%d %b" % (os.getpid(), data), address)
        except OSError:
            pass  # somebody else got it, or the client is gone
